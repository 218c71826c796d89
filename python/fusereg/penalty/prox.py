r"""Proximal steps in place, which make weights exactly zero.

The proximal operator of a penalty R is
:math:`\mathrm{prox}_R(v) = \arg\min_w \tfrac12 \|w - v\|^2 + R(w)` (Moreau 1965; Parikh and Boyd
2014). A proximal gradient step is a gradient step on the loss, then ``prox`` with the step's
learning rate in the threshold::

    optimizer.step()
    fusereg.prox.l1_(model.parameters(), threshold=lr * l1)

Each step reads and writes every element once, over all tensors in one call. Zeros are ``+0.0``, NaN
stays NaN. Autograd does not record the steps, and they return None; :func:`fusereg.sparsity`
counts zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks, dispatch, distributed
from ..core.groups import Groups
from ..core.hints import explains
from ..core.params import Params
from . import coupled as _coupled
from . import dtensor as _dtensor
from . import kernels as _kernels
from . import op as _op
from .coupled import Weights
from .functional import check_all
from .names import trained
from .others import limited
from .strengths import Listed, Strength, Strengths, check_dim, check_number, collect

__all__ = ["elastic_net_", "group_lasso_", "hierarchical_", "l1_", "max_norm_"]


@explains("fusereg.prox.l1_")
def l1_(params: Params, threshold: Strength) -> None:
    r"""Apply soft-thresholding (Donoho 1995).

    .. math:: w \leftarrow \mathrm{sign}(w)\max(|w| - t, 0)

    Args:
        params: a tensor, an iterable of tensors, or a module; changed in place. Any mix of float64,
            float32, float16, bfloat16, devices and layouts. Of a module, all parameters are
            changed, biases and those of normalization layers too (list the weights to spare them),
            but not the frozen ones, nor those that a parametrization divides by their norm
            (``weight_norm``): zeros would make NaN.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; one number or one per
            tensor.

    Raises:
        TypeError, ValueError: as :func:`fusereg.functional.l1_penalty`; also for expanded tensors,
            tensors that share memory, and a module that is frozen. Nothing is changed then.
    """
    op = "prox.l1_"
    _prox(op, collect(op, trained(op, params), Strengths(l1=threshold), "threshold"))


@explains("fusereg.prox.elastic_net_")
def elastic_net_(params: Params, l1: Strength, l2: Strength) -> None:
    r"""Apply the elastic net's proximal step.

    .. math:: w \leftarrow \mathrm{sign}(w)\max(|w| - l_1, 0) / (1 + l_2)

    It is the proximal operator of :math:`l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2`.

    Args:
        params: as in :func:`l1_`.
        l1: learning rate times lambda_1, >= 0; one number or one per tensor.
        l2: learning rate times lambda_2, >= 0; one number or one per tensor.

    Raises:
        TypeError, ValueError: as :func:`l1_`.
    """
    op = "prox.elastic_net_"
    _prox(op, collect(op, trained(op, params), Strengths(l1, l2)))


@explains("fusereg.prox.group_lasso_")
def group_lasso_(
    params: Params | Groups,
    threshold: Strength,
    dim: int = 0,
    *,
    l1: Strength = 0.0,
    weights: Weights = "size",
) -> None:
    r"""Apply block soft-thresholding, after soft-thresholding with ``l1``.

    .. math:: w_g \leftarrow v_g \max(0, 1 - t \sqrt{n_g} / \|v_g\|_2), \quad
              v = \mathrm{sign}(w)\max(|w| - l_1, 0)

    Whole slices along ``dim`` become zero (Yuan and Lin 2006). With ``l1`` it is the proximal
    operator of the sparse group lasso (Simon et al. 2013), in closed form.

    With :func:`fusereg.groups_of` a group is a channel, with its slices in all tensors that write
    it, and :math:`\sqrt{n_g}` may be another weight: all channels of a model take two passes over
    the weights. Where readers were asked for, **two steps alternate**, in this order: that of what
    writes the channels, then that of what reads them. The readers of one channel overlap the
    writers of others, so the proximal operator of the sum has no closed form, and this is not it.

    Args:
        params: as in :func:`l1_`; or the groups of :func:`fusereg.groups_of`.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; one number or one per
            tensor. One number with groups.
        dim: the dimension whose indices are the groups, as in
            :func:`fusereg.functional.group_lasso_penalty`.
        l1: :math:`l_1 \ge 0`, the threshold of each element; as ``threshold``.
        weights: with groups, what :math:`\sqrt{n_g}` stands for, as in
            :func:`fusereg.functional.group_lasso_penalty`.

    Raises:
        TypeError, ValueError: as :func:`l1_`; also if a tensor has no dimension ``dim``, and for
            groups that overlap.
    """
    op = "prox.group_lasso_"
    if isinstance(params, Groups):
        limit, families = _coupled.strengths(
            op, params, threshold, "threshold", dim=dim, l1=l1, weights=weights
        )
        for family, limits in families:
            _coupled.prox_(op, family, family.tensors, limits, limit)
        return
    _coupled.only_with_groups(op, weights)
    s = Strengths(l1, group=threshold, dim=check_dim(op, dim))
    _prox(op, collect(op, trained(op, params), s, _coupled.alone("threshold", l1)))


@explains("fusereg.prox.max_norm_")
def max_norm_(params: Params, max_norm: Strength, dim: int = 0) -> None:
    r"""Project onto a limit of the norms: no slice along ``dim`` is longer than c.

    .. math:: w_g \leftarrow w_g \min(1, c / \|w_g\|_2)

    The max-norm constraint (Srebro, Rennie, Jaakkola 2005; Srivastava et al. 2014), the proximal
    operator of the indicator of the ball. Slices within the limit keep their bits. Computed by
    torch's operations, norms in float32 (float64 for float64). To apply it after each step of any
    optimizer::

        optimizer.register_step_post_hook(lambda *_: fusereg.prox.max_norm_(model.fc, 3.0))

    Args:
        params: as in :func:`l1_`; tensors of fewer than two dimensions, such as biases, stay.
        max_norm: :math:`c \ge 0`, one number or one per tensor.
        dim: the dimension whose indices are the slices: 0, the outputs of linear layers and
            convolutions; 1 for transposed convolutions.

    Raises:
        TypeError, ValueError: as :func:`l1_`; also if a tensor has no dimension ``dim``.
    """
    op = "prox.max_norm_"
    s = Strengths(l1=max_norm, dim=check_dim(op, dim))
    tensors, s, _ = collect(op, trained(op, params, zeros=False), s, "max_norm")
    limits = (limit for limit, *_ in s.each(len(tensors)))
    with torch.no_grad():
        found = limited(op, tensors, limits, dim)
        for i, (w, _) in enumerate(found):
            checks.check_writable(w, op, f"params[{i}]")
        for w, factor in found:
            w.copy_(torch.where(factor == 1, w, w * factor))


@explains("fusereg.prox.hierarchical_")
def hierarchical_(
    skip: Tensor, weight: Tensor, threshold: float, m: float = 10.0, l1: float = 0.0
) -> None:
    r"""Apply LassoNet's proximal step, which removes input features from a network.

    The network has a linear skip from its inputs to its outputs, and may use a feature only as far
    as the skip does. For each feature j, with the columns :math:`\theta_j` of the skip and
    :math:`w_j` of the first layer, this is

    .. math:: \min_{\theta_j, w_j} \tfrac12 \|\theta_j - v_j\|^2 + \tfrac12 \|w_j - u_j\|^2
              + t \|\theta_j\|_2 + l_1 \|w_j\|_1
              \quad\text{subject to}\quad \|w_j\|_\infty \le M \|\theta_j\|_2

    with v and u the present columns. A feature is unused where :math:`\theta_j = 0`; then
    :math:`w_j = 0`. The global minimum is exact though the problem is not convex: with
    :math:`a = \max(|u_j| - l_1, 0)`, sorted downward, and :math:`b_s = \max(0, \|v_j\| - t +
    M \sum_{i \le s} a_i) / (1 + s M^2)`, take the first s with :math:`M b_s \ge a_{s+1}`; then
    :math:`\theta_j = b_s v_j / \|v_j\|` and :math:`w_j = \mathrm{sign}(u_j) \min(a, M b_s)`.
    Where :math:`v_j = 0`, every direction is as good, and that of equal outputs is taken.

    Call it after each step of an optimizer without a penalty on these two parameters::

        optimizer.register_step_post_hook(
            lambda *_: fusereg.prox.hierarchical_(model.skip.weight, model.first.weight, lr * l)
        )

    Computed by torch's operations in float32 (float64 for float64).

    Args:
        skip: [outputs, features], changed in place.
        weight: [hidden units, features], changed in place; dtype and device as ``skip``.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; without the factor
            :math:`\sqrt{n}` of :func:`group_lasso_`.
        m: :math:`M \ge 0`, how much more the network may use a feature than the skip; 0 leaves a
            linear model.
        l1: :math:`l_1 \ge 0`, learning rate times another strength, on single weights.

    Raises:
        TypeError, ValueError: an argument is invalid. Nothing is changed then.

    Paper:
        I. Lemhadri, F. Ruan, L. Abraham, R. Tibshirani, "LassoNet: A Neural Network with Feature
        Sparsity", JMLR 22, 2021.
    """
    op = "prox.hierarchical_"
    for name, x in (("skip", skip), ("weight", weight)):
        checks.check(x, op, name)
        checks.plain(x, op, name)
        checks.check_writable(x, op, name)
        if x.dim() != 2:
            raise ValueError(
                f"fusereg.{op}: {name} must have 2 dimensions, got shape {tuple(x.shape)}"
            )
    checks.check_apart([skip, weight], op, "argument {}")
    if weight.shape[1] != skip.shape[1]:
        raise ValueError(
            f"fusereg.{op}: weight must have as many features as skip, {skip.shape[1]}, "
            f"got {weight.shape[1]}"
        )
    for name, theirs, own in (
        ("dtype", skip.dtype, weight.dtype),
        ("device", skip.device, weight.device),
    ):
        if own != theirs:
            raise ValueError(f"fusereg.{op}: weight must have skip's {name}, {theirs}, got {own}")
    for name, number in (("threshold", threshold), ("m", m), ("l1", l1)):
        check_number(number, f"fusereg.{op}: {name}")
    if not skip.numel():
        return
    with torch.no_grad():
        dtype = torch.promote_types(skip.dtype, torch.float32)
        v, u = skip.to(dtype), weight.to(dtype)
        norm = torch.linalg.vector_norm(v, dim=0)
        a = (u.abs() - l1).clamp_min(0)  # [hidden units, features]
        largest, _ = a.sort(dim=0, descending=True)
        none = torch.zeros_like(norm).unsqueeze(0)
        sums = torch.cat([none, largest.cumsum(0)])
        counts = torch.arange(len(sums), device=u.device, dtype=dtype).unsqueeze(1)
        b = (norm - threshold + m * sums).clamp_min(0) / (1 + counts * m * m)
        first = (m * b >= torch.cat([largest, none])).int().argmax(dim=0, keepdim=True)
        b = b.gather(0, first).squeeze(0)
        equal = v.shape[0] ** -0.5
        direction = torch.where(norm == 0, equal, v / norm)
        # NaN stays NaN: a feature of which a part is NaN is NaN as a whole.
        b = torch.where(torch.isnan(norm + sums[-1]), torch.nan, b)
        skip.copy_(torch.where(b == 0, 0.0, b * direction))
        weight.copy_(u.sign() * torch.minimum(a, m * b) + 0.0)  # no -0.0


def _prox(op: str, listed: Listed) -> None:
    tensors, s, direct = listed
    if not tensors:
        return
    if not direct:
        if not dispatch.eager():
            check_all(op, tensors)
            _op.prox_(tensors, s)
            return
        if distributed.has_dtensor(tensors):
            _dtensor.prox_(op, tensors, s)
            return
    _kernels.prox_(op, tensors, s)
