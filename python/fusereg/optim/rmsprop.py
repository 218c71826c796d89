"""RMSprop with a penalty in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import algorithms
from .optimizer import RegularizedOptimizer, documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RMSprop"]


@documented
class RMSprop(RegularizedOptimizer):
    r"""``torch.optim.RMSprop`` (Hinton 2012) with a penalty in the same pass.

    .. math::
        g &\leftarrow g + \lambda p, \quad v \leftarrow \alpha v + (1 - \alpha) g^2, \quad
        D = \sqrt{v} + \epsilon \\
        b &\leftarrow \mu b + g / D, \quad p \leftarrow p - lr\, b

    ``centered``: :math:`D = \sqrt{v - a^2} + \epsilon` with the average a of the gradients. Then
    comes the proximal step of :class:`Adam`, with :math:`lr / (1 - \mu)` for lr, because momentum
    amplifies gradients as much, and a wait of :math:`1 / (1 - \alpha)` steps. A centered D may be
    smaller than the gradient, so ``"capped"`` only waits there.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        alpha, eps, momentum, centered, maximize: as torch's.
        weight_decay: :math:`\lambda`, added to the gradient.
        capturable: accepted for compatibility, ignored: step counts are on the parameters' device.
        {penalty}

    {notes}

    Example:
        >>> optimizer = fusereg.optim.RMSprop(model.parameters(), lr=1e-3, l1=1e-4)
    """

    _algorithm = algorithms.RMSPROP

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered,
            "weight_decay": weight_decay, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "first": group["momentum"],
            "second": group["alpha"],
            "eps": group["eps"],
            "momentum": group["momentum"] > 0,
            "centered": bool(group["centered"]),
        }
