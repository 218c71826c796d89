"""Lists of parameters: what callers may pass, what kernels take, and what errors say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import _C

Params: TypeAlias = Tensor | Iterable[Tensor] | torch.nn.Module
Strength: TypeAlias = float | Sequence[float]

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(
            f"fusereg.{op}: {name} is expanded: several of its elements are one in memory; "
            "clone() it before writing in place"
        )


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device, devices in order of appearance."""
    groups: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault(t.device, []).append(i)
    return groups


def select(strength: Strength, indices: Sequence[int]) -> Strength:
    return [strength[i] for i in indices] if isinstance(strength, Sequence) else strength


def as_floats(strength: Strength, count: int, op: str, name: str) -> list[float]:
    """One float for each tensor; the kernels' own check, for what does not reach them directly."""
    if isinstance(strength, Sequence):
        values = [float(s) for s in strength]
        if len(values) != count:
            raise ValueError(
                f"fusereg.{op}: {name} must be one number or {count} of them (one per tensor), "
                f"got {len(values)}"
            )
    else:
        values = [float(strength)] * count
    for v in values:
        if not 0.0 <= v < float("inf"):
            raise ValueError(f"fusereg.{op}: {name} must be finite and not negative, got {v}")
    return values


def scaled(strength: Strength, factor: float) -> Strength:
    if factor == 1.0:
        return strength
    if isinstance(strength, Sequence):
        return [factor * s for s in strength]
    return factor * strength


def normalize_strength(strength: object, op: str, name: str) -> Strength:
    """Accepts numbers, 0-d and 1-d tensors and arrays, and sequences of numbers."""
    if isinstance(strength, float):
        return strength
    if isinstance(strength, Tensor):
        strength = strength.tolist()
    elif not isinstance(strength, Sequence) and hasattr(strength, "tolist"):
        strength = strength.tolist()  # NumPy
    if isinstance(strength, (int, float)):
        return float(strength)
    if isinstance(strength, Sequence) and not isinstance(strength, str):
        return strength
    raise TypeError(
        f"fusereg.{op}: {name} must be a number or a sequence of numbers (one per tensor), "
        f"got {type(strength).__name__}"
    )
