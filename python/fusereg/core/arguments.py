"""Checks of arguments that are no tensors: their types, words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_type(value: object, kind: Any, where: str, wanted: str) -> None:
    """Raise TypeError unless the value is of this type, or of one of several."""
    if not isinstance(value, kind):
        raise TypeError(f"{where} must be {wanted}, got {type(value).__name__}")


def check_choice(value: object, allowed: Sequence[str], where: str) -> None:
    """Raise ValueError unless the value is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"{where} must be one of {words}, got {value!r}")


def check_integer(value: object, least: int, where: str, why: str = "") -> int:
    """Return an integer, NumPy's too, as an int; TypeError for others, ValueError below least."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{where} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{where} must be >= {least}, got {value}{why}")
    return int(value)
