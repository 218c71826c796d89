"""Where (seed, offset) pairs come from: torch's own generators.

So ``torch.manual_seed`` and a ``generator`` reproduce.

Each call gets a pair of its own, and draws from Philox under the key ``seed`` at counters of that
offset.

CPU
    two 63-bit numbers from the generator (torch's CPU stream is a Mersenne twister, so nothing is
    shared).
CUDA
    the generator's seed and its present offset, which then moves on by 4 as for any kernel of
    torch's that takes 4 numbers a thread: no launch and no synchronization, and no two calls,
    fusereg's or torch's, at the same counters. While a CUDA graph is captured these numbers cannot
    be asked for: a pair is drawn on the device, anew with each replay, and the kernels read it.
Compiler, functorch, modes
    a pair from ``torch.randint``, which all of them know how to treat.
"""

from __future__ import annotations

import threading
from typing import TypeAlias

import torch
from torch import Tensor

#: (seed, offset), or (an int64 tensor that holds both where the kernel can read them, 0).
Pair: TypeAlias = tuple[int | Tensor, int]

#: What a call takes of a CUDA generator's offset: one step of Philox's counter.
_OFFSET_STEP = 4

_local = threading.local()
_cuda_lock = threading.Lock()


def _cpu_pair(generator: torch.Generator | None) -> Pair:
    numbers: Tensor | None = getattr(_local, "numbers", None)
    if numbers is None:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            numbers = _local.numbers = torch.empty(2, dtype=torch.int64)
    filled = numbers.random_() if generator is None else numbers.random_(generator=generator)
    seed, offset = filled.tolist()
    return seed, offset


def _cuda_pair(device: torch.device, generator: torch.Generator | None) -> Pair:
    if torch.cuda.is_current_stream_capturing():
        return device_pair(device, generator), 0
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    with _cuda_lock:
        offset = generator.get_offset()
        generator.set_offset(offset + _OFFSET_STEP)
        return generator.initial_seed(), offset


def new_pair(x: Tensor) -> Pair:
    """A pair for x from torch's default generator of its device."""
    return _cpu_pair(None) if x.is_cpu else _cuda_pair(x.device, None)


def check_seed(seed: object, device: torch.device, op: str) -> None:
    """Raises unless ``seed`` is an integer or a pair in a tensor on the device."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"fusereg.{op}: seed must be an integer or an int64 tensor (seed, offset), "
            f"got {type(seed).__name__}"
        )
    if seed.dtype is not torch.int64 or seed.shape != (2,) or seed.device != device:
        raise ValueError(
            f"fusereg.{op}: seed must be an integer or an int64 tensor of shape (2,) on {device}, "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )


def _check(device: torch.device, seed: object, generator: torch.Generator | None, op: str) -> None:
    if seed is not None:
        check_seed(seed, device, op)
        if generator is not None:
            raise ValueError(f"fusereg.{op}: seed and generator exclude each other")
    elif generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"fusereg.{op}: generator must be for {device.type}, got one for {generator.device}"
        )


def eager_pair(
    device: torch.device, seed: int | Tensor | None, generator: torch.Generator | None, op: str
) -> Pair:
    """This call's pair; nothing but the generator changes."""
    if seed is not None or generator is not None:
        _check(device, seed, generator, op)
    if isinstance(seed, Tensor):
        return seed.detach().clone(), 0  # backward reads it again, whatever becomes of the caller's
    if seed is not None:
        return seed, 0
    return _cuda_pair(device, generator) if device.type == "cuda" else _cpu_pair(generator)


def device_pair(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )


def operator_pair(
    device: torch.device, seed: int | Tensor | None, generator: torch.Generator | None, op: str
) -> Tensor:
    """This call's pair as a tensor, by operations that compilers and transforms see."""
    _check(device, seed, generator, op)
    if isinstance(seed, Tensor):
        return seed
    if seed is not None:
        return torch.tensor([signed(seed), 0], dtype=torch.int64, device=device)
    return device_pair(device, generator)


def signed(number: int) -> int:
    """The int64 with the low 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63
