"""What a command raises to end with one clear line instead of a traceback."""

from __future__ import annotations

import importlib.util


class InputError(Exception):
    """Something that the user gave is wrong or missing; the program ends with exit code 2."""


def require_packages(command: str, extra: str, *names: str) -> None:
    """Raises InputError naming every package of an optional extra that is not installed.

    Looks packages up without importing them, so that a check before long work costs nothing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        listed = ", ".join(missing)
        raise InputError(
            f"fusereg {command} needs {listed}, not installed here: "
            f"pip install 'fusereg[{extra}]' brings all that it needs"
        )
