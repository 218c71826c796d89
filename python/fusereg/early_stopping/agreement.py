"""One decision for all ranks: the metric is reduced, rank 0 decides and broadcasts the decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from ..core.ranks import Ranks
from .smoothing import mean

Agreement: TypeAlias = Literal["mean", "min", "max", "rank0", "none"]


class AgreeingRanks(Ranks):
    """The ranks that decide together; arguments as EarlyStopping's."""

    def __init__(self, agreement: Agreement, group: Any) -> None:
        super().__init__(group, alone=agreement == "none")
        self.agreement = agreement

    def reduce(self, values: Sequence[float]) -> float:
        """Reduce the ranks' values to one; a non-finite one makes the result non-finite."""
        if self.agreement == "rank0" or len(values) == 1:
            return values[0]
        for value in values:
            if not math.isfinite(value):
                return value
        if self.agreement == "mean":
            return mean(values)
        return min(values) if self.agreement == "min" else max(values)
