"""Schedules of the strengths of an optimizer's penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.hints import explains
from ..penalty.strengths import factor_at
from ..penalty.weight_penalty import innermost

__all__ = ["StrengthScheduler"]

Factor = Callable[[int], float]


@explains("fusereg.optim.StrengthScheduler")
class StrengthScheduler:
    r"""Multiply an optimizer's strengths by a function of the step.

    .. math:: l_1(t) = l_1(0) \cdot factor(t)

    and so for the other names, as ``torch.optim.lr_scheduler.LambdaLR`` does for the learning rate:
    the strengths of step 0 are set at once, and :meth:`step`, after each ``optimizer.step()``, sets
    those of the next. A strength that is a tensor is written in place, so that a captured CUDA
    graph follows it.

    Args:
        optimizer: an optimizer of :mod:`fusereg.optim`, or a wrapper such as Accelerate's around
            one.
        factor: returns a factor, finite and not negative, for a number of steps; or a sequence of
            such functions, one per param group.
        names: which strengths are scheduled.

    A param group that joins later is scheduled from the next :meth:`step` on.

    Raises:
        TypeError: ``optimizer`` has no penalty, or ``factor`` is not callable.
        ValueError: a name is unknown, there are not as many functions as param groups, or a factor
            is negative or not finite.

    Example:
        >>> optimizer = fusereg.optim.AdamW(model.parameters(), lr=1e-3, l1=1e-4)
        >>> warm_up = fusereg.optim.StrengthScheduler(optimizer, lambda t: min(1.0, t / 1000))
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        ...     warm_up.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Factor | Sequence[Factor],
        *,
        names: Iterable[str] = ("l1", "l2", "group"),
    ) -> None:
        optimizer = innermost(optimizer, _WHERE, "one of fusereg.optim")
        groups = optimizer.param_groups
        self._names = (names,) if isinstance(names, str) else tuple(names)
        for name in self._names:
            if name not in ("l1", "l2", "group"):
                raise ValueError(f"{_WHERE}: names must be among l1, l2, group, got {name!r}")
            if any(name not in g for g in groups):
                raise TypeError(
                    f"{_WHERE}: {type(optimizer).__name__} of {type(optimizer).__module__} has no "
                    f"{name}; take an optimizer of fusereg.optim"
                )
        factors = list(factor) if isinstance(factor, Sequence) else [factor]
        if not all(callable(f) for f in factors):
            raise TypeError(f"{_WHERE}: factor must be callable, got {factor!r}")
        if isinstance(factor, Sequence) and len(factors) != len(groups):
            raise ValueError(
                f"{_WHERE}: factor must be one function or {len(groups)} of them (one per param "
                f"group), got {len(factors)}"
            )
        self.optimizer = optimizer
        self.steps = 0
        self._factors = factors
        self._base: list[dict[str, float]] = []
        self._apply()

    def step(self) -> None:
        """Set the strengths of the next step."""
        self.steps += 1
        self._apply()

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self._base) :]:
            self._base.append({name: float(group[name]) for name in self._names})
        factors = [factor_at(factor, self.steps, f"{_WHERE}: factor") for factor in self._factors]
        for i, (group, base) in enumerate(zip(groups, self._base, strict=True)):
            factor = factors[min(i, len(factors) - 1)]
            for name, strength in base.items():
                present = group[name]
                if isinstance(present, Tensor):
                    present.fill_(strength * factor)
                else:
                    group[name] = strength * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the strengths that the factors multiply."""
        return {"steps": self.steps, "strengths": [dict(base) for base in self._base]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, and set the optimizer's strengths by it.

        Raises:
            ValueError: it is of an optimizer with other param groups, or of other names.
        """
        strengths = [dict(base) for base in state["strengths"]]
        if [list(s) for s in strengths] != [list(base) for base in self._base]:
            raise ValueError(
                f"{_WHERE}: the state has {len(strengths)} param groups with "
                f"{[list(s) for s in strengths]}, this optimizer {len(self._base)} with "
                f"{[list(base) for base in self._base]}"
            )
        self.steps, self._base = int(state["steps"]), strengths
        self._apply()


_WHERE = "fusereg.optim.StrengthScheduler"
