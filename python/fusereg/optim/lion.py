"""Lion with a penalty in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import algorithms
from .optimizer import RegularizedOptimizer, documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion"]


@documented
class Lion(RegularizedOptimizer):
    r"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms") with a penalty.

    .. math::
        c &= \beta_1 m + (1 - \beta_1) g, \quad m \leftarrow \beta_2 m + (1 - \beta_2) g \\
        p &\leftarrow (1 - lr\, \lambda) p - lr\, \mathrm{sign}(c)

    Each step has the size lr, whatever the gradient's is, and there is no metric for a proximal
    step. So the penalty joins the gradient inside the sign, as
    :math:`c + l_1 \mathrm{sign}(p) + l_2 p`; a step that would change a weight's sign ends at zero,
    and a zero moves only if :math:`|c| > l_1`. Weights whose c and m are 0 stay in the first
    :math:`1 / (1 - \beta_2)` steps. With a ``group`` term the step is decoupled.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor; usually 3 to 10 times smaller than AdamW's.
        betas: :math:`\beta_1, \beta_2`.
        weight_decay: :math:`\lambda`, decoupled; usually 3 to 10 times larger than AdamW's.
        {penalty}

    {notes}

    Example:
        >>> optimizer = fusereg.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1, l1=1e-5)
    """

    _algorithm = algorithms.LION
    _has_group_step = False

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: Number = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": self._pair(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        first, second = group["betas"]
        return {"first": first, "second": second, "decoupled_decay": True}
