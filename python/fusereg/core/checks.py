"""Checks of arguments that all rooms share, and the messages they raise."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .. import _C
from . import dispatch

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(tensor: object, op: str, name: str, meta: bool = False) -> None:
    """Raise, with the tensor's name and what is wrong, if no kernel supports it.

    ``meta``: whether it may be a meta tensor, of which operators infer shapes.
    """
    where = f"fusereg.{op}: {name}"
    if not isinstance(tensor, Tensor):
        hint = "; pass parameters(), not named_parameters()" if type(tensor) is tuple else ""
        raise TypeError(f"{where} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
    if not torch.compiler.is_compiling() and torch.nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{where} is an uninitialized parameter of a lazy module; call the module once first"
        )
    if dispatch.escaped_wrapper(tensor):
        raise ValueError(
            f"{where} is a wrapper that has left its torch.func transform; it has no memory to read"
        )
    if tensor.is_nested:
        raise ValueError(f"{where} is a nested tensor; pass its components (unbind())")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{where} is sparse or not strided ({tensor.layout}); densify it first")
    if tensor.is_complex():
        raise ValueError(
            f"{where} is complex ({tensor.dtype}), which no kernel takes; pass "
            "torch.view_as_real(tensor) if its real and imaginary parts are numbers of their own"
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{where} has dtype {tensor.dtype}; wanted float64, float32, float16 or bfloat16"
        )
    if tensor.device.type not in ("cpu", "cuda") and not (meta and tensor.is_meta):
        raise ValueError(f"{where} is on device '{tensor.device}'; wanted cpu or cuda")
    if tensor.device.type == "cuda":
        _check_cuda(where)


def _check_cuda(where: str) -> None:
    if torch.version.hip is not None:
        raise ValueError(f"{where} is on a ROCm device; fusereg's kernels run on CPU and CUDA")
    if _C.build_info()["cuda"] is None:
        raise RuntimeError(
            f"{where} is on a CUDA device, but this build of fusereg has no CUDA kernels; "
            "build it where nvcc is on PATH, or with --config-settings=cmake.define.FUSEREG_CUDA=ON"
        )


def plain(tensor: Tensor, op: str, name: str) -> Tensor:
    """Return a tensor of type Tensor over the same memory; a copy where its sign is pending."""
    check(tensor, op, name)
    tensor = tensor.detach().resolve_neg()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    kind, _ = _C.inspect(tensor)
    if kind != 0:
        raise ValueError(
            f"fusereg.{op}: {name} has no memory that a kernel can read "
            f"(a fake tensor, a freed storage or a wrapper?): {type(tensor).__name__} "
            f"of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it has neither gaps nor overlaps, else a contiguous copy."""
    return tensor if _C.inspect(tensor)[1] else tensor.contiguous()


def check_writable(tensor: Tensor, op: str, name: str) -> None:
    """Raise if an element of the tensor would be written more than once."""
    if not _elements_apart(tensor):
        raise ValueError(
            f"fusereg.{op}: {name} has several elements at one place in memory (it is expanded, or "
            "windows of it overlap); clone() it before writing in place"
        )


def _elements_apart(tensor: Tensor) -> bool:
    """Return whether each stride reaches beyond all that the smaller ones span.

    Exotic strides may fail this without sharing an element; they are refused as well.
    """
    if tensor.numel() == 0:
        return True
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < span:
                return False
            span += (size - 1) * stride
    return True


def check_apart(tensors: Sequence[Tensor | None], op: str, name: str) -> None:
    """Raise if two of the tensors, which are about to be written, share an element.

    ``name`` has a ``{}`` for the index.
    """
    extents = []
    for i, t in enumerate(tensors):
        if t is not None and t.numel() > 0:
            extents.append((*_extent(t), i))
    extents.sort()
    open_extents: list[tuple[int, int, int]] = []
    for start, end, i in extents:
        open_extents = [e for e in open_extents if e[1] > start]
        for _, _, j in open_extents:
            first, second = tensors[min(i, j)], tensors[max(i, j)]
            assert first is not None
            assert second is not None
            if first.device == second.device and _share_an_element(first, second):
                raise ValueError(
                    f"fusereg.{op}: {name.format(min(i, j))} and {name.format(max(i, j))} share "
                    "memory that would be written twice; pass one of them"
                )
        open_extents.append((start, end, i))


