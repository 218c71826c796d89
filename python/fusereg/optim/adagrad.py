"""Adagrad with a penalty in the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .optimizer import ParamsT, RegularizedOptimizer, check_numbers, own_defaults
from .texts import share

__all__ = ["Adagrad"]


class Adagrad(RegularizedOptimizer):
    r"""``torch.optim.Adagrad`` (Duchi, Hazan and Singer 2011) with a penalty in the same pass.

    .. math::
        g &\leftarrow g + \lambda p, \quad s \leftarrow s + g^2, \quad D = \sqrt{s} + \epsilon \\
        p &\leftarrow p - lr_t\, g / D, \quad lr_t = lr / (1 + (t - 1) \eta)

    and then, for ``prox="decoupled"``, :math:`p \leftarrow \mathrm{prox}_{lr_t R}(p)`; for
    ``prox="preconditioned"`` the composite mirror descent step of the paper,

    .. math:: p_i \leftarrow \frac{\mathrm{sign}(p_i)\max(|p_i| - lr_t\, l_1 / D_i, 0)}
                                  {1 + lr_t\, l_2 / D_i}

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        lr_decay: :math:`\eta`.
        weight_decay: :math:`\lambda`, added to the gradient.
        initial_accumulator_value, eps, maximize: as torch's.
        {penalty}

    {notes}

    Sparse gradients update as torch's Adagrad does; the penalty concerns all elements.

    Example:
        >>> optimizer = fusereg.optim.Adagrad(
        ...     model.parameters(), lr=0.1, l1=1e-3, prox="preconditioned"
        ... )
        >>> loss.backward()
        >>> optimizer.step()
    """

    _algorithm = 2
    _name = "Adagrad"
    _keys = ("sum",)
    _has_step = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        l1: float | Tensor = 0.0,
        l2: float | Tensor = 0.0,
        group: float | Tensor = 0.0,
        prox: bool | str = True,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_numbers(
            self._name,
            lr=(lr, math.inf),
            lr_decay=(lr_decay, math.inf),
            weight_decay=(weight_decay, math.inf),
            initial_accumulator_value=(initial_accumulator_value, math.inf),
            eps=(eps, math.inf),
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            **own_defaults(l1, l2, group, prox, master_weights),
        }
        super().__init__(params, defaults, max_grad_norm)
        # torch's Adagrad has its states from the beginning.
        with torch.no_grad():
            for g in self.param_groups:
                for p in g["params"]:
                    self._add_missing(p, self._keys, g)

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, Any, Any]:
        return group["lr_decay"], 0.0, group["eps"]

    def _new_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        return super()._new_state(key, p, group).fill_(group["initial_accumulator_value"])

    def share_memory(self) -> None:
        """As torch's: puts the sums of squares into memory that processes share."""
        for state in self.state.values():
            state["sum"].share_memory_()


share(Adagrad)
