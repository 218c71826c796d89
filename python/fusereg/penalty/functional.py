"""Penalties of weights, their gradients, and the share of zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks, dispatch, distributed
from ..core.arguments import check_type
from ..core.docs import share_paragraphs
from ..core.groups import Groups
from ..core.hints import explains
from ..core.params import Params
from . import coupled as _coupled
from . import dtensor as _dtensor
from . import kernels as _kernels
from . import op as _op
from .coupled import Weights
from .strengths import NO_PENALTY, UNSET, Listed, Strength, Strengths, check_dim, collect

__all__ = [
    "add_penalty_grad_",
    "elastic_net_penalty",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
    "sparsity",
]


def evaluate(op: str, listed: Listed) -> Tensor:
    """Return the differentiable sum of R over any tensors."""
    tensors, s, direct = listed
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    value: Tensor
    if not direct:
        check_all(op, tensors)
        if not dispatch.eager():
            value = _op.penalty.traced(tensors, *s.arguments())
            return value
        if distributed.has_dtensor(tensors):
            return _dtensor.penalty(op, tensors, s)
    value = _op.penalty.eager(tensors, *s.arguments(), op)
    return value


def add_grads(op: str, listed: Listed, grad_scale: Tensor | float | None) -> Tensor:
    """Add grad_scale * dR/dw into every ``.grad`` and return the sum of R."""
    tensors, s, direct = listed
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    scale = None if grad_scale is None else _check_scale(op, grad_scale)
    if not direct:
        if not dispatch.eager():
            check_all(op, tensors)
            return _op.add_grads_(tensors, scale, s)
        if distributed.has_dtensor(tensors):
            return _dtensor.add_grads_(op, tensors, scale, s)
    return _kernels.add_grads_(op, tensors, None, scale, s)


def check_all(op: str, tensors: list[Tensor]) -> None:
    """Raise, with its name, for the first tensor that kernels can never take."""
    for i, t in enumerate(tensors):
        checks.check(t, op, f"params[{i}]")


def _check_scale(op: str, scale: Tensor | float) -> Tensor | float:
    if isinstance(scale, Tensor):
        checks.check(scale, op, "grad_scale")
        if scale.numel() != 1:
            raise ValueError(
                f"fusereg.{op}: grad_scale must be a number or a tensor of one element, "
                f"got shape {tuple(scale.shape)}"
            )
        return checks.plain(scale, op, "grad_scale") if dispatch.eager() else scale.detach()
    check_type(scale, (int, float), f"fusereg.{op}: grad_scale", "a number or a 0-d tensor")
    return scale


_ARGUMENTS = """
    Args:
        params: a tensor, an iterable of tensors, or a module (its parameters). float64, float32,
            float16 and bfloat16 may be mixed, as may devices and layouts. A tensor that is listed
            more than once counts once. Empty tensors contribute 0.
"""
_RETURNS = """
    Returns:
        A 0-d tensor on the first tensor's device, float32 (float64 if any input is); 0 without
        tensors. Sums over more than 8 terms run in float64 for every dtype. A NaN in the input
        gives NaN in value and gradient.

    Raises:
        TypeError: something in ``params`` is not a tensor.
        ValueError: a tensor is sparse, nested, complex, or of an unsupported dtype or device; a
            strength is negative or not finite; the number of strengths is not that of tensors.
"""


@explains()
def l1_penalty(params: Params, strength: Strength) -> Tensor:
    r"""Return the L1 (lasso) penalty :math:`\lambda \sum_i |w_i|` (Tibshirani 1996).

    The gradient is :math:`\lambda\,\mathrm{sign}(w)`, with the subgradient 0 at 0. A step along it
    never gives exact zeros; :func:`fusereg.prox.l1_` does.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor. A tensor with strength 0 is
            left out, even if it has NaN.
    {returns}

    Example:
        >>> loss = criterion(model(x), y) + fusereg.functional.l1_penalty(model, 1e-5)
    """
    op = "l1_penalty"
    return evaluate(op, collect(op, params, Strengths(l1=strength), "strength"))


@explains()
def l2_penalty(params: Params, strength: Strength, *, half: bool = False) -> Tensor:
    r"""Return the L2 (ridge) penalty :math:`\lambda \sum_i w_i^2`, or half of it.

    See Hoerl and Kennard (1970).

    Two conventions are in use. ``half=False`` is Keras's, with gradient :math:`2 \lambda w`;
    ``half=True`` is :math:`\lambda/2 \sum w^2`, with gradient :math:`\lambda w`, as torch's
    ``weight_decay`` in plain SGD.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        half: whether the penalty has the factor 1/2.
    {returns}

    Example:
        >>> loss = criterion(model(x), y) + fusereg.functional.l2_penalty(model, 1e-4, half=True)
    """
    op = "l2_penalty"
    listed = collect(op, params, Strengths(l2=strength), "strength")
    return evaluate(op, listed if half else listed.with_l2_times(2.0))


@explains()
def elastic_net_penalty(params: Params, l1: Strength, l2: Strength) -> Tensor:
    r"""Return the elastic net penalty (Zou and Hastie 2005).

    It is :math:`\lambda_1 \sum_i |w_i| + \tfrac{\lambda_2}{2} \sum_i w_i^2`, with the factor 1/2 of
    Friedman, Hastie, Tibshirani 2010.

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
    return evaluate(op, collect(op, params, Strengths(l1, l2)))


