"""Ids of samples, their occurrences, epochs and ranks: the keys of all random numbers."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..core import dispatch
from ..core.layer import Layer
from ..core.random import check_bits
from .arguments import integer
from .params import AugmentParams, draw, sample_id_tensor
from .steps import Values

_EPOCHS = 2**32
#: An odd number whose multiples are spread over 2^64: the golden ratio's.
_GOLDEN = 0x9E3779B97F4A7C15
#: Held where threads count samples, or seed the process's generators.
ONE_AT_A_TIME = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child does not have the thread that may have held it
    os.register_at_fork(after_in_child=ONE_AT_A_TIME._at_fork_reinit)  # type: ignore[attr-defined]


def check_epoch(epoch: object, op: str) -> int:
    """Check that an epoch is an integer from 0 to 2^32 - 1."""
    value = integer(epoch, op, "epoch")
    if not 0 <= value < _EPOCHS:
        raise ValueError(f"fusereg.{op}: epoch must be within [0, 2^32), got {value}")
    return value


def mix_bits(*values: int) -> int:
    """Return 64 bits, signed, that depend on each of the integers (splitmix64's finalizer)."""
    bits = 0
    for value in values:
        bits = (bits + value + 1) * _GOLDEN % 2**64
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        bits ^= bits >> 31
    return bits - 2**64 if bits >= 2**63 else bits


def rank() -> int:
    """Return this process's number among those that train together, 0 where it is alone.

    Before there is a process group, it is that of torchrun.
    """
    found = _group_rank()
    if found is None:
        alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
        found = 0 if alone else int(os.environ.get("RANK", "0"))
    return found


def _group_rank() -> int | None:
    dist = sys.modules.get("torch.distributed")
    grouped = dist is not None and dist.is_available() and dist.is_initialized()
    return dist.get_rank() if dist is not None and grouped else None


@dataclass(slots=True)
class Keys:
    """The values that the random numbers of a batch are a function of.

    Attributes:
        ids: [N] int64: the samples' ids, as given.
        drawn: [N] int64: the ids that numbers are drawn by, others where a sample occurs again.
        seed: of the transform, and of the process where it has none of its own.
        epoch: of the call.
    """

    ids: Tensor
    drawn: Tensor
    seed: int
    epoch: int

    def __getitem__(self, index: slice) -> Keys:
        """Return the keys of some samples."""
        ids = self.ids[index]
        drawn = ids if self.drawn is self.ids else self.drawn[index]
        return Keys(ids, drawn, self.seed, self.epoch)

    def draw(
        self, steps: Sequence[Values], size: tuple[int, int] | list[tuple[int, int]], op: str
    ) -> AugmentParams:
        """Draw the parameters of the samples."""
        params = draw(steps, self.drawn, size, self.seed, self.epoch, op)
        return params if self.drawn is self.ids else replace(params, sample_ids=self.ids)

    def of_place(self, place: int) -> Tensor:
        """Return [N] int64: seeds for torch's generator in a transform at this place of a list."""
        ids = self.drawn.tolist()
        return torch.tensor(
            [mix_bits(self.seed, self.epoch, i, place) for i in ids],
            dtype=torch.int64,
            device="cpu",
        )


def _occurrences(ids: list[int]) -> list[int]:
    """Return how often each id occurs before it in the list."""
    seen: dict[int, int] = {}
    result = []
    for i in ids:
        result.append(seen.get(i, 0))
        seen[i] = result[-1] + 1
    return result


def _shared(tensor: Tensor) -> Tensor:
    """Move a tensor to memory shared with worker processes, where the machine has any."""
    try:
        tensor.share_memory_()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"fusereg.augment: no shared memory ({error}): set_epoch will not reach the persistent "
            "workers of a DataLoader",
            stacklevel=4,
        )
    return tensor


#: Places in the shared memory: the epoch, how often it was set, the base seed of the DataLoader
#: that was first iterated since, and whether a forgotten set_epoch has been warned of.
_EPOCH, _TIMES_SET, _LOADER, _WARNED = range(4)


