"""LAMB with a penalty in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import algorithms
from .adam import Moments
from .kernels import given
from .optimizer import documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB"]


@documented
class LAMB(Moments):
    r"""LAMB (You et al. 2020, "Large batch optimization for deep learning") with a penalty.

    .. math::
        u &= \frac{m / (1 - \beta_1^t)}{D} + \lambda p, \quad r = \|p\|_2 / \|u\|_2 \\
        p &\leftarrow p - lr\, r\, u

    with :class:`Adam`'s m, v and D; the norms are those of the whole parameter, of all shards of a
    DTensor, and r is 1 where one of them is 0. As in timm's ``Lamb`` and apex's ``FusedLAMB``, r is
    also 1 for param groups without weight decay (biases, norms). Then comes the proximal step of
    :class:`Adam` with :math:`lr\, r` for lr, which leaves the fixed points as they are; r itself
    knows nothing of the penalty. A step is two passes, for norms are needed before it: 40 bytes a
    float32 element.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: :math:`\beta_1, \beta_2`.
        eps: added to D.
        weight_decay: :math:`\lambda`, part of the update u.
        trust_clip: let r be at most 1.
        always_adapt: compute r for param groups without weight decay, too.
        {penalty}

    timm's default ``max_grad_norm`` is 1.0, here there is none. A ``group`` term needs a proximal
    step (``prox=True`` or ``"decoupled"``).

    {notes}

    Example:
        >>> groups = fusereg.optim.param_groups_weight_decay(model, 0.01, l1=1e-5)
        >>> optimizer = fusereg.optim.LAMB(groups, lr=2e-3, max_grad_norm=1.0)
    """

    _algorithm = algorithms.LAMB

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: Number = 0.01,
        *,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "betas": self._pair(betas), "eps": eps, "weight_decay": weight_decay,
            "trust_clip": trust_clip, "always_adapt": always_adapt,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if given(group["group"]) and not group["prox"]:
            raise ValueError(
                "fusereg.optim.LAMB: group cannot go with prox=False: the gradient of whole rows "
                "would take a third pass; use prox='decoupled'"
            )

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        adaptation = {"third": float(group["trust_clip"]), "nesterov": bool(group["always_adapt"])}
        return {**super()._specific(group), **adaptation}
