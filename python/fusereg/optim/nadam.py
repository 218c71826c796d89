"""NAdam with a penalty in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import algorithms
from .adam import Moments
from .kernels import State
from .optimizer import documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["NAdam"]


@documented
class NAdam(Moments):
    r"""``torch.optim.NAdam`` (Dozat 2016) with a penalty in the same pass.

    .. math::
        \mu_t &= \beta_1 (1 - \tfrac12 0.96^{t \psi}), \quad M_t = \mu_1 \cdots \mu_t \\
        p &\leftarrow p - lr \left(\frac{1 - \mu_t}{1 - M_t} g
            + \frac{\mu_{t+1}}{1 - M_{t+1}} m\right) / D

    with :class:`Adam`'s m, v and D, and then its proximal step.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        betas, eps, maximize: as torch's.
        momentum_decay: :math:`\psi`.
        weight_decay: added to the gradient; decoupled as in AdamW with ``decoupled_weight_decay``.
        capturable: accepted for compatibility, ignored: step counts are on the parameters' device.
        {penalty}

    {notes}

    Example:
        >>> optimizer = fusereg.optim.NAdam(model.parameters(), lr=2e-3, l1=1e-4)
    """

    _algorithm = algorithms.NADAM

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 2e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "betas": self._pair(betas), "eps": eps, "weight_decay": weight_decay,
            "momentum_decay": momentum_decay, "decoupled_weight_decay": decoupled_weight_decay,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**super()._specific(group), "third": group["momentum_decay"]}

    def _add_step(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        super()._add_step(p, state, group)
        if not isinstance(state.get("mu_product"), Tensor):
            start = float(state.get("mu_product", 1.0))
            state["mu_product"] = torch.full_like(state["step"], start)