class SeededModule(Layer):
    """Base of the modules whose random numbers are keyed by (seed, epoch, sample id, operation).

    ``seed`` None draws a seed from torch's generator: ``torch.manual_seed`` before the module is
    made reproduces it, two modules differ, and so do the ranks of a distributed run, even if all
    were seeded alike. An integer gives a sample the same numbers on every rank.

    An id that occurs again in a call draws anew, by its occurrence, as it does in an epoch of
    :class:`fusereg.augment.WithIds`; ``view=`` names the occurrence, and ``view=0`` for all gives
    equal ids equal numbers.

    Without ``sample_ids`` the samples of successive calls are numbered consecutively, from a number
    of the rank's own; the count is part of the ``state_dict``. In a DataLoader's worker it starts
    from a number derived from the worker's seed, so that workers differ, and their epochs.

    The epoch is in shared memory: :meth:`set_epoch` reaches a DataLoader's workers, including
    persistent ones, as soon as the loader is iterated again. If samples come back in an epoch that
    was not set anew, one warning says so.
    """

    _op = "augment"

    def __init__(self, seed: object) -> None:
        super().__init__()
        self._own_seed = seed is None
        self.seed = (
            int(torch.randint(2**63 - 1, (), device="cpu"))
            if seed is None
            else check_bits(integer(seed, self._op, "seed"), self._op)
        )
        self._shared = _shared(torch.zeros(4, dtype=torch.int64, device="cpu"))
        self._count = 0
        self._worker: int | None = None
        self._rank = rank()
        self._first: set[int] = set()  # the ids of the first call since set_epoch,
        self._between = False  # and whether others have come since
        self._calls_set = 0
        self._counts: dict[int, int] = {}
        self._counted = 0
        self._counts_of: tuple[int, int, int] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of calls that are given none."""
        return self._shared.tolist()[_EPOCH]  # type: ignore[no-any-return]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the following calls."""
        self._shared[_EPOCH] = check_epoch(epoch, f"{self._op}.set_epoch")
        self._shared[_TIMES_SET] += 1
        self._shared[_LOADER] = 0

    def get_extra_state(self) -> dict[str, int]:
        """Return epoch and count, for ``state_dict``, and the seed where it was not given."""
        state = {"epoch": self.epoch, "count": self._count}
        return {**state, "seed": self.seed} if self._own_seed else state

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Set what a ``state_dict`` holds."""
        self._shared[_EPOCH] = int(state["epoch"])
        self._shared[_TIMES_SET] += 1
        self._count = int(state["count"])
        if self._own_seed:
            self.seed = int(state.get("seed", self.seed))

    @dispatch.outside_graphs
    def _keys(
        self,
        n: int,
        sample_ids: Tensor | Sequence[int] | None,
        epoch: int | None,
        view: int | Sequence[int] | Tensor | None,
    ) -> Keys:
        """Return the keys of n samples: of ids and epoch as given, or the next ids, set epoch."""
        worker = get_worker_info()
        self._rank = _group_rank() or self._rank
        seed = self.seed
        if self._own_seed and self._rank:
            seed = mix_bits(seed, self._rank)
        chosen = self.epoch if epoch is None else check_epoch(epoch, self._op)
        if sample_ids is None:
            if view is not None:
                raise ValueError(f"fusereg.{self._op}: view is of samples, give sample_ids as well")
            if worker is not None and worker.seed != self._worker:
                self._worker = worker.seed
                self._count = worker.seed * _GOLDEN % 2**62
            with ONE_AT_A_TIME:
                first, self._count = self._count, self._count + n
            first += self._rank * _GOLDEN % 2**62
            ids = torch.arange(first, first + n, device="cpu")
            return Keys(ids, ids, seed, chosen)
        ids = sample_id_tensor(sample_ids, n, self._op)
        values = ids.tolist()
        if view is None:
            views = _occurrences(values) if len(set(values)) < n else []
            if epoch is None:
                self._notice(values)
        elif isinstance(view, int) and not isinstance(view, bool):
            views = [view] * n
        else:
            views = sample_id_tensor(view, n, self._op, "view").tolist()
        if not any(views):
            return Keys(ids, ids, seed, chosen)
        if min(views) < 0:
            raise ValueError(f"fusereg.{self._op}: view must not be negative, got {min(views)}")
        drawn = [mix_bits(i, v) if v else i for i, v in zip(values, views, strict=True)]
        return Keys(ids, torch.tensor(drawn, dtype=torch.int64, device="cpu"), seed, chosen)

    def _notice(self, ids: list[int]) -> None:
        """Warn once if ids come back in calls of an epoch that was not set anew."""
        times = self._shared.tolist()[_TIMES_SET]
        if not self._first or times != self._calls_set:
            self._first, self._between, self._calls_set = set(ids), False, times
        elif self._first.isdisjoint(ids):
            self._between = True
        elif self._between:
            self._warn_of_epoch("sample ids of an earlier call get the same random numbers again")

    def _warn_of_epoch(self, what: str) -> None:
        if self._shared[_WARNED]:
            return
        self._shared[_WARNED] = 1
        warnings.warn(
            f"fusereg.{self._op}: {what} in epoch {self.epoch}: call set_epoch(epoch) at the start "
            "of each epoch. Samples that occur several times in an epoch are told apart by view=, "
            "and in a DataLoader by sampler=WithIds.sampler(sampler)",
            stacklevel=4,
        )

    def _occurrences_in_epoch(
        self, ids: list[int], views: list[int | None], total: int
    ) -> list[int]:
        """Return the occurrence of each sample that a loader brings, counted over the epoch.

        ``views`` are those that the loader's sampler has counted, which are right whichever worker
        has the sample; ``total`` is the size of the dataset.
        """
        worker = get_worker_info()
        workers, base = (1, 0) if worker is None else (worker.num_workers, worker.seed - worker.id)
        of = (self.epoch, int(self._shared[_TIMES_SET]), base)
        if of != self._counts_of:
            self._counts_of, self._counts, self._counted = of, {}, 0
        if base:
            if not self._shared[_LOADER]:
                self._shared[_LOADER] = base
            elif int(self._shared[_LOADER]) != base:
                self._warn_of_epoch("a DataLoader that is iterated again gets the same numbers")
        before, self._counted = self._counted, self._counted + len(ids)
        if None in views and before * workers >= total + (workers - 1) * len(ids):
            self._warn_of_epoch("there are more samples than the dataset has")
        result = []
        for i, view in zip(ids, views, strict=True):
            times = self._counts.get(i, 0)
            if view is None:
                view = times
                if view and workers > 1:
                    self._warn_of_epoch(f"sample {i} comes again to one of several workers")
            elif view < times:
                self._warn_of_epoch(f"occurrence {view} of sample {i} has come again")
            self._counts[i] = view + 1
            result.append(view)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a pickle, with the rank for a worker that is spawned."""
        self._rank = rank() or self._rank
        return self.__dict__.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> SeededModule:
        """Return a copy whose epoch is in shared memory of its own."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        # torch copies a shared tensor to memory that is not.
        copied._shared = _shared(copied._shared)
        return copied
