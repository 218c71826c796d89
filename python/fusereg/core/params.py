"""Lists of parameters, and keys that select parts of a model."""

from __future__ import annotations

import fnmatch
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = Tensor | Iterable[Tensor] | torch.nn.Module
#: What selects parts of a model: a name pattern, or a type of modules.
Key: TypeAlias = str | type[torch.nn.Module]


def is_key(key: object) -> bool:
    """Return whether this can select parts of a model."""
    return isinstance(key, str) or (isinstance(key, type) and issubclass(key, torch.nn.Module))


def matches(key: Key, name: str, module: torch.nn.Module) -> bool:
    """Return whether a key selects a module or parameter of this name, in or at this module."""
    if isinstance(key, type):
        return isinstance(module, key)
    return fnmatch.fnmatchcase(name, key)


def as_list(params: Params, op: str) -> list[Tensor]:
    """Return the tensors of a tensor, an iterable of tensors, or a module, unchecked."""
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
    found = list(params)
    if not found and isinstance(params, Iterator):
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals.get("__name__", "").startswith("fusereg."):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"fusereg.{op}: the parameters are a generator without elements, exhausted by an "
            "earlier loop perhaps",
            stacklevel=level,
        )
    if found and not isinstance(found[0], Tensor):
        hint = "; pass parameters(), not named_parameters()" if type(found[0]) is tuple else ""
        raise TypeError(
            f"fusereg.{op}: params[0] must be a torch.Tensor, got {type(found[0]).__name__}{hint}"
        )
    return found


def output_dim(module: torch.nn.Module) -> int:
    """Return the dimension of a layer's weight whose indices are its outputs, as a rule the first.

    The weights of transposed convolutions, and of the Conv1D of transformers (GPT-2), begin with
    the inputs. Where a transposed convolution has groups, no dimension has one index for each
    output, and the first, that of its inputs, is taken.
    """
    if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
        return 1 if module.groups == 1 else 0
    conv1d = ("transformers.pytorch_utils", "Conv1D")
    return int(any((c.__module__, c.__name__) == conv1d for c in type(module).__mro__))


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Return the indices of the tensors on each device, devices in order of appearance."""
    groups: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault(t.device, []).append(i)
    return groups
