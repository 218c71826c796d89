"""The package's version, read from the installed distribution."""

from importlib import metadata

try:
    __version__ = metadata.version("fusereg")
except metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"