@explains()
def group_lasso_penalty(
    params: Params | Groups,
    strength: Strength,
    dim: int = 0,
    *,
    l1: Strength = 0.0,
    weights: Weights = "size",
) -> Tensor:
    r"""Return the group lasso :math:`\lambda \sum_g \sqrt{n_g}\,\|w_g\|_2` (Yuan and Lin 2006).

    The groups of a tensor are its slices along ``dim``: with ``dim=0`` the rows of a linear layer
    (one output unit each) or the filters of a convolution, with ``dim=1`` their inputs. :math:`n_g`
    is the number of elements of a slice. The gradient of group g is :math:`\lambda \sqrt{n_g}\,w_g
    / \|w_g\|_2`, and 0 for an all-zero group. A 1-d tensor has groups of one element, for which
    this is the L1 penalty. With ``l1`` the term :math:`l_1 \sum_i |w_i|` is added: the sparse group
    lasso (Simon et al. 2013).

    With the result of :func:`fusereg.groups_of` in place of tensors, a group is a channel of the
    model: what writes it, in all tensors. Slices of no channel do not count. Where readers were
    asked for, the terms of what reads each channel are added as groups of their own.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor; one number with groups.
        dim: the dimension whose indices are the groups; negative: from the end.
        l1: :math:`l_1 \ge 0`, as ``strength``.
        weights: with groups, the factor of each group beside the strength. ``"size"``:
            :math:`\sqrt{n_g}`, over all its tensors. ``"operations"``: the multiply-adds that
            removing the channel saves, scaled so that the factors have the same sum as with
            ``"size"``. Or a sequence with an entry for each set of channels, a number or one for
            each channel.
    {returns}

    Example:
        >>> from fusereg import functional as F
        >>> loss = criterion(model(x), y) + F.group_lasso_penalty(linear.weight, 1e-3)
    """
    op = "group_lasso_penalty"
    if isinstance(params, Groups):
        of_elements, families = _coupled.strengths(
            op, params, strength, "strength", dim=dim, l1=l1, weights=weights
        )
        values = [_coupled.value(op, family, s, of_elements) for family, s in families]
        return _kernels.sum_on_first(values)
    _coupled.only_with_groups(op, weights)
    s = Strengths(l1, group=strength, dim=check_dim(op, dim))
    return evaluate(op, collect(op, params, s, _coupled.alone("strength", l1)))


@explains()
def add_penalty_grad_(
    params: Params,
    *,
    l1: Strength = UNSET,
    l2: Strength = UNSET,
    group: Strength = UNSET,
    grad_scale: Tensor | float | None = None,
    group_dim: int = 0,
) -> Tensor:
    r"""Add a penalty's gradient into every ``.grad`` and return its value, in one pass.

    For the penalty

    .. math:: R(w) = l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2
                     + group \sum_g \sqrt{n_g}\,\|w_g\|_2

    (groups along dimension ``group_dim``) this does what ``R.backward()`` does after
    ``loss.backward()``, but reads each weight once and reads and writes each gradient once: 12
    bytes an element in float32. Call it after ``backward()`` and before the optimizer's step. It
    does not wait for the device.

    Args:
        params: a tensor, an iterable of tensors, or a module. Any mix of float64, float32, float16,
            bfloat16, devices and layouts. A missing ``.grad`` is created. A tensor that needs no
            gradient counts in the value only.
        l1, l2, group: strengths >= 0, one number or one per tensor; one of them must be given (0 is
            one).
        grad_scale: factor by which the loss was multiplied before ``backward()``, as by a
            ``GradScaler``, so that unscaling gives the right sum: a number or a 0-d tensor (read on
            the device). The returned value is not scaled.
        group_dim: the dimension whose indices are the groups, as ``dim`` of
            :func:`fusereg.functional.group_lasso_penalty`.

    Returns:
        R as a 0-d tensor on the first tensor's device, float32 (float64 if any input is), detached.

    Raises:
        TypeError, ValueError: as :func:`fusereg.functional.l1_penalty`; also for tensors that are
            not leaves, and where two tensors share one gradient's memory. No gradient has changed
            then.

    Example:
        >>> loss.backward()
        >>> value = fusereg.add_penalty_grad_(model, l1=1e-5, l2=1e-4)
        >>> optimizer.step()
    """
    op = "add_penalty_grad_"
    if l1 is UNSET and l2 is UNSET and group is UNSET and not torch.compiler.is_compiling():
        raise ValueError(f"fusereg.{op}: no strength is given; pass l1, l2 or group")
    s = Strengths(l1, l2, group, check_dim(op, group_dim, "group_dim"))
    return add_grads(op, collect(op, params, s), grad_scale)


@explains()
def sparsity(params: Params) -> float:
    """Return the share of exact zeros (of either sign) among all elements, from 0 to 1.

    NaN is not a zero. Waits for the device. 0.0 without elements. DTensors count as whole tensors.
    """
    tensors = collect("sparsity", params, NO_PENALTY).tensors
    for i, t in enumerate(tensors):
        checks.check(t, "sparsity", f"params[{i}]")
        if not distributed.is_dtensor(t):
            checks.plain(t, "sparsity", f"params[{i}]")
    total = sum(t.numel() for t in tensors)
    if total == 0:
        return 0.0
    if distributed.has_dtensor(tensors):
        return float(_dtensor.zeros(tensors)) / total
    with torch.no_grad():
        nonzero: dict[torch.device, Tensor] = {}
        for t in tensors:
            count = torch.count_nonzero(t.detach())
            nonzero[t.device] = nonzero[t.device] + count if t.device in nonzero else count
    return (total - sum(int(n) for n in nonzero.values())) / total


for _function in (l1_penalty, l2_penalty, elastic_net_penalty, group_lasso_penalty):
    share_paragraphs(_function, arguments=_ARGUMENTS, returns=_RETURNS)
