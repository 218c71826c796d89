"""A penalty's gradient at every step of an optimizer, whoever calls the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .weight_penalty import WeightPenalty


class AttachedPenalty:
    """Adds a penalty's gradient before each step of an optimizer, until :meth:`remove`.

    Made by :meth:`fusereg.WeightPenalty.attach`, which says when it does what.

    Attributes:
        value: the penalty at the last step, of those parameters that are the optimizer's: a 0-d
            tensor on their device; None as long as nothing was added.
    """

    def __init__(
        self, penalty: WeightPenalty, optimizer: torch.optim.Optimizer, count_steps: bool
    ) -> None:
        self.value: Tensor | None = None
        self._penalty = penalty
        self._count_steps = count_steps
        inner = innermost(optimizer)
        self._handles = (
            inner.register_step_pre_hook(self._before),
            inner.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Ends it; calling this again does nothing."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if given is None:
            self._add(optimizer)
            return None
        # The gradients are those that the closure computes, perhaps several times in one step.
        closure = self._around(optimizer, given)
        if len(args) > 1:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    def _around(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        def with_penalty() -> Any:
            loss = closure()
            if not self._add(optimizer) or loss is None or self.value is None:
                return loss
            value = self.value
            return loss + (value.to(loss.device) if isinstance(loss, Tensor) else float(value))

        return with_penalty

    def _add(self, optimizer: Any) -> bool:
        scale = getattr(optimizer, "grad_scale", None)
        added = add_for(self._penalty, optimizer, scale)
        if added is not None:
            self.value = added
        return added is not None

    def _after(self, *_: Any) -> None:
        if self._count_steps:
            self._penalty.step()


def add_for(penalty: WeightPenalty, optimizer: Any, grad_scale: Tensor | None) -> Tensor | None:
    """Adds the gradient for the optimizer's parameters; None if none of them has a gradient.

    A step without any gradient is one that was skipped: the penalty alone must not make it one.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None for p in own):
        return None
    return penalty.add_grad_(grad_scale=grad_scale, only=own)


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside wrappers such as Accelerate's, which steps that one."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "fusereg.WeightPenalty.attach: optimizer must be a torch.optim.Optimizer, "
            f"got {type(optimizer).__name__}"
        )
    return optimizer
