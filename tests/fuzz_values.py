"""Values for binding_fuzz.py: numbers at the edges, hostile objects, and every kind of tensor.

On an ordinary build, tensors end where a page begins that nobody may touch, so that a kernel that
reads or writes past the end of one dies at once; under AddressSanitizer its red zones do that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odd_tensors import LAYOUTS, OVERLAPPING, UNREADABLE

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

#: The Python objects whose calls fail with this are what they say they are: hostile.
HostileError = type("HostileError", (Exception,), {})


# --- memory ---------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None)
_PAGE = mmap.PAGESIZE


def guarded_bytes(count: int) -> Tensor:
    """`count` zero bytes that end where a page begins that cannot be touched."""
    if SANITIZED or count == 0:
        return torch.zeros(count, dtype=torch.uint8)
    pages = -(-count // _PAGE)
    memory = mmap.mmap(-1, (pages + 1) * _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(address + pages * _PAGE), ctypes.c_size_t(_PAGE), 0) != 0:
        raise OSError("mprotect failed")
    return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=pages * _PAGE - count)


def has_memory(t: Tensor) -> bool:
    """Whether an ordinary tensor has bytes that can be looked at."""
    if t.layout is not torch.strided or t.is_quantized or t.is_nested:
        return False
    try:
        storage = t.untyped_storage()
        return storage.device.type == "cpu" and storage.nbytes() > 0 and storage.data_ptr() != 0
    except RuntimeError:  # leaked from vmap and the like
        return False


def strided_copy(t: Tensor) -> Tensor:
    """A copy of a plain tensor with its strides, in memory that ends with its last element."""
    if t.device.type != "cpu":
        return t.detach().clone()
    extent = 0 if t.numel() == 0 else 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        extent += (size - 1) * stride if t.numel() else 0
    memory = guarded_bytes(extent * t.element_size()).view(t.dtype)
    if extent:
        memory.copy_(t.detach().as_strided((extent,), (1,)))
    return memory.as_strided(t.shape, t.stride())


Change = Callable[[Tensor], Tensor]


def copied(value: Any, memo: dict[int, Any], change: Change = strided_copy) -> Any:
    """Arguments of a call over new memory; what was one object, also in two places, stays one.

    `change` makes the copy of each tensor.
    """
    if id(value) in memo:
        return memo[id(value)]
    result = value
    if type(value) in (Tensor, nn.Parameter) and has_memory(value):
        result = change(value)
        if isinstance(value, nn.Parameter):
            result = nn.Parameter(result, value.requires_grad)
        elif value.requires_grad and value.is_leaf:
            result.requires_grad_()
        if value.is_leaf and value.grad is not None:
            result.grad = copied(value.grad, memo, change)
    elif type(value) in (list, tuple):
        result = type(value)(copied(v, memo, change) for v in value)
    elif type(value) is dict:
        result = {k: copied(v, memo, change) for k, v in value.items()}
    memo[id(value)] = result
    return result


def in_order(order: tuple[int, ...]) -> Change:
    """Lays tensors of so many dimensions out in this order, the last one side by side."""

    def change(t: Tensor) -> Tensor:
        if t.dim() != len(order):
            return strided_copy(t)
        back = [order.index(d) for d in range(t.dim())]
        return strided_copy(t.detach().permute(order).contiguous()).permute(back)

    return change


def resized(size: int, to: int) -> Change:
    """Cuts every dimension of this size, in all tensors alike."""

    def change(t: Tensor) -> Tensor:
        t = t.detach()
        for d in range(t.dim()):
            if t.shape[d] == size:
                t = t.narrow(d, 0, min(to, size))
        return strided_copy(t.clone())

    return change


def changed_together(rng: random.Random, args: Any) -> Any:
    """A copy of a call whose tensors lie in another order, or are smaller, all of them alike.

    A tensor that alone is changed does not fit to the others, and is refused before most of the
    code has run.
    """
    largest = max(tensors_in(args), key=Tensor.numel, default=None)
    if largest is None or not largest.dim():
        return copied(args, {})
    if rng.random() < 0.6:
        args = copied(args, {}, resized(rng.choice(largest.shape), rng.choice((0, 0, 1, 2))))
    if rng.random() < 0.5:
        order = list(range(largest.dim()))
        rng.shuffle(order)
        args = copied(args, {}, in_order(tuple(order)))
    return args


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors in an argument, gradients included."""
    if type(value) in (Tensor, nn.Parameter):
        yield value
        if value.is_leaf and value.grad is not None:
            yield from tensors_in(value.grad)
    elif type(value) in (list, tuple):
        for v in value:
            yield from tensors_in(v)
    elif type(value) is dict:
        yield from tensors_in(list(value.values()))


