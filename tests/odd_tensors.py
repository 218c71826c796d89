"""A zoo of tensors: some to be read right in spite of their layout, some that cannot be read.

Each entry makes its tensor on a given device. Weights are small multiples of 1/4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Maker = Callable[[torch.device], Tensor]


def quarters(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randint(-8, 9, shape) / 4
    first = t.view(-1)[:3]
    first[first == 0] = 0.75  # zeros are wanted, but not alone
    return t.to(device, dtype)


def parameter(*shape: int, device: torch.device, grad: bool = True) -> nn.Parameter:
    p = nn.Parameter(quarters(*shape, device=device))
    if grad:
        p.grad = quarters(*shape, device=device)
    return p


def memory(t: Tensor) -> Tensor:
    """A copy of all that the tensor's storage holds, or nothing if it has none."""
    if t.layout is not torch.strided or t._is_zerotensor():
        return torch.empty(0, dtype=torch.uint8)
    plain = t.detach().as_subclass(Tensor)
    whole = torch.empty(0, dtype=plain.dtype, device=plain.device)
    return whole.set_(plain.untyped_storage()).clone().view(torch.uint8)


def state(t: Tensor) -> tuple[Any, ...]:
    version = None if t.is_inference() else t._version
    grad = None if not t.is_leaf or t.grad is None else (id(t.grad), *state(t.grad))
    return version, memory(t).tolist(), grad


@contextmanager
def nothing_changes(*tensors: Tensor) -> Iterator[None]:
    before = [state(t) for t in tensors]
    yield
    assert [state(t) for t in tensors] == before


# --- readable ---


class WithFunction(Tensor):
    pass


