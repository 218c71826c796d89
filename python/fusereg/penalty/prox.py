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

from ..core import dispatch, distributed
from ..core.params import Params
from . import dtensor as _dtensor
from . import kernels as _kernels
from . import op as _op
from .functional import check_all
from .names import without_dividing
from .strengths import Listed, Strength, Strengths, check_dim, collect

__all__ = ["elastic_net_", "group_lasso_", "l1_"]


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


def group_lasso_(params: Params, threshold: Strength, dim: int = 0) -> None:
    r"""Apply block soft-thresholding.

    .. math:: w_g \leftarrow w_g \max(0, 1 - t \sqrt{n_g} / \|w_g\|_2)

    Whole slices along ``dim`` become zero (Yuan and Lin 2006).

    Args:
        params: as in :func:`l1_`.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; one number or one per
            tensor.
        dim: the dimension whose indices are the groups, as in
            :func:`fusereg.functional.group_lasso_penalty`.

    Raises:
        TypeError, ValueError: as :func:`l1_`; also if a tensor has no dimension ``dim``.
    """
    op = "prox.group_lasso_"
    s = Strengths(group=threshold, dim=check_dim(op, dim))
    _prox(op, collect(op, without_dividing(params), s, "threshold"))


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
