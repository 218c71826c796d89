"""Ids of samples and epochs: the keys of all random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..core import dispatch
from ..core.layer import Layer
from .arguments import integer
from .params import sample_id_tensor

_EPOCHS = 2**32


def check_epoch(epoch: object, op: str) -> int:
    """Check that an epoch is an integer from 0 to 2^32 - 1."""
    value = integer(epoch, op, "epoch")
    if not 0 <= value < _EPOCHS:
        raise ValueError(f"fusereg.{op}: epoch must be within [0, 2^32), got {value}")
    return value


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


class SeededModule(Layer):
    """Base of the modules whose random numbers are keyed by (seed, epoch, sample id, operation).

    Without ``sample_ids`` the samples of successive calls are numbered consecutively; the count is
    part of the ``state_dict``. In a DataLoader's worker it starts from a number derived from the
    worker's seed, so that workers differ, and their epochs.

    The epoch is in shared memory: :meth:`set_epoch` reaches a DataLoader's workers, including
    persistent ones, as soon as the loader is iterated again.
    """

    _op = "augment"

    def __init__(self, seed: object) -> None:
        super().__init__()
        self.seed = integer(seed, self._op, "seed")
        self._shared_epoch = _shared(torch.zeros((), dtype=torch.int64))
        self._count = 0
        self._worker: int | None = None

    @property
    def epoch(self) -> int:
        """The epoch of calls that are given none."""
        return int(self._shared_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the following calls."""
        self._shared_epoch.fill_(check_epoch(epoch, f"{self._op}.set_epoch"))

    def get_extra_state(self) -> dict[str, int]:
        """Return epoch and count, for ``state_dict``."""
        return {"epoch": self.epoch, "count": self._count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Set the epoch and count of a ``state_dict``."""
        self._shared_epoch.fill_(int(state["epoch"]))
        self._count = int(state["count"])

    @dispatch.outside_graphs
    def _ids_and_epoch(
        self, sample_ids: Tensor | Sequence[int] | None, n: int, epoch: int | None
    ) -> tuple[Tensor, int]:
        """Return ids of n samples and the epoch: as given, or the next ids and the set epoch."""
        epoch = self.epoch if epoch is None else check_epoch(epoch, self._op)
        if sample_ids is not None:
            return sample_id_tensor(sample_ids, n, self._op), epoch
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker:
            self._worker = worker.seed
            # Multiplying by the golden ratio spreads neighboring seeds over 2^62.
            self._count = worker.seed * 0x9E3779B97F4A7C15 % 2**62
        first, self._count = self._count, self._count + n
        return torch.arange(first, first + n), epoch

    def __deepcopy__(self, memo: dict[int, Any]) -> SeededModule:
        """Return a copy whose epoch is in shared memory of its own."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        # torch copies a shared tensor to memory that is not.
        copied._shared_epoch = _shared(copied._shared_epoch)
        return copied
