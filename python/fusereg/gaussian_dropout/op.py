"""Gaussian dropout as an operation: noise that backward draws a second time."""

from __future__ import annotations

from ..core import checks
from ..core.drawn import DrawnOperator

OP = "gaussian_dropout"

noise = DrawnOperator(
    OP,
    "float p, SymInt index_offset",
)


def check_probability(p: object, op: str, name: str = "p") -> float:
    """Return p as a float; raise unless it is a number in [0, 1)."""
    number = checks.check_probability(p, op, name)
    if number == 1:
        raise ValueError(f"fusereg.{op}: p must be below 1, where the noise would be infinite")
    return number
