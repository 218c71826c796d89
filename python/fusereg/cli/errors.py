"""Errors with which a command ends in one clear line instead of a traceback."""

from __future__ import annotations

import importlib.util


class InputError(Exception):
    """An input by the user that is wrong or missing; the program ends with exit code 2."""


def require_packages(command: str, extra: str, *names: str) -> None:
    """Raise InputError if packages of an optional extra are not installed, naming all of them.

    Packages are looked up without importing them, so that a check before long work costs nothing.
    """
    missing = ", ".join(name for name in names if importlib.util.find_spec(name) is None)
    if missing:
        raise InputError(
            f"fusereg {command} needs {missing}, not installed here: "
            f"pip install 'fusereg[{extra}]' brings all that it needs"
        )


def one_line(error: BaseException) -> str:
    """Return the error's text in one line, with its type unless the text says enough."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {text}"
