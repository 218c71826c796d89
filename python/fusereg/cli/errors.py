"""Errors with which a command ends in one clear line instead of a traceback."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection, Sequence

#: Earlier names of techniques, which commands and stored results may have.
RENAMED = {"optimizer": "optim"}


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


def choose(given: str | Sequence[str] | None, known: Collection[str], what: str) -> list[str]:
    """Return those of the known names that were given, in their own order; all without a choice.

    Args:
        given: Names, or texts in which commas separate them.
        known: All there are.
        what: What they are, for the error: "--dtype: no dtype".

    Raises:
        InputError: One is unknown; says which is close to it, and all there are.
    """
    if given is None or given == []:
        return list(known)
    text = given if isinstance(given, str) else ",".join(given)
    names = [name.strip() for name in text.split(",") if name.strip()] or [text]
    names = [name if name in known else RENAMED.get(name, name) for name in names]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{what} named {name!r}; there are: {', '.join(known)}{hint}")
    return [name for name in known if name in names]


def one_line(error: BaseException) -> str:
    """Return the error's text in one line, with its type unless the text says enough."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {text}"
