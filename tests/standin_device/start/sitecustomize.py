"""Gives the stand-in device to every Python that starts with this folder in its path."""

import os
import sys
from pathlib import Path

if os.environ.get("FUSEREG_TEST_STANDIN_MODULE"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import conftest  # noqa: F401
