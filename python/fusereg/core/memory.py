"""Memory of devices: what kernels keep between calls, and what is copied from the host.

Nothing here waits for a device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from .. import _C
from . import dispatch

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
        index = _index(device)
        stream = _C.working_stream(index)
        if stream is None:
            return make()
        handle = stream
    key = (purpose, index, handle)
    found: _Memory | None = _kept.get(key)
    if found is None or not fits(found):
        found = _kept[key] = _outside_pools(device, make)
    return found


def _index(device: torch.device) -> int:
    """Return the device's number: of tensors' devices it is given."""
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index


def _outside_pools(device: torch.device, make: Callable[[], _Memory]) -> _Memory:
    """Return what ``make`` returns, on the current stream but out of this thread's memory pools.

    While CUDA graphs of torch.compile are prepared (``mode="reduce-overhead"``), what a thread
    allocates comes from their memory, which they use anew: they allow nobody to keep any. Pools are
    those of a thread, so this is done in another.
    """
    if device.type != "cuda":
        with torch.inference_mode(False):
            return make()
    stream = torch.cuda.current_stream(device)
    made: list[_Memory] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                made.append(make())
        except BaseException as error:  # for the caller
            failed.append(error)

    thread = threading.Thread(target=work, name="fusereg memory")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured on the device's current stream."""
    return device.type == "cuda" and _C.working_stream(_index(device)) is None


def to_device(
    tensor: torch.Tensor, device: torch.device, op: str, what: str = "parameters"
) -> torch.Tensor:
    """Copy to a device through pinned memory, without waiting for it.

    While a CUDA graph is captured this is refused: each replay would copy whatever lies in that
    memory by then.
    """
    if tensor.device == device:
        return tensor
    if device.type != "cuda" or not tensor.is_cpu or not dispatch.eager():
        return tensor.to(device)
    if capturing(device):
        raise RuntimeError(
            f"fusereg.{op}: its {what} are on the CPU, and a CUDA graph that is captured would "
            "not copy them anew"
            + (f"; pass them as tensors on {device}" if what == "parameters" else "")
        )
    return tensor.pin_memory().to(device, non_blocking=True)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of a few numbers: filled, since a copy from the host would be waited for."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])


_Constants = tuple[torch.Tensor, ...]
#: Constants on devices, by key and device, and then by the stream that they are for: what one
#: stream frees another could still be reading. Those that were used last are last.
_constants: OrderedDict[tuple[Hashable, int], dict[int, _Constants]] = OrderedDict()
#: Those whose addresses CUDA graphs have: never freed.
_in_graphs: dict[tuple[Hashable, int], _Constants] = {}
_MOST_CONSTANTS = 256
_constants_lock = threading.Lock()


def constants(
    key: Hashable, device: torch.device, make: Callable[[], _Constants], op: str
) -> _Constants:
    """Return what ``make`` makes on the CPU, on the device; the same at each call with this key.

    A CUDA graph reads what was made by a call before it was captured.
    """
    if device.type != "cuda":
        return tuple(t.to(device) for t in make())
    where = (key, _index(device))
    if found := _in_graphs.get(where):
        return found
    stream = _C.working_stream(_index(device))
    with _constants_lock:
        of_streams = _constants.get(where)
        if of_streams is not None:
            _constants.move_to_end(where)
            if stream is None:
                found = _in_graphs[where] = next(iter(of_streams.values()))
                return found
            if found := of_streams.get(stream):
                return found
    if stream is None:
        raise RuntimeError(
            f"fusereg.{op}: while a CUDA graph is captured no new tables can be copied to the "
            "device; call it once with these sizes before the capture (a warm-up does)"
        )
    made = _outside_pools(device, lambda: tuple(to_device(t, device, op) for t in make()))
    with _constants_lock:
        _constants.setdefault(where, {})[stream] = made
        while len(_constants) > _MOST_CONSTANTS:
            _constants.popitem(last=False)
    return made


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
    return _outside_pools(where, lambda: torch.empty(size, dtype=torch.uint8, device=where))


def launch_tables() -> _C._LaunchTables:
    """Return memory for the tables of CUDA launches over long lists of tensors.

    The memory is made when a list first wants it, and belongs to the owner. The addresses in it are
    written again only when they have changed.
    """
    return _C.launch_tables(_table_memory)
