"""Penalties of weights."""

from __future__ import annotations

from torch import Tensor

from ..core import params as _params
from ..core.docs import share_paragraphs
from ..core.params import Params, Strength
from . import op as _penalty_ops

__all__ = ["elastic_net_penalty", "group_lasso_penalty", "l1_penalty", "l2_penalty"]

_ARGUMENTS = """
    Args:
        params: a tensor, an iterable of tensors, or a module (its parameters). float64, float32,
            float16 and bfloat16 may be mixed, as may devices and layouts. A tensor that is listed
            more than once counts once. Empty tensors count nothing.
"""
_RETURNS = """
    Returns:
        A 0-d tensor on the first tensor's device, float32 (float64 if any input is); 0 for no
        tensors. Sums over more than 8 terms run in float64, whatever the dtype. NaN in gives NaN
        out, in the value and the gradient.

    Raises:
        TypeError: something in ``params`` is not a tensor.
        ValueError: a tensor is sparse, nested, complex, of another dtype or device; a strength is
            negative or not finite, or there are not as many as tensors.
"""


def l1_penalty(params: Params, strength: Strength) -> Tensor:
    r"""The L1 (lasso) penalty :math:`\lambda \sum_i |w_i|` (Tibshirani 1996).

    The gradient is :math:`\lambda\,\mathrm{sign}(w)`, with the subgradient 0 at 0. A step along it
    never gives exact zeros; :func:`fusereg.prox.l1_` does.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor. A tensor with strength 0 is
            left out, NaN and all.
    {returns}

    Example:
        >>> loss = criterion(model(x), y) + fusereg.functional.l1_penalty(model, 1e-5)
    """
    op = "l1_penalty"
    tensors, s = _penalty_ops.collect(params, (strength, 0.0, 0.0), op, ("strength", "", ""))
    return _penalty_ops.penalty(op, tensors, s)


def l2_penalty(params: Params, strength: Strength, *, half: bool = False) -> Tensor:
    r"""The L2 (ridge) penalty :math:`\lambda \sum_i w_i^2`, or half of it (Hoerl and Kennard 1970).

    Two conventions are in use. ``half=False`` is Keras's, with gradient :math:`2 \lambda w`;
    ``half=True`` is :math:`\lambda/2 \sum w^2`, with gradient :math:`\lambda w`, as torch's
    ``weight_decay`` in plain SGD.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        half: whether the penalty carries the factor 1/2.
    {returns}

    Example:
        >>> loss = criterion(model(x), y) + fusereg.functional.l2_penalty(model, 1e-4, half=True)
    """
    op = "l2_penalty"
    tensors, s = _penalty_ops.collect(
        params, (0.0, strength, 0.0), op, ("", "strength", ""), l2_factor=1.0 if half else 2.0
    )
    return _penalty_ops.penalty(op, tensors, s)


def elastic_net_penalty(params: Params, l1: Strength, l2: Strength) -> Tensor:
    r"""The elastic net :math:`\lambda_1 \sum_i |w_i| + \tfrac{\lambda_2}{2} \sum_i w_i^2`
    (Zou and Hastie 2005, with the factor 1/2 of Friedman, Hastie, Tibshirani 2010).

    Both sums come from one pass over the weights, the gradient
    :math:`\lambda_1\,\mathrm{sign}(w) + \lambda_2 w` from another.
    :func:`fusereg.add_penalty_grad_` does both in one.
    {arguments}
        l1: :math:`\lambda_1 \ge 0`, one number or one per tensor.
        l2: :math:`\lambda_2 \ge 0`, one number or one per tensor.
    {returns}

    Example:
        >>> from fusereg import functional as F
        >>> loss = criterion(model(x), y) + F.elastic_net_penalty(model, 1e-5, 1e-4)
    """
    op = "elastic_net_penalty"
    tensors, s = _penalty_ops.collect(params, (l1, l2, 0.0), op)
    return _penalty_ops.penalty(op, tensors, s)


def group_lasso_penalty(params: Params, strength: Strength, dim: int = 0) -> Tensor:
    r"""The group lasso :math:`\lambda \sum_g \sqrt{n_g}\,\|w_g\|_2` (Yuan and Lin 2006).

    The groups of a tensor are its slices along ``dim``: with ``dim=0`` the rows of a linear layer
    (one output unit each) or the filters of a convolution, with ``dim=1`` their inputs. :math:`n_g`
    is the number of elements of a slice. The gradient of group g is :math:`\lambda \sqrt{n_g}\,w_g
    / \|w_g\|_2`, and 0 for an all-zero group. A 1-d tensor has groups of one element, for which
    this is the L1 penalty.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        dim: the dimension that counts the groups; negative counts from the end.
    {returns}

    Example:
        >>> from fusereg import functional as F
        >>> loss = criterion(model(x), y) + F.group_lasso_penalty(linear.weight, 1e-3)
    """
    op = "group_lasso_penalty"
    tensors, s = _penalty_ops.collect(params, (0.0, 0.0, strength), op, ("", "", "strength"))
    return _penalty_ops.penalty(op, tensors, s, _params.check_dim(dim, op))


for _function in (l1_penalty, l2_penalty, elastic_net_penalty, group_lasso_penalty):
    share_paragraphs(_function, arguments=_ARGUMENTS, returns=_RETURNS)
