"""Lets `python -m fusereg ...` do what the command `fusereg ...` does."""

import sys

from fusereg.cli import main

if __name__ == "__main__":
    sys.exit(main())
