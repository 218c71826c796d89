"""Lists of parameters: what callers may pass, what kernels take, and what errors say."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import _C, _dispatch

Params: TypeAlias = Tensor | Iterable[Tensor] | torch.nn.Module
Strength: TypeAlias = float | Sequence[float]
#: What picks parts of a model: a name pattern, or a type of modules.
Key: TypeAlias = str | type[torch.nn.Module]

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_key(key: object) -> bool:
    return isinstance(key, str) or (isinstance(key, type) and issubclass(key, torch.nn.Module))


def matches(key: Key, name: str, module: torch.nn.Module) -> bool:
    """Whether a key picks what has this name and is, or is held by, this module."""
    if isinstance(key, type):
        return isinstance(module, key)
    return fnmatch.fnmatchcase(name, key)


def as_list(params: Params, op: str) -> list[Tensor]:
    """The tensors of a tensor, an iterable of tensors, or a module; not checked one by one yet."""
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, torch.nn.Module):
        return list(params.parameters())
    if isinstance(params, (str, bytes, dict)) or not isinstance(params, Iterable):
        raise TypeError(
            f"fusereg.{op}: params must be a Tensor, an iterable of Tensors or a Module, "
            f"got {type(params).__name__}"
            + (" (pass its values())" if isinstance(params, dict) else "")
        )
    return list(params)


def without_repeats(
    tensors: list[Tensor], strengths: tuple[Strength, ...], repeated: Sequence[int], op: str
) -> tuple[list[Tensor], tuple[Strength, ...]]:
    """A tensor that is listed more than once counts once, as tied parameters do in a module."""
    if not repeated:
        return tensors, strengths
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    for s in strengths:
        if isinstance(s, Sequence):
            for i in repeated:
                j = first[id(tensors[i])]
                if i < len(s) and s[i] != s[j]:
                    raise ValueError(
                        f"fusereg.{op}: params[{j}] and params[{i}] are one tensor, "
                        f"but their strengths differ ({s[j]} and {s[i]})"
                    )
    drop = set(repeated)
    keep = [i for i in range(len(tensors)) if i not in drop]
    kept = tuple(
        [s[i] for i in keep] if isinstance(s, Sequence) and len(s) == len(tensors) else s
        for s in strengths
    )
    return [tensors[i] for i in keep], kept


def check(tensor: object, op: str, name: str) -> None:
    """Raises, with the tensor's name and what is wrong, if kernels can never take it."""
    where = f"fusereg.{op}: {name}"
    if not isinstance(tensor, Tensor):
        hint = "; pass parameters(), not named_parameters()" if isinstance(tensor, tuple) else ""
        raise TypeError(f"{where} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
    if not torch.compiler.is_compiling() and torch.nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{where} is an uninitialized parameter of a lazy module; call the module once first"
        )
    if _dispatch.escaped_wrapper(tensor):
        raise ValueError(
            f"{where} is a wrapper that has left its torch.func transform; it has no memory to read"
        )
    if tensor.is_nested:
        raise ValueError(f"{where} is a nested tensor; pass its components (unbind())")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{where} is sparse or not strided ({tensor.layout}); densify it first")
    if tensor.is_complex():
        raise ValueError(
            f"{where} is complex ({tensor.dtype}); pass torch.view_as_real(tensor) if its real and "
            "imaginary parts are to be penalized each on its own"
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{where} has dtype {tensor.dtype}; wanted float64, float32, float16 or bfloat16"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{where} is on device '{tensor.device}'; wanted cpu or cuda")
    if tensor.device.type == "cuda":
        _check_cuda(where)


def _check_cuda(where: str) -> None:
    if torch.version.hip is not None:
        raise ValueError(f"{where} is on a ROCm device; fusereg's kernels run on CPU and CUDA")
    if _C.build_info()["cuda"] is None:
        raise RuntimeError(
            f"{where} is on a CUDA device, but this build of fusereg has no CUDA kernels; "
            "build it where nvcc is on PATH, or with -Ccmake.define.FUSEREG_CUDA=ON"
        )


