"""Argument checks that the files of this package share."""

from __future__ import annotations

from collections.abc import Sequence

#: The name that begins every error message.
OP = "fusereg.EarlyStopping"


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the allowed words."""
    if value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"{OP}: {name} must be one of {words}, got {value!r}")


def check_integer(name: str, value: object, least: int, why: str = "") -> None:
    """Raise TypeError unless the value is an integer, ValueError if it is less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{OP}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{OP}: {name} must be >= {least}, got {value}{why}")
