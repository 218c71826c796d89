"""Averages over a metric's last values, which are judged in its place.

A smoothing holds settings only. Its memory is a tuple of numbers that the caller keeps, so neither
a check that fails nor a resumed run has anything to undo.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..core.checks import as_number
from ..core.hints import explains
from .checks import OP

Memory: TypeAlias = tuple[float, ...]


@explains("fusereg.early_stopping.Ema")
@dataclass(frozen=True)
class Ema:
    r"""Exponential moving average with bias correction.

    .. math:: y_t = \frac{\sum_{k=0}^{t-1} d^k x_{t-k}}{\sum_{k=0}^{t-1} d^k}

    The first value is the metric's own, as in Adam's bias correction; the average of equal values
    is exactly that value.

    Args:
        decay: d in [0, 1), the weight of the past; 0 is no smoothing.

    Raises:
        ValueError: ``decay`` is outside [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0.0 <= as_number(self.decay, f"{OP}: decay") < 1.0:
            raise ValueError(f"{OP}: decay must be in [0, 1), got {self.decay}")

    def update(self, memory: Memory, value: float) -> tuple[Memory, float]:
        """Return the memory after a finite value, and the smoothed value."""
        mean, weight = memory or (value, 0.0)
        # With S = sum of d^k x (1 - d), W = sum of d^k (1 - d): y = S/W, S' = d S + (1 - d) x and
        # W' = d W + (1 - d), so y' = (d W y + (1 - d) x) / W' = y + (1 - d)/W' * (x - y).
        weight = self.decay * weight + (1.0 - self.decay)
        mean += (1.0 - self.decay) / weight * (value - mean)
        return (mean, weight), mean


@explains("fusereg.early_stopping.Rolling")
@dataclass(frozen=True)
class Rolling:
    """Mean or median of the last values; of all so far while there are fewer.

    Args:
        window: how many checks, >= 1; 1 is no smoothing.
        statistic: ``"mean"`` or ``"median"``, which a single outlier does not move.

    Raises:
        ValueError: ``window`` is less than 1, or ``statistic`` is unknown.
    """

    window: int
    statistic: Literal["mean", "median"] = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"{OP}: window must be an integer >= 1, got {self.window!r}")
        if self.statistic not in ("mean", "median"):
            raise ValueError(f'{OP}: statistic must be "mean" or "median", got {self.statistic!r}')

    def update(self, memory: Memory, value: float) -> tuple[Memory, float]:
        """Return the memory after a finite value, and the smoothed value."""
        last = (*memory, value)[-self.window :]
        return last, statistics.median(last) if self.statistic == "median" else mean(last)


Smoothing: TypeAlias = Ema | Rolling


def mean(values: Sequence[float]) -> float:
    """Return the correctly rounded mean; equal values give exactly that value."""
    if all(value == values[0] for value in values):
        return values[0]
    return math.fsum(value / len(values) for value in values)