def plain(tensor: Tensor, op: str, name: str) -> Tensor:
    """A plain tensor over the same memory; over a copy only where its sign is still pending."""
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
    """The tensor itself if its elements lie without gaps or overlaps, else a contiguous copy."""
    return tensor if _C.inspect(tensor)[1] else tensor.contiguous()


def check_writable(tensor: Tensor, op: str, name: str) -> None:
    """Raises if an element of it would be written more than once."""
    if not _elements_apart(tensor):
        raise ValueError(
            f"fusereg.{op}: {name} has several elements that are one in memory (it is expanded, or "
            "windows of it overlap); clone() it before writing in place"
        )


def _elements_apart(tensor: Tensor) -> bool:
    """Each stride reaches beyond all that the smaller ones span.

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
    """Raises if two of the tensors, which are about to be written, have an element in common.

    ``name`` has a ``{}`` for the index.
    """
    extents = []
    for i, t in enumerate(tensors):
        if t is not None and t.numel() > 0:
            start = t.data_ptr()
            reach = sum((n - 1) * s for s, n in zip(t.stride(), t.shape, strict=True)) + 1
            extents.append((start, start + reach * t.element_size(), i))
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


def _share_an_element(a: Tensor, b: Tensor) -> bool:
    """Exactly, by marking the elements of both; only asked of views whose extents overlap."""
    start = min(a.data_ptr(), b.data_ptr())

    def addresses(t: Tensor) -> Tensor:
        at = torch.tensor(t.data_ptr() - start)
        for stride, size in zip(t.stride(), t.shape, strict=True):
            at = at.unsqueeze(-1) + torch.arange(size) * (stride * t.element_size())
        return at.flatten()

    return bool(torch.isin(addresses(a), addresses(b)).any())


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device, devices in order of appearance."""
    groups: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault(t.device, []).append(i)
    return groups


def select(strength: Strength, indices: Sequence[int]) -> Strength:
    return [strength[i] for i in indices] if isinstance(strength, Sequence) else strength


def as_floats(strength: Strength, count: int) -> list[float]:
    """One float for each tensor, of a strength that has been checked."""
    if isinstance(strength, Sequence):
        return [float(s) for s in strength]
    return [float(strength)] * count


def check_strength(strength: object, count: int, op: str, name: str) -> Strength:
    """A number >= 0, or one for each of ``count`` tensors.

    It may come as a number, a sequence, a tensor or an array; ``name`` is what the caller calls it.
    """
    where = f"fusereg.{op}: {name}"
    if isinstance(strength, Tensor) or (
        hasattr(strength, "tolist") and not isinstance(strength, Sequence)
    ):
        strength = strength.tolist()
    if isinstance(strength, (int, float)):
        return _finite(strength, where)
    if not isinstance(strength, Sequence) or isinstance(strength, (str, bytes)):
        raise TypeError(
            f"{where} must be a number or a sequence of numbers (one per tensor), "
            f"got {type(strength).__name__}"
        )
    for i, s in enumerate(strength):
        if not isinstance(s, (int, float)):
            raise TypeError(f"{where}[{i}] must be a number, got {type(s).__name__}")
        _finite(s, f"{where}[{i}]")
    if len(strength) != count:
        raise ValueError(
            f"{where} must be one number or {count} of them (one per tensor), got {len(strength)}"
        )
    return strength


def check_dim(dim: object, op: str) -> int:
    if not isinstance(dim, int):
        raise TypeError(f"fusereg.{op}: dim must be an int, got {type(dim).__name__}")
    return dim


def _finite(strength: float, where: str) -> float:
    if 0.0 <= strength <= sys.float_info.max:  # compares integers of any size
        return float(strength)
    raise ValueError(f"{where} must be finite and not negative, got {strength}")


def scaled(strength: Strength, factor: float) -> Strength:
    if isinstance(strength, Sequence):
        return [factor * s for s in strength]
    return factor * strength