# --- hostile objects ------------------------------------------------------------------------------


def _raises(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise HostileError("asked a hostile object")


_ASKED = ["index", "int", "float", "bool", "len", "iter", "next", "getitem", "contains", "call"]
_ASKED += ["eq", "hash", "repr", "str", "dlpack"]
Hostile = type("Hostile", (), {f"__{name}__": _raises for name in _ASKED})
HostileInt = type("HostileInt", (int,), {f"__{n}__": _raises for n in ("index", "int", "bool")})
HostileFloat = type("HostileFloat", (float,), {f"__{n}__": _raises for n in ("float", "bool")})
HostileList = type(
    "HostileList", (list,), {f"__{n}__": _raises for n in ("len", "iter", "getitem")}
)
HostileTuple = type("HostileTuple", (tuple,), {f"__{n}__": _raises for n in ("len", "getitem")})
HostileTensor = type("HostileTensor", (Tensor,), {"__torch_function__": classmethod(_raises)})


class Pretender:
    """Says that it is a tensor of two numbers at address 8."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        return Tensor

    device = torch.device("cpu")
    dtype = torch.int64
    shape = torch.Size([2])

    def numel(self) -> int:
        return 2

    def is_contiguous(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return 8


class LyingList(list[Any]):
    """Has fewer items than it says."""

    def __len__(self) -> int:
        return super().__len__() + 1000


class Emptying:
    """A number that empties a container when it is asked for its value."""

    def __init__(self, victim: Any) -> None:
        self.victim = victim

    def __float__(self) -> float:
        self.victim.clear()
        return 0.5

    def __index__(self) -> int:
        self.victim.clear()
        return 1


class EmptyingKey(str):
    """A key that empties its dict, and whatever it is told, when it is compared."""

    victims: tuple[Any, ...] = ()

    def __hash__(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        for victim in self.victims:
            victim.clear()
        return False


def _endless() -> Iterator[float]:
    while True:
        raise HostileError("read an endless iterator")
        yield 0.5


NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 5, 7, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40),
    *(2**62, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-320, 1e-45, 1e38, 1e308, float("inf"), float("-inf")),
    *(float("nan"), True, False, None),
]

STRINGS: list[Any] = [
    "",
    "relu",
    "gelu",
    "float32",
    "bfloat16",
    "avx2",
    "x" * 70000,
    "\0",
    "\udc80",
]

OBJECTS: list[Callable[[], Any]] = [
    *(Hostile, Pretender, object, list, tuple, dict, set, lambda: b"", lambda: b"12345678"),
    *(lambda: HostileInt(3), lambda: HostileFloat(0.5), lambda: LyingList([0.5])),
    *(lambda: HostileList([0.5]), lambda: HostileTuple((0.5, 0.5)), _endless, lambda: range(3)),
    *(lambda: Tensor, lambda: torch, lambda: len, lambda: 1j, lambda: Ellipsis, lambda: [[[]]]),
    *(lambda: torch.float32, lambda: torch.device("cpu"), lambda: torch.Size([2, 3])),
    *(lambda: np.ones((2, 3), np.float32), lambda: np.float32(0.5), lambda: np.int64(3)),
    *(lambda: np.array(None), lambda: np.ones(3)[::-1], lambda: memoryview(b"1234")),
    lambda: torch.utils.dlpack.to_dlpack(torch.ones(3)),
    lambda: torch.ones(3).as_subclass(HostileTensor),
    lambda: torch.ones(3).numpy(),
    lambda: [None] * 3,
    lambda: {"step": None},
]


def hostile(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NUMBERS)
    if kind < 0.45:
        return rng.choice(STRINGS)
    if kind < 0.75:
        return rng.choice(OBJECTS)()
    return odd_tensor(rng)


def odd_tensor(rng: random.Random) -> Tensor:
    cpu = torch.device("cpu")
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(list(UNREADABLE.values()))[0](cpu)
    if kind < 0.8:
        return rng.choice(list(LAYOUTS.values()))(cpu)
    return rng.choice(list(OVERLAPPING.values()))(cpu)


# --- ordinary tensors and their relatives ---------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [
    *((), (0,), (1,), (2,), (5,), (33,), (300,), (3, 5), (1, 7), (7, 1), (4, 0), (0, 4)),
    *((2, 3, 4), (2, 3, 4, 5), (2, 1, 3, 3), (1, 8, 5, 5), (2, 2, 2, 2, 2), (3000,), (40, 65)),
]


def ordinary(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        t = torch.randn(shape).to(dtype)
    else:
        t = torch.randint(0, 2, shape).to(dtype)
    return strided_copy(t)


def _offset(t: Tensor) -> Tensor:
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    return strided_copy(flat)[1:].copy_(t.reshape(-1)).view(t.shape)


def _spread(t: Tensor) -> Tensor:
    wide = torch.zeros((*t.shape, 2), dtype=t.dtype)
    return wide[..., 0].copy_(t)


def _odd_ones(t: Tensor) -> Tensor:
    strides = [3 << 40 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


def _freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _shifted(t: Tensor) -> Tensor:
    """The same memory, one element on."""
    flat = t.reshape(-1)
    return torch.cat([flat, flat[:1]])[1:].view(t.shape) if t.numel() < 2 else flat[1:]


RELATIVES: list[Callable[[Tensor], Tensor]] = [
    *(lambda t: t[..., :-1].clone(), lambda t: t[1:].clone(), lambda t: t[:0]),
    *(lambda t: torch.cat([t, t[:1]]), lambda t: torch.cat([t, t[..., :1]], -1)),
    *(lambda t: t.mT, lambda t: t.mT.clone(), lambda t: t.flatten(), lambda t: t.unsqueeze(0)),
    *(lambda t: t.unsqueeze(-1), lambda t: t.sum(), lambda t: t.reshape(-1, 1), lambda t: t[0]),
    *(lambda t: t.double(), lambda t: t.float(), lambda t: t.half(), lambda t: t.bfloat16()),
    *(lambda t: t.long(), lambda t: t.int(), lambda t: t.bool(), lambda t: t.to(torch.uint8)),
    *(lambda t: t.to(torch.complex64), lambda t: t.to("meta"), lambda t: t.to_sparse()),
    *(_offset, _spread, _odd_ones, _freed, _shifted, lambda t: torch._neg_view(t)),
    *(lambda t: t[..., :1].expand(t.shape), lambda t: t.flatten()[:1].expand(2**40)),
    lambda t: t.reshape(-1)[:1].as_strided(t.shape, [0] * t.dim()),
    lambda t: t.flip(0).mT.contiguous().mT,
    lambda t: t.contiguous(memory_format=torch.channels_last),
    lambda t: t.clone().requires_grad_(),
    lambda t: t.clone().requires_grad_() * 1,
    lambda t: nn.Parameter(t.clone()),
    lambda t: nn.Parameter(t.clone(), requires_grad=False),
    lambda t: t.as_subclass(HostileTensor),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: torch.zeros((2**31, 2**31, 0), dtype=t.dtype),
]


def relative(rng: random.Random, t: Tensor) -> Any:
    """A tensor that differs from `t` in something; t itself where that cannot be."""
    if not has_memory(t) or t.numel() > 2**20:
        return t
    try:
        made = rng.choice(RELATIVES)(t)
        plain = type(made) is Tensor and made.layout is torch.strided and made.numel() < 2**20
        keep = rng.random() < 0.5 or not plain or made.is_leaf is False or made.requires_grad
        return made if keep else strided_copy(made)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return t
