"""FTRL-Proximal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import algorithms
from .kernels import update_dtype
from .optimizer import RegularizedOptimizer, documented
from .options import CommonOptions, Number, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FTRL"]


@documented
class FTRL(RegularizedOptimizer):
    r"""Per-coordinate FTRL-Proximal (McMahan et al. 2013, "Ad click prediction", Algorithm 1).

    .. math::
        n &\leftarrow n + g^2, \quad Q' = Q, \quad Q = (\beta + \sqrt{n}) / lr \\
        z &\leftarrow z + g - (Q - Q')\, p \\
        p &= \begin{cases} 0 & |z| \le l_1 \\
             - \dfrac{z - \mathrm{sign}(z) l_1}{Q + l_2} & \text{else}
             \end{cases}

    L1 acts on the whole history z, not on one step, and so gives sparser weights at the same loss
    than a proximal step on noisy gradients does (McMahan 2011).

    While lr is constant :math:`Q - Q'` is the paper's sigma,
    :math:`(\sqrt{n} - \sqrt{n'}) / lr` with n' before the step. With each step's own rate in Q, a
    change of lr acts as in the other optimizers: it moves no weight by itself.

    The paper starts from zero weights. Here z starts as :math:`-p_0 (\beta + \sqrt{n_0}) / lr`,
    which is 0 for zero weights, as in the paper, and keeps other weights (without penalties the
    first p is the closed form around :math:`p_0`). As z follows from p wherever p is not 0, a
    weight that is changed between steps is taken as it is.

    Args:
        params: parameters or param groups.
        lr: the paper's alpha, a number or a 0-d tensor. A change applies to later steps. While it
            is 0 (the first step of a warm-up, ``torch.distributed.checkpoint``) parameters and
            states do not change.
        beta: the paper's beta, > 0.
        l1, l2: strengths >= 0 of :math:`l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2`. Numbers or 0-d
            tensors; each param group may have its own.
        weight_decay: lambda, :math:`\lambda p` is added to the gradient.
        initial_accumulator_value: :math:`n_0`.
        maximize, max_grad_norm, master_weights, ema_decay: as in :class:`SGD`.
        foreach, fused, differentiable: as in :class:`SGD`.

    There is no ``group``, whose step has no closed form in this metric, and no ``prox``, because
    the closed form is a proximal step itself.

    {notes}

    Example:
        >>> optimizer = fusereg.optim.FTRL(model.parameters(), lr=0.1, l1=1.0)
    """

    _algorithm = algorithms.FTRL
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
            "lr": lr, "beta": beta, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }  # fmt: skip
        super().__init__(params, defaults, **options)
        for name, value in (("lr", lr), ("beta", beta)):
            if not isinstance(value, Tensor) and value == 0.0:
                raise ValueError(f"fusereg.optim.FTRL: {name} must be > 0, got {value}")

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"first": group["beta"]}

    def _new_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        start = super()._new_state(key, p, group)
        return start.fill_(group["initial_accumulator_value"]) if key == "sum" else start

    def _add_step(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Make the record of the last step: its l1, l2, lr and beta."""
        if state.get("last") is not None:
            return
        last = state["last"] = torch.zeros(4, dtype=update_dtype(p), device=p.device)
        if state.get("linear") is not None:
            # A state dict of earlier versions, which did not keep them.
            for i, key in enumerate(("l1", "l2", "lr", "beta")):
                last[i] = group[key]
