"""FTRL-Proximal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import dispatch
from .optimizer import RegularizedOptimizer, documented
from .options import CommonOptions, Number, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FTRL"]


@documented
class FTRL(RegularizedOptimizer):
    r"""Per-coordinate FTRL-Proximal (McMahan et al. 2013, "Ad click prediction", Algorithm 1).

    .. math::
        n' &= n + g^2, \quad z \leftarrow z + g - \frac{\sqrt{n'} - \sqrt{n}}{lr}\, p, \quad
        n \leftarrow n' \\
        p &= \begin{cases} 0 & |z| \le l_1 \\
             - \dfrac{z - \mathrm{sign}(z) l_1}{(\beta + \sqrt{n}) / lr + l_2} & \text{else}
             \end{cases}

    L1 acts on the whole history z, not on one step, and so gives sparser weights at the same loss
    than a proximal step on noisy gradients does (McMahan 2011).

    The paper starts from zero weights. Here z starts as :math:`-p_0 (\beta + \sqrt{n_0}) / lr`,
    which is 0 for zero weights, as in the paper, and keeps other weights (without penalties the
    first p is the closed form around :math:`p_0`).

    Args:
        params: parameters or param groups.
        lr: the paper's alpha, a number or a 0-d tensor. A change applies to later steps. While it
            is 0 (the first step of a warm-up, ``torch.distributed.checkpoint``) parameters do not
            change, provided that the host can read it without waiting for a device.
        beta: the paper's beta, > 0.
        l1, l2: strengths >= 0 of :math:`l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2`. Numbers or 0-d
            tensors; each param group may have its own.
        weight_decay: lambda, :math:`\lambda p` is added to the gradient.
        initial_accumulator_value: :math:`n_0`.
        maximize, max_grad_norm, master_weights: as in :class:`SGD`.
        foreach, fused, differentiable: as in :class:`SGD`.

    There is no ``group``, whose step has no closed form in this metric, and no ``prox``, because
    the closed form is a proximal step itself.

    {notes}

    Example:
        >>> optimizer = fusereg.optim.FTRL(model.parameters(), lr=0.1, l1=1.0)
        >>> loss.backward()
        >>> optimizer.step()
    """

    _algorithm = 3
    _name = "FTRL"
    _keys = ("linear", "sum")
    _supports_group = False

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 0.1,
        beta: float = 1.0,
        *,
        weight_decay: Number = 0.0,
        initial_accumulator_value: float = 0.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults, **options)
        for name, value in (("lr", lr), ("beta", beta)):
            if not isinstance(value, Tensor) and value == 0.0:
                raise ValueError(f"fusereg.optim.FTRL: {name} must be > 0, got {value}")

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"first": group["beta"]}

    def _new_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        start = super()._new_state(key, p, group)
        n0 = group["initial_accumulator_value"]
        if key == "sum":
            return start.fill_(n0)
        rate = self.defaults["lr"] if _is_zero(group["lr"]) else group["lr"]
        return start.copy_(p).mul_(-(group["beta"] + math.sqrt(n0)) / rate)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        # The kernels cannot take a rate of zero, which a graph does not see in a tensor.
        rate = group["lr"]
        unseen = isinstance(rate, Tensor) and rate.device.type == "cpu"
        return not unseen and not _is_zero(rate) and super()._init_group(group, *lists)

    @dispatch.outside_graphs
    def _run(self) -> None:
        resting = [group for group in self.param_groups if _is_zero(group["lr"])]
        if not resting:
            super()._run()
            return
        # The formula divides by the rate: these groups get states, but no step.
        kept = []
        for group in resting:
            for p in group["params"]:
                if p.grad is not None:
                    with torch.no_grad():
                        self._add_missing(p, self._keys, group)
                    kept.append((p, p.grad))
                    p.grad = None
        try:
            super()._run()
        finally:
            for p, grad in kept:
                p.grad = grad


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and float(rate) == 0.0
    return bool(rate == 0.0)
