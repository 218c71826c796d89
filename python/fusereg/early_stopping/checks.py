"""Argument checks that the files of this package share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

#: The name that begins every error message.
OP = "fusereg.EarlyStopping"


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"{OP}: {name} must be one of {words}, got {value!r}")


def check_integer(name: str, value: object, least: int, why: str = "") -> int:
    """Return an integer, NumPy's too, as an int; TypeError for others, ValueError below least."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{OP}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{OP}: {name} must be >= {least}, got {value}{why}")
    return int(value)
