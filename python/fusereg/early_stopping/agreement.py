"""One decision for all ranks: the metric is reduced, rank 0 decides and broadcasts the decision.

A rank's error travels with its metric, so that all ranks raise, and none waits for one that has
raised already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch.distributed as dist

from .checkpoint import CheckpointError
from .smoothing import mean

Agreement: TypeAlias = Literal["mean", "min", "max", "rank0", "none"]

#: The name of an exception's type, and its text.
Problem: TypeAlias = tuple[str, str]
_KINDS: tuple[type[Exception], ...] = (CheckpointError, TypeError, ValueError, RuntimeError)

T = TypeVar("T")


class Ranks:
    """The ranks that decide together; arguments as EarlyStopping's."""

    def __init__(self, agreement: Agreement, group: Any) -> None:
        self.agreement = agreement
        self._group = group

    def count(self) -> int:
        """Return the number of ranks; it may change, as a process group may be made later."""
        if self.agreement == "none" or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._group)

    def index(self) -> int:
        """Return this rank's number in the group."""
        return dist.get_rank(self._group) if self.count() > 1 else 0

    def gather(self, mine: T) -> list[T]:
        """Collect one object from each rank, in the order of ranks, on every rank."""
        if self.count() == 1:
            return [mine]
        found: list[Any] = [None] * self.count()
        dist.all_gather_object(found, mine, self._group)
        return cast(list[T], found)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call the function on rank 0 and return its result on every rank."""
        if self.count() == 1:
            return make()
        held = [make() if self.index() == 0 else None]
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        dist.broadcast_object_list(held, source, self._group)
        return cast(T, held[0])

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


def describe(problem: Exception | None) -> Problem | None:
    """Turn an exception into plain data, as not every exception can be pickled."""
    if problem is None:
        return None
    for kind in _KINDS[:-1]:
        if isinstance(problem, kind):
            return kind.__name__, str(problem)
    return "RuntimeError", f"{type(problem).__name__}: {problem}"


def raise_first(problems: Sequence[Problem | None], own: Exception | None) -> None:
    """Raise this rank's exception, or else that of the first rank that has one."""
    if own is not None:
        raise own
    for rank, problem in enumerate(problems):
        if problem is not None:
            kind = next(kind for kind in _KINDS if kind.__name__ == problem[0])
            raise kind(f"{problem[1]} (on rank {rank} of {len(problems)})")
