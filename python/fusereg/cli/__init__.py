"""The command line: `fusereg info`, `fusereg demo`, `fusereg bench`."""

from fusereg.cli.app import main

__all__ = ["main"]
