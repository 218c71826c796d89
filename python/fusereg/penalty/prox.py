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

from ..core import checks, dispatch, distributed
from ..core.groups import Groups
from ..core.params import Params
from . import coupled as _coupled
from . import dtensor as _dtensor
from . import kernels as _kernels
from . import op as _op
from .coupled import Weights
from .functional import check_all
from .names import without_dividing
from .others import limited
from .strengths import Listed, Strength, Strengths, check_dim, collect

__all__ = ["elastic_net_", "group_lasso_", "l1_", "max_norm_"]


def l1_(params: Params, threshold: Strength) -> None:
    r"""Apply soft-thresholding (Donoho 1995).

    .. math:: w \leftarrow \mathrm{sign}(w)\max(|w| - t, 0)

    Args:
        params: a tensor, an iterable of tensors, or a module; changed in place. Any mix of float64,
            float32, float16, bfloat16, devices and layouts. Of a module, parameters stay that a
            parametrization divides by their norm (``weight_norm``): zeros would make NaN.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; one number or one per
            tensor.

    Raises:
        TypeError, ValueError: as :func:`fusereg.functional.l1_penalty`; also for expanded tensors
            and tensors that share memory. Nothing is changed then.
    """
    op = "prox.l1_"
    _prox(op, collect(op, without_dividing(params), Strengths(l1=threshold), "threshold"))


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
    _prox(op, collect(op, without_dividing(params), Strengths(l1, l2)))


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
    _prox(op, collect(op, without_dividing(params), s, _coupled.alone("threshold", l1)))


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
    tensors, s, _ = collect(op, params, s, "max_norm")
    limits = (limit for limit, *_ in s.each(len(tensors)))
    with torch.no_grad():
        found = limited(op, tensors, limits, dim)
        for i, (w, _) in enumerate(found):
            checks.check_writable(w, op, f"params[{i}]")
        for w, factor in found:
            w.copy_(torch.where(factor == 1, w, w * factor))


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
