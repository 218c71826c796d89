"""The shrink budget: the strength of a penalty that removes groups within a training.

At a network's zero the gradient of every layer is zero, so that "all zero" is stationary for every
strength, and the smallest strength at which everything is zero (glmnet's) does not exist. What a
strength removes depends on how far proximal steps shrink within the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..core import checks, distributed
from ..core.hints import explains
from ..core.params import Params, as_list
from ..penalty.strengths import check_number, dimension_of

OP = "fusereg.path"


def norms(w: Tensor, dim: int | None) -> Tensor:
    """Return the norms of a tensor's slices along ``dim``, or |w| of its elements for None."""
    w = w.detach().double()
    if dim is None or w.dim() == 0:
        return w.abs().flatten()
    return cast(Tensor, w.movedim(dim, 0).unsqueeze(-1).flatten(1).norm(dim=1))


def root_size(w: Tensor, dim: int | None) -> float:
    """Return the square root of the number of elements of each slice."""
    if dim is None or w.dim() == 0:
        return 1.0
    return math.sqrt(w.numel() / max(w.shape[dim], 1))


@explains()
def shrink_budget(
    params: Params, lr_sum: float, *, dim: int | None = 0, moved: Iterable[Tensor] | None = None
) -> float:
    r"""Return a strength of the group lasso at which a training can remove every group.

    .. math:: \lambda_{hi} = \max_g \frac{\|w_g\| + m_g}{S \sqrt{n_g}}

    Proximal steps with the threshold :math:`lr_t \lambda \sqrt{n_g}` shrink a group by at most
    :math:`\lambda \sqrt{n_g} S` during a training whose learning rates add up to S. So a group is
    removed if that exceeds its norm plus the way :math:`m_g` that the loss moves it. Moves partly
    cancel, so less is often enough: useful strengths are some 0.02 to 1 times as large. But the
    moves of a training without a penalty say little of what the loss does when it resists the
    penalty: it may take a few times as much.

    Args:
        params: a tensor, an iterable of tensors, or a module: what the penalty is on, as it is
            without a penalty. Frozen parameters count, too.
        lr_sum: S > 0: the sum of the learning rates of all steps, in which the optimizer's
            proximal steps are measured (``lr / (1 - momentum)`` for ``fusereg.optim.SGD``).
        dim: the dimension whose indices are the groups; None: each element is one (L1, where
            :math:`n_g = 1`).
        moved: of each tensor the ways :math:`m_g` of its groups. None: S times the norm of the
            group's ``.grad``, which may be the mean over some batches; 0 without one.

    Returns:
        The strength; 0.0 if all is zero and nothing moves.

    Raises:
        TypeError, ValueError: an argument is invalid, or a parameter has no dimension ``dim``.

    Example:
        >>> loss.backward()
        >>> high = fusereg.shrink_budget(model.conv.weight, lr_sum=0.1 * steps)
    """
    op = "shrink_budget"
    if not check_number(lr_sum, f"fusereg.{op}: lr_sum"):
        raise ValueError(f"fusereg.{op}: lr_sum must be positive and finite, got 0")
    tensors = as_list(params, op)
    if not tensors:
        raise ValueError(f"fusereg.{op}: params must have a tensor, got none")
    for i, w in enumerate(tensors):
        checks.check(w, op, f"params[{i}]")
        if distributed.is_dtensor(w):
            raise TypeError(f"fusereg.{op}: params[{i}] must not be sharded, got a DTensor")
        if dim is not None:
            dimension_of(w, dim, f"fusereg.{op}: dim", f"params[{i}]")
    if moved is None:
        moved = [
            torch.zeros((), device="cpu") if w.grad is None else lr_sum * norms(w.grad, dim)
            for w in tensors
        ]
    found = [0.0]
    for w, way in zip(tensors, moved, strict=True):
        if w.numel():
            total = norms(w, dim) + way.to(w.device, torch.float64)
            found.append(float(total.max()) / (lr_sum * root_size(w, dim)))
    if not all(map(math.isfinite, found)):
        raise ValueError(f"fusereg.{op}: params or their gradients are not finite")
    return max(found)


def geometric(high: float, count: int, lowest: float = 0.02) -> list[float]:
    """Return ``count`` strengths from ``lowest`` times ``high`` to ``high``, and as many beyond."""
    factor = lowest ** (-1 / max(count - 1, 1))
    return [high * factor ** (i - count + 1) for i in range(2 * count)]


class Watch:
    """Adds up, over the optimizers' steps within a ``with`` block, learning rates and moves.

    Args:
        find: returns the tensors that the penalty is on, in the model as it is then.
        dim: the dimension of the groups.
    """

    def __init__(self, find: Callable[[], list[Tensor]], dim: int | None) -> None:
        self._find, self._dim = find, dim
        self._before: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._lr_sums: dict[int, float] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        self._hooks = [
            register_optimizer_step_pre_hook(lambda o, *_: self._note(o, before=True)),
            register_optimizer_step_post_hook(lambda o, *_: self._note(o, before=False)),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, optimizer: Optimizer, before: bool) -> None:
        watched = {id(w) for w in self._find()}
        for group in optimizer.param_groups:
            for w in group["params"]:
                if id(w) not in watched or w.grad is None:
                    continue
                if before:
                    self._before[id(w)] = w.detach().clone()
                elif id(w) in self._before:
                    way = norms(w.detach() - self._before.pop(id(w)), self._dim)
                    self._moved[id(w)] = self._moved.get(id(w), 0) + way
                    step = _proximal_step(optimizer, group, self._dim)
                    self._lr_sums[id(w)] = self._lr_sums.get(id(w), 0.0) + step

    def strength(self) -> float:
        """Return the strength at which the training that was watched removes every group."""
        tensors = self._find()
        if not all(self._lr_sums.get(id(w), 0.0) > 0 for w in tensors):
            raise ValueError(
                f"{OP}: train made no step of a torch.optim.Optimizer on some of the penalized "
                "parameters, so the strengths cannot be bracketed; pass strengths as a sequence"
            )
        return max(
            shrink_budget(
                w.detach(), self._lr_sums[id(w)], dim=self._dim, moved=[self._moved[id(w)]]
            )
            for w in tensors
        )


def _proximal_step(optimizer: Optimizer, group: dict[str, Any], dim: int | None) -> float:
    """Return the step size of the optimizer's proximal step: lr, amplified as momentum does."""
    lr, prox = float(group["lr"]), group.get("prox")
    if prox in (True, "capped", "preconditioned"):
        if "dampening" in group:  # SGD
            return lr * (1.0 - float(group["dampening"])) / (1.0 - float(group["momentum"]))
        if dim is None:
            raise ValueError(
                f"{OP}: with {type(optimizer).__name__} and prox={prox!r}, proximal steps of "
                "single elements are in the optimizer's metric, for which no bracket is known; "
                "pass strengths as a sequence"
            )
    return lr


def find(penalized: Callable[[nn.Module], Any], model: nn.Module) -> list[Tensor]:
    """Return the tensors that the callback names."""
    found = as_list(penalized(model), "path")
    if not found or not all(isinstance(w, Tensor) for w in found):
        raise ValueError(f"{OP}: penalized must return a tensor or several, got {found!r}")
    return found
