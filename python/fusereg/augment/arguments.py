"""Checks of arguments: each gives the value in one form, or an error that names it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeAlias

#: A number, or one for each channel.
PerChannel: TypeAlias = float | Sequence[float]
#: A number, or where to draw it from.
Interval: TypeAlias = float | Sequence[float]
Size: TypeAlias = int | Sequence[int]

INTERPOLATIONS = {"nearest": 0, "bilinear": 1, "bicubic": 2}
FILL_MODES = {"constant": 0, "border": 1, "reflect": 2, "symmetric": 3, "wrap": 4}


def number(value: object, op: str, name: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"fusereg.{op}: {name} must be a number, got {type(value).__name__}")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"fusereg.{op}: {name} must be finite, got {result}")
    return result


def integer(value: object, op: str, name: str) -> int:
    """An integer, numpy's included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"fusereg.{op}: {name} must be an integer, got {type(value).__name__}")
    return int(value)


def flag(value: object, op: str, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"fusereg.{op}: {name} must be True or False, got {type(value).__name__}")
    return value


def numbers(
    value: object, op: str, name: str, lengths: Sequence[int], wanted: str | None = None
) -> list[float]:
    """A sequence of so many finite numbers."""
    wanted = wanted or " or ".join(str(n) for n in lengths) + " numbers"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"fusereg.{op}: {name} must be {wanted}, got {type(value).__name__}")
    if len(value) not in lengths:
        raise ValueError(f"fusereg.{op}: {name} must be {wanted}, got {len(value)} of them")
    return [number(v, op, name) for v in value]


def probability(value: object, op: str, name: str) -> float:
    """Within [0, 1]."""
    p = number(value, op, name)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"fusereg.{op}: {name} must be within [0, 1], got {p}")
    return p


def interval(
    value: object,
    op: str,
    name: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> tuple[float, float]:
    """Two numbers (from, to) within [low, high], or (low, high] if ``open_low``."""
    a, b = numbers(value, op, name, (2,), "two numbers (from, to)")
    if a > b:
        raise ValueError(f"fusereg.{op}: {name} must be (from, to) with from <= to, got ({a}, {b})")
    if a < low or b > high or (open_low and a <= low):
        left = "(" if open_low else "["
        raise ValueError(
            f"fusereg.{op}: {name} must be within {left}{low:g}, {high:g}], got ({a}, {b})"
        )
    return a, b


def around(value: object, op: str, name: str, limit: float = math.inf) -> tuple[float, float]:
    """(-v, v) for a number v >= 0, or two numbers (from, to) within [-limit, limit]."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return interval(value, op, name, low=-limit, high=limit)
    v = number(value, op, name)
    if not 0.0 <= v <= limit:
        raise ValueError(
            f"fusereg.{op}: {name} as one number must be within [0, {limit:g}], got {v}"
        )
    return -v, v


def factors(value: object, op: str, name: str) -> tuple[float, float]:
    """Factors around 1: (max(0, 1 - v), 1 + v) for a number v >= 0, or (from, to); None: 1."""
    if value is None:
        return 1.0, 1.0
    if isinstance(value, Sequence) and not isinstance(value, str):
        return interval(value, op, name, low=0.0)
    v = number(value, op, name)
    if v < 0:
        raise ValueError(f"fusereg.{op}: {name} as one number must not be negative, got {v}")
    return max(0.0, 1.0 - v), 1.0 + v


def size_pair(value: object, op: str, name: str = "size") -> tuple[int, int]:
    """(height, width) of positive integers; one integer is both."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) not in (1, 2):
            raise ValueError(
                f"fusereg.{op}: {name} must be an integer or (height, width), "
                f"got {len(value)} numbers"
            )
        sides = [integer(v, op, name) for v in value]
    else:
        sides = [integer(value, op, name)]
    if min(sides) < 1:
        raise ValueError(f"fusereg.{op}: {name} must be positive, got {tuple(sides)}")
    return sides[0], sides[-1]


def per_channel(value: object, op: str, name: str) -> tuple[float, ...]:
    """One number, or one for each channel."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 0:
            raise ValueError(
                f"fusereg.{op}: {name} must be a number or one for each channel, got none"
            )
        return tuple(number(v, op, name) for v in value)
    return (number(value, op, name),)


def for_channels(values: Sequence[float], channels: int, op: str, name: str) -> list[float]:
    """As many numbers as there are channels."""
    if len(values) == 1:
        return list(values) * channels
    if len(values) != channels:
        raise ValueError(
            f"fusereg.{op}: {name} must have 1 or {channels} numbers, as the images have channels, "
            f"got {len(values)}"
        )
    return list(values)


def one_of(value: object, op: str, name: str, known: Sequence[str]) -> str:
    """One of these names."""
    if not isinstance(value, str) or value not in known:
        names = ", ".join(repr(k) for k in known)
        raise ValueError(f"fusereg.{op}: {name} must be one of {names}, got {value!r}")
    return value
