"""Lists of parameters: what callers may pass, what kernels take, and what errors say."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = Tensor | Iterable[Tensor] | torch.nn.Module
Strength: TypeAlias = float | Sequence[float]
#: What picks parts of a model: a name pattern, or a type of modules.
Key: TypeAlias = str | type[torch.nn.Module]


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
