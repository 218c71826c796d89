"""Adam and AdamW with a penalty in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .algorithms import ADAM
from .optimizer import RegularizedOptimizer, documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adam", "AdamW"]


class Moments(RegularizedOptimizer):
    """The base of those that keep averages of the gradients and of their squares."""

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        first, second = group["betas"]
        decoupled = bool(group.get("decoupled_weight_decay", False))
        return {
            "first": first, "second": second, "eps": group["eps"], "decoupled_decay": decoupled,
        }  # fmt: skip


@documented
class Adam(Moments):
    r"""``torch.optim.Adam`` (Kingma and Ba 2015) with a penalty in the same pass.

    .. math::
        g &\leftarrow g + \lambda p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2
        \\
        D &= \sqrt{v / (1 - \beta_2^t)} + \epsilon, \quad
        p \leftarrow p - lr\, \frac{m / (1 - \beta_1^t)}{D}

    and then the proximal step in the metric of the update, with a threshold of its own for each
    coordinate,

    .. math:: p_i \leftarrow \frac{\mathrm{sign}(p_i)\max(|p_i| - lr\, l_1 / D'_i, 0)}
                                  {1 + lr\, l_2 / D'_i}, \quad
              D'_i = \max(D_i, (l_1 + l_2 |p_i|) / 2)

    while weights whose v is 0 stay as they are in the first :math:`1 / (1 - \beta_2)` steps, the
    memory of v. With ``prox="preconditioned"`` there is neither the wait nor the floor of D, which
    is ProxGen's step (Yun, Lozano and Yang 2021). Fixed points of both are those of the penalized
    problem, because there :math:`l_1 + l_2 |p_i| = |m_i| \le D_i` and the floor does not matter.
    With a ``group`` term, row by row,

    .. math:: p_i \leftarrow \frac{\mathrm{sign}(p_i) \max(D'_i |p_i| - lr\, l_1, 0)}
                                  {D'_i + lr\, l_2 + lr\, group \sqrt{n_r} / y}

    where y is the norm of the result, and D' is made longer than :math:`group \sqrt{n_r} / 2`.
    For ``prox="decoupled"``, :math:`p \leftarrow \mathrm{prox}_{lr R}(p)`, whose fixed points, like
    those of AdamW's decay, also depend on D.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        betas, eps, amsgrad, maximize: as torch's.
        weight_decay: :math:`\lambda`, added to the gradient; decoupled as in AdamW with
            ``decoupled_weight_decay``.
        capturable: accepted for compatibility, ignored: step counts are on the parameters' device.
        {penalty}

    {notes}

    Example:
        >>> optimizer = fusereg.optim.Adam(model.parameters(), lr=1e-3, l1=1e-4)
        >>> loss.backward()
        >>> optimizer.step()
        >>> objective = loss.detach() + optimizer.penalty_value
    """

    _algorithm = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "betas": self._pair(betas), "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**super()._specific(group), "amsgrad": bool(group["amsgrad"])}


@documented
class AdamW(Adam):
    r"""``torch.optim.AdamW`` (Loshchilov and Hutter 2019) with a penalty in the same pass.

    As :class:`Adam`, with the weight decay decoupled: :math:`p \leftarrow (1 - lr\,\lambda) p`
    before the update. An elastic net's step costs 28 bytes a float32 element, as AdamW's alone.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        betas, eps, amsgrad, maximize: as torch's.
        weight_decay: :math:`\lambda`, decoupled.
        capturable: accepted for compatibility, ignored: step counts are on the parameters' device.
        {penalty}

    {notes}

    Example:
        >>> groups = fusereg.optim.param_groups_weight_decay(model, 0.01, l1=1e-5)
        >>> optimizer = fusereg.optim.AdamW(groups, lr=1e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {"capturable": capturable, "decoupled_weight_decay": True}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **own, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Also after loading a state dict of Adam.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