class WithoutFunction(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class ParameterSubclass(nn.Parameter):
    pass


def imaginary_part(*shape: int, device: torch.device) -> Tensor:
    z = torch.complex(quarters(*shape, device=device), quarters(*shape, device=device))
    view = z.conj().imag
    assert view.is_neg()
    return view


def inference_tensor(device: torch.device) -> Tensor:
    with torch.inference_mode():
        return quarters(3, 5, device=device).clone()


def shifted(offset: int, dtype: torch.dtype = torch.float32) -> Maker:
    return lambda d: quarters(64, device=d, dtype=dtype)[offset : offset + 50]


#: Each is given its device; all can be read and written in place.
LAYOUTS: dict[str, Maker] = {
    "imaginary part of a conjugate": lambda d: imaginary_part(7, device=d),
    "one imaginary part": lambda d: imaginary_part(1, device=d),
    "negated view": lambda d: torch._neg_view(quarters(3, 5, device=d)),
    "slice of a negated view": lambda d: torch._neg_view(quarters(9, device=d))[1:8:3],
    "real part": lambda d: torch.complex(quarters(6, device=d), quarters(6, device=d)).real,
    "slice at 1": shifted(1),
    "slice at 3": shifted(3),
    "bfloat16 slice at 7": shifted(7, torch.bfloat16),
    "float16 slice at 1": shifted(1, torch.float16),
    "float64 slice at 1": shifted(1, torch.float64),
    "every third": lambda d: quarters(100, device=d)[2::3],
    "columns": lambda d: quarters(6, 7, device=d)[:, 1:4],
    "transposed": lambda d: quarters(4, 9, device=d).t(),
    "permuted": lambda d: quarters(2, 3, 4, device=d).permute(2, 0, 1),
    "channels_last": lambda d: quarters(2, 3, 4, 5, device=d).to(memory_format=torch.channels_last),
    "odd strides of size 1": lambda d: quarters(40, device=d).as_strided((1, 5, 1), (17, 1, 33), 3),
    "size 1, strided": lambda d: quarters(40, device=d).as_strided((1, 5), (0, 3), 1),
    "0-d": lambda d: quarters(3, device=d)[1],
    "no elements": lambda d: quarters(0, device=d),
    "no rows": lambda d: quarters(0, 3, device=d),
    "no columns": lambda d: quarters(3, 0, device=d),
    "inference": inference_tensor,
    "subclass": lambda d: quarters(3, 5, device=d).as_subclass(WithFunction),
    "subclass without __torch_function__": lambda d: quarters(3, 5, device=d).as_subclass(
        WithoutFunction
    ),
    "strided subclass": lambda d: quarters(3, 8, device=d).as_subclass(WithFunction)[:, ::2],
    "subclass of Parameter": lambda d: ParameterSubclass(quarters(3, 5, device=d)),
    "buffer": lambda d: nn.Buffer(quarters(3, 5, device=d)),
}

#: These can be read, but not written.
OVERLAPPING: dict[str, Maker] = {
    "expanded": lambda d: quarters(3, 1, device=d).expand(3, 5),
    "expanded from 0-d": lambda d: quarters(1, device=d)[0].expand(4),
    "sliding windows": lambda d: quarters(9, device=d).unfold(0, 3, 1),
}


def values_of(t: Tensor) -> Tensor:
    """The tensor's values as an ordinary tensor of their own."""
    return t.detach().as_subclass(Tensor).resolve_neg().clone()


def as_leaf(t: Tensor) -> Tensor:
    """A leaf over the same memory, with the same type and layout."""
    return t if isinstance(t, nn.Parameter) else t.detach().requires_grad_()


def around(t: Tensor) -> list[list[int]]:
    """The bytes of the tensor's storage that are none of its own elements."""
    elements = memory(t).view(-1, t.element_size())
    mine = torch.arange(len(elements)).as_strided(t.size(), t.stride(), t.storage_offset())
    keep = torch.ones(len(elements), dtype=torch.bool)
    keep[mine.flatten()] = False
    rest: list[list[int]] = elements[keep.to(t.device)].tolist()
    return rest


# --- unreadable ---


class Wrapper(Tensor):
    """Has no memory of its own, as quantized and distributed tensors have none."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inner = [a.inner if isinstance(a, Wrapper) else a for a in args]
        out = func(*inner, **(kwargs or {}))
        return cls(out) if isinstance(out, Tensor) else out


def fake(*shape: int) -> Maker:
    def make(device: torch.device) -> Tensor:
        with FakeTensorMode():
            return torch.empty(shape, device=device)

    return make


def freed(device: torch.device) -> Tensor:
    t = quarters(6, device=device)
    t.untyped_storage().resize_(0)
    return t


def leaked_from(transform: Callable[..., Any]) -> Maker:
    def make(device: torch.device) -> Tensor:
        leaked: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            leaked.append(x)
            return x.clone()

        transform(keep)(quarters(2, 3, device=device))
        return leaked[0]

    return make


def on_cpu(make: Callable[[], Tensor]) -> Maker:
    def check(device: torch.device) -> Tensor:
        if device.type != "cpu":
            pytest.skip("a CPU tensor by nature")
        return make()

    return check


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def nested(layout: torch.layout) -> Maker:
    def make(d: torch.device) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [quarters(2, device=d), quarters(3, device=d)]
            return torch.nested.nested_tensor(parts, layout=layout)

    return make


def of_dtype(dtype: torch.dtype, n: int = 3) -> Maker:
    return lambda d: torch.ones(n, device=d).to(dtype)


NO_MEMORY = "(memory|storage|wrapper)"
UNREADABLE: dict[str, tuple[Maker, str]] = {
    "complex": (of_dtype(torch.complex64), "complex"),
    "conjugate": (lambda d: torch.ones(3, dtype=torch.complex64, device=d).conj(), "complex"),
    "int64": (of_dtype(torch.int64), "torch.int64"),
    "int8": (of_dtype(torch.int8), "torch.int8"),
    "bool": (of_dtype(torch.bool), "torch.bool"),
    "float8_e4m3fn": (of_dtype(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "float8_e5m2": (of_dtype(torch.float8_e5m2), "torch.float8_e5m2"),
    "int32, empty": (of_dtype(torch.int32, 0), "torch.int32"),
    "fake": (fake(3), NO_MEMORY),
    "fake, empty": (fake(0), NO_MEMORY),
    "meta": (lambda d: torch.empty(3, device="meta"), "meta"),
    "sparse COO": (lambda d: torch.eye(3, device=d).to_sparse(), "sparse_coo"),
    "sparse CSR": (lambda d: torch.eye(3, device=d).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (on_cpu(lambda: torch.ones(3, 3).to_mkldnn()), "mkldnn"),
    "nested, strided": (nested(torch.strided), "nested"),
    "nested, jagged": (nested(torch.jagged), "nested"),
    "quantized": (on_cpu(quantized), "torch.qint8"),
    "freed": (freed, NO_MEMORY),
    "zero tensor": (lambda d: torch._efficientzerotensor((3,), device=d), NO_MEMORY),
    "wrapper subclass": (lambda d: Wrapper(quarters(3, device=d)), NO_MEMORY),
    "leaked from vmap": (leaked_from(torch.vmap), NO_MEMORY),
    "leaked from functionalize": (leaked_from(torch.func.functionalize), NO_MEMORY),
    "lazy": (lambda d: nn.UninitializedParameter(device=d), "uninitialized"),
}