def _extent(t: Tensor) -> tuple[int, int]:
    """Return the addresses between which a tensor lies."""
    reach = sum((n - 1) * s for s, n in zip(t.stride(), t.shape, strict=True)) + 1
    return t.data_ptr(), t.data_ptr() + reach * t.element_size()


def _share_an_element(a: Tensor, b: Tensor) -> bool:
    """Return whether two views whose extents overlap share an element, by their addresses."""
    start = min(a.data_ptr(), b.data_ptr())

    def addresses(t: Tensor) -> Tensor:
        at = torch.tensor(t.data_ptr() - start, device="cpu")
        for stride, size in zip(t.stride(), t.shape, strict=True):
            steps = torch.arange(size, device="cpu") * (stride * t.element_size())
            at = at.unsqueeze(-1) + steps
        return at.flatten()

    return bool(torch.isin(addresses(a), addresses(b)).any())


def check_constant(value: object, where: str) -> None:
    """Raise for a tensor that waits for a gradient which it would never get."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{where} gets no gradient; detach() it")


def as_number(value: object, where: str) -> float:
    """Return a number as a float; raise TypeError for what is none."""
    if isinstance(value, Tensor):
        value = value.detach()  # torch warns otherwise
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{where} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # of several, or complex
        raise TypeError(f"{where} must be a number: {error}") from error


def check_mapping(value: object, where: str, wanted: str) -> None:
    """Raise unless this is a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a mapping {wanted}, got {type(value).__name__}")


def check_probability(p: object, op: str, name: str = "p") -> float:
    """Return p as a float; raise unless it is a number in [0, 1].

    A number is what torch takes for one: of Python or NumPy, or a tensor of one element.
    """
    number = p if type(p) is float else as_number(p, f"fusereg.{op}: {name}")
    check_constant(p, f"fusereg.{op}: {name}")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"fusereg.{op}: {name} must be within [0, 1], got {p}")
    return number


def check_tensor(x: object, op: str, name: str = "x") -> None:
    """Raise unless x is a tensor of whatever kind."""
    if not isinstance(x, Tensor):
        kind, hint = type(x).__name__, ""
        if kind == "Proxy":
            hint = "; torch.fx records fusereg's layers, and functions named to torch.fx.wrap"
        raise TypeError(f"fusereg.{op}: {name} must be a torch.Tensor, got {kind}{hint}")


def check_strided(x: object, op: str, name: str = "x") -> None:
    """Raise unless x is a tensor with a shape and strides, which nested and sparse ones lack."""
    check_tensor(x, op, name)
    assert isinstance(x, Tensor)
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        raise ValueError(f"fusereg.{op}: {name} must be a dense, strided tensor, got a {kind} one")


def check_input(x: object, op: str, name: str = "x") -> None:
    """Raise unless x is a tensor that kernels or operators support."""
    # Asked here first: a call more would be noticed in small tensors' time.
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
        check_strided(x, op, name)
    check(x, op, name, meta=True)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether this is an integer, and not a Boolean; compilers have symbolic ones."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_index_offset(index_offset: object, op: str) -> None:
    """Raise unless the offset is an integer and not negative."""
    if not is_integer(index_offset) or index_offset < 0:
        raise ValueError(
            f"fusereg.{op}: index_offset must be an integer and not negative, got {index_offset!r}"
        )


