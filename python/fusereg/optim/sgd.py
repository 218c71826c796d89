"""SGD with a penalty in the step: proximal gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import algorithms
from .kernels import Call
from .optimizer import RegularizedOptimizer, documented
from .options import Number, Options, ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD"]


@documented
class SGD(RegularizedOptimizer):
    r"""``torch.optim.SGD`` with a penalty in the same pass.

    .. math::
        g &\leftarrow g + \lambda p, \quad b \leftarrow \mu b + (1 - \tau) g \\
        p &\leftarrow p - lr\, b \quad (\text{Nesterov: } g + \mu b)

    and then, with ``prox``, :math:`p \leftarrow \mathrm{prox}_{lr' R}(p)`, with
    :math:`lr' = lr (1 - \tau) / (1 - \mu)`. Without momentum this is proximal gradient descent,
    ISTA (Beck and Teboulle 2009) on a full batch.

    Args:
        params: parameters or param groups.
        lr: learning rate, a number or a 0-d tensor.
        momentum, dampening, nesterov, maximize: :math:`\mu`, :math:`\tau` and so on, as torch's.
        weight_decay: :math:`\lambda`, added to the gradient.
        {penalty}

    torch's momentum amplifies a gradient that stays by :math:`(1 - \tau) / (1 - \mu)`, so the
    proximal step is amplified as much: its fixed points are those of the penalized problem.
    ``prox="decoupled"`` takes lr itself: its fixed points have a penalty that is weaker by that
    factor. Without momentum the two are the same; ``True``, ``"capped"`` and ``"preconditioned"``
    always are.

    {notes}

    Example:
        >>> optimizer = fusereg.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, l1=1e-4)
        >>> loss.backward()
        >>> optimizer.step()
    """

    _algorithm = algorithms.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, **options)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        momentum = group["momentum"]
        return {
            "first": momentum,
            "second": group["dampening"],
            "nesterov": bool(group["nesterov"]),
            "momentum": momentum != 0,
        }

    def _forgets(self, call: Call) -> bool:
        """Return whether an overflow skipped this step, so that new states must be deleted.

        The first gradient enters the buffer undampened, so the step after a skipped first step is
        a first step too. Only with dampening does the host wait for the device.
        """
        dampened = any(h.second for h in call.hypers)
        return dampened and call.found_inf is not None and float(call.found_inf) != 0.0
