"""The command line: `fusereg info`, `verify`, `demo` and `bench`."""

from fusereg.cli.app import main

__all__ = ["main"]
