"""Memory that kernels keep between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .. import _C

_Memory = TypeVar("_Memory")
#: Memory that kernels work in, for each purpose and stream: those of two streams may run at once.
_kept: dict[tuple[object, int, int], Any] = {}


def _of_stream(
    purpose: object,
    device: torch.device,
    make: Callable[[], _Memory],
    fits: Callable[[_Memory], bool] = lambda _: True,
) -> _Memory:
    """Return memory that ``make`` allocates, kept for the current stream while it fits.

    While a CUDA graph is being captured it is a fresh one, which belongs to the graph's own memory.
    """
    index, handle = -1, 0  # of CUDA kernels that run on the host
    if device.type != "cpu":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(device)
        index, handle = stream.device.index, stream.cuda_stream
    key = (purpose, index, handle)
    found: _Memory | None = _kept.get(key)
    if found is None or not fits(found):
        with torch.inference_mode(False):
            found = _kept[key] = make()
    return found


def _without_kernels(device: torch.device) -> bool:
    """Return whether no CUDA kernel runs on this device, so that no memory is needed."""
    return device.type == "cpu" and not _C.CUDA_ON_HOST


def workspace(device: torch.device, size: int = _C.PENALTY_WORKSPACE_BYTES) -> torch.Tensor | None:
    """Return ``size`` zeroed bytes, which CUDA reductions leave zeroed; None on the CPU."""
    if _without_kernels(device):
        return None
    return _of_stream(
        size, device, lambda: torch.zeros(size // 8, dtype=torch.float64, device=device)
    )


def barrier(device: torch.device) -> torch.Tensor | None:
    """Return the counter at which the blocks of a cooperative launch meet; None on the CPU."""
    if _without_kernels(device):
        return None
    return _of_stream("barrier", device, lambda: torch.zeros(1, dtype=torch.int32, device=device))


def scratch(device: torch.device, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return scratch of at least ``size`` bytes, and zeroed semaphores; None for CPU kernels."""
    if _without_kernels(device):
        return None, None
    # Whole kilobytes, at least what small shapes want, so that few sizes are ever asked for.
    size = max(64 * 1024, -(-size // 1024) * 1024)
    return _of_stream(
        "scratch",
        device,
        lambda: (
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.zeros(_C.BATCH_NORM_SEMAPHORE_BYTES, dtype=torch.uint8, device=device),
        ),
        lambda found: found[0].numel() >= size,
    )


def _table_memory(device: int, size: int) -> torch.Tensor:
    where = torch.device("cpu") if _C.CUDA_ON_HOST else torch.device("cuda", device)
    return torch.empty(size, dtype=torch.uint8, device=where)


def launch_tables() -> _C._LaunchTables:
    """Return memory for the tables of CUDA launches over long lists of tensors.

    The memory is made when a list first wants it, and belongs to the owner. The addresses in it are
    written again only when they have changed.
    """
    return _C.launch_tables(_table_memory)