def check_target(
    x: Tensor,
    out: object,
    op: str,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    name: str = "x",
) -> Tensor:
    """Check that ``out`` can take a result like x, or one of this shape and dtype.

    A result like x may be written over x; one of a given shape must share no memory with it.
    """
    like_x = shape is None
    shape = tuple(x.shape) if shape is None else shape
    dtype = x.dtype if dtype is None else dtype
    check_strided(out, op, "out")
    assert isinstance(out, Tensor)
    if out.shape != shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"fusereg.{op}: out must be {dtype} of shape {tuple(shape)} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    check_writable(out, op, "out")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            f"fusereg.{op}: out= supports no gradients, and {name} or out requires one; "
            "leave out= away, or call under torch.no_grad()"
        )
    if overlap_partly(x, out, or_wholly=not like_x):
        partly = " without being the same" * like_x
        raise ValueError(f"fusereg.{op}: {name} and out overlap in memory{partly}")
    return out


def overlap_partly(x: Tensor, out: Tensor, or_wholly: bool = False) -> bool:
    """Return whether two tensors share memory; being the same only counts if ``or_wholly``."""
    if x is out:
        return or_wholly
    if not dispatch.eager() or x.numel() == 0 or x.device.type == "meta":
        return False
    (a, a_end), (b, b_end) = _extent(x), _extent(out)
    same = a == b and x.stride() == out.stride()
    return a < b_end and b < a_end and (or_wholly or not same)


def target(x: Tensor, out: object, inplace: bool, op: str, name: str = "x") -> Tensor | None:
    """Return what a result like x is written to: ``out``, x itself, or None for a new tensor."""
    if inplace and out is not None:
        raise ValueError(f"fusereg.{op}: inplace and out exclude each other")
    if inplace:
        check_in_place(x, op, name)
        return x
    return None if out is None else check_target(x, out, op, name=name)


def check_in_place(x: Tensor, op: str, name: str = "x") -> None:
    """Raise if x cannot be written in place."""
    check_writable(x, op, name)
    if not torch.is_grad_enabled():
        return
    whole = x if x._base is None else x._base
    if whole.requires_grad and whole.is_leaf:
        what = "a leaf" if whole is x else "a view of a leaf"
        raise ValueError(
            f"fusereg.{op}: {name} is {what} that requires a gradient, so it cannot be changed in "
            "place"
        )


def probability(p: float | None, keep_prob: float | None, op: str) -> float:
    """Return p, or 1 - keep_prob, or one half if neither is given."""
    if keep_prob is None:
        return check_probability(0.5 if p is None else p, op)
    if p is not None:
        raise ValueError(f"fusereg.{op}: p and keep_prob exclude each other")
    return 1.0 - check_probability(keep_prob, op, "keep_prob")


def promoted(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return the terms of a sum; under autocast in one dtype, that of torch's sum."""
    terms = (x, *others)
    dtypes = {t.dtype for t in terms if isinstance(t, Tensor)}
    if len(dtypes) < 2 or not torch.is_autocast_enabled(x.device.type):
        return terms
    common = functools.reduce(torch.promote_types, dtypes)
    return tuple(t.to(common) if isinstance(t, Tensor) else t for t in terms)


def check_like(
    x: Tensor, t: Tensor, shape: Sequence[int], op: str, name: str, wide: bool = False
) -> None:
    """Raise unless t is a tensor of this shape on x's device, and has x's dtype.

    ``wide``: or float32, if x has 16 bits.
    """
    check_strided(t, op, name)
    if t.shape != shape:
        raise ValueError(
            f"fusereg.{op}: {name} must have shape {tuple(shape)}, got {tuple(t.shape)}"
        )
    dtypes = [x.dtype]
    if wide and x.dtype in (torch.float16, torch.bfloat16):
        dtypes.append(torch.float32)
    if t.dtype not in dtypes or t.device != x.device:
        raise ValueError(
            f"fusereg.{op}: {name} must be {' or '.join(map(str, dtypes))} on {x.device} as x is, "
            f"got {t.dtype} on {t.device}"
        )
