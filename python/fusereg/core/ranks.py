"""Messages between ranks, with which an error on one of them is raised on all.

A rank's error travels with its data, so that none waits for one that has raised already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch.distributed as dist

from .files import CheckpointError

#: The name of an exception's type, and its text.
Problem: TypeAlias = tuple[str, str]
_KINDS: tuple[type[Exception], ...] = (CheckpointError, TypeError, ValueError, RuntimeError)

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        group: the process group; None: all ranks.
        alone: whether this process acts by itself although there are others.
    """

    def __init__(self, group: Any, alone: bool = False) -> None:
        self._group = group
        self._alone = alone

    @property
    def group(self) -> Any:
        """The process group; None: all ranks."""
        return self._group

    def count(self) -> int:
        """Return the number of ranks; it may change, as a process group may be made later."""
        if self._alone or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._group)

    def unsettled(self) -> bool:
        """Return whether the launcher has started several processes and no group exists yet."""
        started = os.environ.get("WORLD_SIZE", "1")
        return not self._alone and self.count() == 1 and started.isdecimal() and int(started) > 1

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

    def together(self, work: Callable[[], T]) -> T:
        """Call a function on every rank and return its result; an error on one is raised on all."""
        own, result = attempt(work)
        raise_first(self.gather(describe(own)), own)
        return cast(T, result)


def attempt(work: Callable[[], T]) -> tuple[Exception | None, T | None]:
    """Return the error of a function, or its result."""
    try:
        return None, work()
    except Exception as problem:
        return problem, None


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
