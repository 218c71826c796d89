"""Strengths of a penalty, and checks of the parameters and strengths that callers pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from .. import _C
from ..core import checks, dispatch
from ..core import params as _params

Strength: TypeAlias = float | Sequence[float]

#: The default of a strength: equal to 0, but not the 0 that a caller passes.
UNSET = float("0.0")


class Strengths(NamedTuple):
    """Strengths, each one number or one per tensor, and the dimension whose indices are the groups.

    The order is that of the kernels' arguments.
    """

    l1: Strength = 0.0
    l2: Strength = 0.0
    group: Strength = 0.0
    dim: int = 0

    @staticmethod
    def of(l1: Sequence[float], l2: Sequence[float], group: Sequence[float], dim: int) -> Strengths:
        """Return the strengths that operators got: a list of one number is for all tensors."""
        return Strengths(
            l1[0] if len(l1) == 1 else l1,
            l2[0] if len(l2) == 1 else l2,
            group[0] if len(group) == 1 else group,
            dim,
        )

    def arguments(self) -> tuple[list[float], list[float], list[float], int]:
        """Return the strengths as operators take them."""
        l1, l2, group, dim = self
        return (
            [l1] if isinstance(l1, float) else list(map(float, l1)),
            [l2] if isinstance(l2, float) else list(map(float, l2)),
            [group] if isinstance(group, float) else list(map(float, group)),
            dim,
        )

    def each(self, count: int) -> Iterator[tuple[float, float, float, int]]:
        """Yield the strengths of each of ``count`` tensors, and the dimension."""
        l1, l2, group = [[x] * count if isinstance(x, float) else x for x in self[:3]]
        return zip(l1, l2, group, [self.dim] * count, strict=True)

    def select(self, indices: Sequence[int]) -> Strengths:
        """Return the strengths of some of the tensors."""
        chosen = [x if isinstance(x, float) else [x[i] for i in indices] for x in self[:3]]
        return Strengths._make((*chosen, self.dim))


NO_PENALTY = Strengths()


class Listed(NamedTuple):
    """Distinct tensors and their strengths; ``direct``: whether kernels may be called on them."""

    tensors: list[Tensor]
    strengths: Strengths
    direct: bool

    def with_l2_times(self, factor: float) -> Listed:
        """Return the same with another l2."""
        l1, l2, group, dim = self.strengths
        l2 = factor * l2 if isinstance(l2, float) else [factor * x for x in l2]
        return Listed(self.tensors, Strengths(l1, l2, group, dim), self.direct)


def collect(op: str, params: _params.Params, s: Strengths, name: str | None = None) -> Listed:
    """Return the distinct tensors and their checked strengths.

    ``name`` is what the caller calls the strength that it passed; None: l1, l2 and group.
    """
    tensors = _params.as_list(params, op)
    checked: list[Strength] = []
    for strength, own in zip(s[:3], Strengths._fields[:3], strict=True):
        if type(strength) is not float or not 0.0 <= strength <= sys.float_info.max:
            strength = _check(strength, len(tensors), f"fusereg.{op}: {name or own}")
        checked.append(strength)
    s = Strengths._make((*checked, s.dim))
    direct = dispatch.eager()
    if direct:
        direct, repeated = _C.scan(tensors)
    else:  # compiled code cannot be traced through the compiled module
        seen: dict[int, int] = {}
        repeated = [i for i, t in enumerate(tensors) if seen.setdefault(id(t), i) != i]
    if repeated:
        tensors, s = _without_repeats(op, tensors, s, set(repeated))
    return Listed(tensors, s, direct)


def listed(tensors: list[Tensor], s: Strengths) -> Listed:
    """Return distinct tensors with strengths that have been checked."""
    return Listed(tensors, s, dispatch.eager() and _C.scan(tensors)[0])


def check_dim(op: str, dim: object, name: str = "dim") -> int:
    """Raise if the dimension of the groups is not an integer."""
    if not isinstance(dim, int):
        raise TypeError(f"fusereg.{op}: {name} must be an int, got {type(dim).__name__}")
    return dim


def dimension_of(tensor: Tensor, dim: int, where: str, name: str) -> int:
    """Return a dimension of a tensor, not negative; raise if it has none such. A number has one."""
    rank = max(tensor.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(
            f"{where} must be a dimension of {name}, whose shape is {tuple(tensor.shape)}, "
            f"got {dim}"
        )
    return dim % rank


def check_number(number: object, where: str, wanted: str = "a number") -> float:
    """Return a finite number >= 0 as a float; raise for anything else."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{where} must be {wanted}, got {type(number).__name__}")
    return _finite(number, where)


def factor_at(schedule: Callable[[int], object], steps: int, where: str) -> float:
    """Return a schedule's factor at a step; raise unless it is a finite number >= 0."""
    made = schedule(steps)
    if not (isinstance(made, (int, float)) and 0.0 <= made < math.inf):
        where = f"{where}({steps})"  # not before: torch.compile cannot format a step of its own
        made = _finite(checks.as_number(made, where), where)
    return float(made)


def _check(strength: object, count: int, where: str) -> Strength:
    """Raise if this is not a number >= 0, or a sequence, tensor or array of ``count`` such."""
    if isinstance(strength, Tensor) or (
        hasattr(strength, "tolist") and not isinstance(strength, Sequence)
    ):
        checks.check_constant(strength, where)
        try:
            strength = strength.tolist()
        except RuntimeError as error:  # torch's, of a tensor that has no strides
            raise ValueError(f"{where} must be numbers in a dense tensor: {error}") from error
    if isinstance(strength, (int, float)):
        return _finite(strength, where)
    if not isinstance(strength, Sequence) or isinstance(strength, (str, bytes)):
        raise TypeError(
            f"{where} must be a number or a sequence of numbers (one per tensor), "
            f"got {type(strength).__name__}"
        )
    for i, x in enumerate(strength):
        if not isinstance(x, (int, float)):
            raise TypeError(f"{where}[{i}] must be a number, got {type(x).__name__}")
        _finite(x, f"{where}[{i}]")
    if len(strength) != count:
        raise ValueError(
            f"{where} must be one number or {count} of them (one per tensor), got {len(strength)}"
        )
    return strength


def _finite(strength: float, where: str) -> float:
    if 0.0 <= strength <= sys.float_info.max:  # compares integers of any size
        return float(strength)
    raise ValueError(f"{where} must be finite and not negative, got {strength}")


def _without_repeats(
    op: str, tensors: list[Tensor], s: Strengths, repeated: set[int]
) -> tuple[list[Tensor], Strengths]:
    """Drop repeated tensors: each counts once, as tied parameters do in a module."""
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    for strength in s[:3]:
        if isinstance(strength, Sequence):
            for i in sorted(repeated):
                j = first[id(tensors[i])]
                if strength[i] != strength[j]:
                    raise ValueError(
                        f"fusereg.{op}: params[{j}] and params[{i}] are one tensor, "
                        f"but their strengths differ ({strength[j]} and {strength[i]})"
                    )
    kept = [i for i in range(len(tensors)) if i not in repeated]
    return [tensors[i] for i in kept], s.select(kept)
