"""Adagrad with a penalty in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import algorithms
from .optimizer import RegularizedOptimizer, documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adagrad"]


@documented
class Adagrad(RegularizedOptimizer):
    r"""``torch.optim.Adagrad`` (Duchi, Hazan and Singer 2011) with a penalty in the same pass.

    .. math::
        g &\leftarrow g + \lambda p, \quad s \leftarrow s + g^2, \quad D = \sqrt{s} + \epsilon \\
        p &\leftarrow p - lr_t\, g / D, \quad lr_t = lr / (1 + (t - 1) \eta)

    and then the proximal step

    .. math:: p_i \leftarrow \frac{\mathrm{sign}(p_i)\max(|p_i| - lr_t\, l_1 / D'_i, 0)}
                                  {1 + lr_t\, l_2 / D'_i}, \quad
              D'_i = \max(D_i, (l_1 + l_2 |p_i|) / 2)

    while weights whose s is 0 stay as they are in the first 1000 steps. ``prox="preconditioned"``
    has neither the wait nor the floor of D: the composite mirror descent step of the paper. For
    ``prox="decoupled"``, :math:`p \leftarrow \mathrm{prox}_{lr_t R}(p)`.

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
        >>> optimizer = fusereg.optim.Adagrad(model.parameters(), lr=0.1, l1=1e-3)
    """

    _algorithm = algorithms.ADAGRAD

    def __init__(  # type: ignore[misc]  # foreach may come by position too
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: Number = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }  # fmt: skip
        super().__init__(params, defaults, foreach=foreach, **options)
        # torch's Adagrad has its states from the beginning.
        with torch.no_grad():
            for g in self.param_groups:
                for p in g["params"]:
                    self._add_missing(p, self._keys, g)

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"first": group["lr_decay"], "eps": group["eps"]}

    def _new_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        return super()._new_state(key, p, group).fill_(group["initial_accumulator_value"])

    def share_memory(self) -> None:
        """Put the sums of squares into memory that processes share, as torch's Adagrad does."""
        for state in self.state.values():
            state["sum"].share_memory_()
