"""Philox states (seed, offset), drawn from torch's own generators.

So ``torch.manual_seed`` and a ``generator`` reproduce. Each call gets a state of its own, and draws
from Philox4x32 under the key ``seed`` at the counters of that offset.

CPU
    two 63-bit numbers from the generator (torch's CPU stream is a Mersenne twister, so nothing is
    shared).
CUDA
    the generator's seed and its present offset, which then moves on by 4 as for any kernel of
    torch's that takes 4 numbers a thread: no launch and no synchronization, and no two calls,
    fusereg's or torch's, at the same counters. (Torch has no way to read and move the offset at
    once: where a thread draws from a generator by fusereg while another draws from it by torch, two
    calls may meet.) While a CUDA graph is captured these numbers cannot be asked for: a state is
    drawn on the device, anew with each replay, and the kernels read it.
Compiler, torch.func, modes
    a state from ``torch.randint``, which all of them know how to treat; on the CPU the numbers that
    the generator would give without them.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C
from . import memory
from .checks import check_strided, is_integer

#: (seed, offset), or (an int64 tensor that holds both where the kernel can read them, 0).
State: TypeAlias = tuple[int | Tensor, int]


class Source(NamedTuple):
    """Source of a Philox state: a seed, a generator, or neither."""

    seed: int | Tensor | None = None
    generator: torch.Generator | None = None


#: What a call takes of a CUDA generator's offset: one step of Philox's counter.
_OFFSET_STEP = 4

_cuda_lock = threading.Lock()
_of_thread = threading.local()


def _numbers() -> Tensor:
    """Return memory for two numbers, of which each thread has its own."""
    # A tensor made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        numbers = torch.empty(2, dtype=torch.int64, device="cpu")
        # A tensor that only its Python object owns has torch take the GIL at each use that makes
        # another owner, three times a draw. A view is one that stays.
        _of_thread.view = numbers.view(2)
    return numbers


def _cuda_state(device: torch.device, generator: torch.Generator | None) -> State:
    if memory.capturing(device):
        return device_state(device, generator), 0
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    with _cuda_lock:
        offset = generator.get_offset()
        generator.set_offset(offset + _OFFSET_STEP)
        return generator.initial_seed(), offset


def new_state(x: Tensor, generator: torch.Generator | None = None) -> State:
    """Return a new state for x from a generator, by default torch's of its device."""
    if not x.is_cpu:
        return _cuda_state(x.device, generator)
    return _C.random_state(generator)


_C.bind_random(_numbers, new_state)


def check_bits(seed: int, op: str) -> int:
    """Return a seed; raise unless it fits 64 bits, with or without a sign."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"fusereg.{op}: seed must have at most 64 bits, got {seed}")
    return seed


def check_seed(seed: object, device: torch.device, op: str) -> None:
    """Raise unless ``seed`` is an integer, or a state in a tensor on the device."""
    if is_integer(seed):
        if type(seed) is int:  # and no symbol of the compiler's
            check_bits(seed, op)
        return
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"fusereg.{op}: seed must be an integer or an int64 tensor (seed, offset), "
            f"got {type(seed).__name__}"
        )
    check_strided(seed, op, "seed")
    if seed.dtype is not torch.int64 or seed.shape != (2,) or seed.device != device:
        raise ValueError(
            f"fusereg.{op}: seed must be an integer or an int64 tensor of shape (2,) on {device}, "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )


def check_source(device: torch.device, source: Source, op: str) -> None:
    """Raise unless seed and generator fit the device and exclude each other."""
    seed, generator = source
    if seed is not None:
        check_seed(seed, device, op)
        if generator is not None:
            raise ValueError(f"fusereg.{op}: seed and generator exclude each other")
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"fusereg.{op}: generator must be a torch.Generator, got {type(generator).__name__}"
        )
    elif generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"fusereg.{op}: generator must be for {device.type}, got one for {generator.device}"
        )


def eager_state(x: Tensor, source: Source, op: str) -> State:
    """Return this call's state; nothing but the generator changes."""
    seed, generator = source
    if seed is not None or generator is not None:
        check_source(x.device, source, op)
    if seed is None:
        return new_state(x, generator)
    if isinstance(seed, Tensor):
        return seed.detach().clone(), 0  # backward reads it again, whatever becomes of the caller's
    return seed, 0


def device_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return a new state as a tensor on the device."""
    state = torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )
    # The 63 bits that random_() takes of the same random number.
    return state & (2**63 - 1) if device.type == "cpu" else state


def traced_state(x: Tensor, source: Source, op: str) -> Tensor:
    """Return this call's state as a tensor, by operations that compilers and transforms see."""
    device = x.device
    check_source(device, source, op)
    seed, generator = source
    if isinstance(seed, Tensor):
        return seed
    if seed is not None:
        return pair(int(seed), 0, device)
    return device_state(device, generator)


def pair(seed: int, offset: int, device: torch.device) -> Tensor:
    """Return the state as a tensor on the device."""
    return memory.numbers((signed(seed), signed(offset)), torch.int64, device)


def as_tensor(state: State, device: torch.device) -> Tensor:
    """Return a state as a tensor, as operators of torch.library take it."""
    seed, offset = state
    return seed if isinstance(seed, Tensor) else pair(seed, offset, device)


def signed(number: int) -> int:
    """Return the int64 with the low 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63
