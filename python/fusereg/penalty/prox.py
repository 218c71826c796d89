r"""Proximal steps in place: the way to weights that are exactly zero.

The proximal operator of a penalty R is
:math:`\mathrm{prox}_R(v) = \arg\min_w \tfrac12 \|w - v\|^2 + R(w)` (Moreau 1965; Parikh and Boyd
2014). A proximal gradient step is a gradient step on the loss, then ``prox`` with the step's
learning rate in the threshold::

    optimizer.step()
    fusereg.prox.l1_(model.parameters(), threshold=lr * l1)

Each step reads and writes every element once, over all tensors in one call. Zeros are ``+0.0``, NaN
stays NaN. Nothing is recorded for autograd, and nothing is returned; :func:`fusereg.sparsity`
counts zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks, dispatch, distributed
from ..core import params as _params
from ..core.params import Params, Strength
from . import kernels as _penalty_kernels
from . import op as _penalty_ops

__all__ = ["elastic_net_", "group_lasso_", "l1_"]


def l1_(params: Params, threshold: Strength) -> None:
    r"""Soft-thresholding, :math:`w \leftarrow \mathrm{sign}(w)\max(|w| - t, 0)` (Donoho 1995).

    Args:
        params: a tensor, an iterable of tensors, or a module; changed in place. Any mix of float64,
            float32, float16, bfloat16, devices and layouts.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; one number or one per
            tensor.

    Raises:
        TypeError, ValueError: as :func:`fusereg.functional.l1_penalty`; also for expanded tensors
            and for two tensors over the same memory. Nothing is changed then.
    """
    op = "prox.l1_"
    _prox(op, *_penalty_ops.collect(params, (threshold, 0.0, 0.0), op, ("threshold", "", "")))


def elastic_net_(params: Params, l1: Strength, l2: Strength) -> None:
    r"""The elastic net's step, :math:`w \leftarrow \mathrm{sign}(w)\max(|w| - l_1, 0) / (1 + l_2)`.

    It is the proximal operator of :math:`l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2`.

    Args:
        params: as in :func:`l1_`.
        l1: learning rate times lambda_1, >= 0; one number or one per tensor.
        l2: learning rate times lambda_2, >= 0; one number or one per tensor.

    Raises:
        TypeError, ValueError: as :func:`l1_`.
    """
    op = "prox.elastic_net_"
    _prox(op, *_penalty_ops.collect(params, (l1, l2, 0.0), op))


def group_lasso_(params: Params, threshold: Strength, dim: int = 0) -> None:
    r"""Block soft-thresholding, :math:`w_g \leftarrow w_g \max(0, 1 - t \sqrt{n_g} / \|w_g\|_2)`.

    Whole slices along ``dim`` become zero (Yuan and Lin 2006).

    Args:
        params: as in :func:`l1_`.
        threshold: :math:`t \ge 0`, usually learning rate times lambda; one number or one per
            tensor.
        dim: the dimension that counts the groups, as in
            :func:`fusereg.functional.group_lasso_penalty`.

    Raises:
        TypeError, ValueError: as :func:`l1_`; also if a tensor has no dimension ``dim``.
    """
    op = "prox.group_lasso_"
    tensors, s = _penalty_ops.collect(
        params, (0.0, 0.0, threshold), op, names=("", "", "threshold")
    )
    _prox(op, tensors, s, _params.check_dim(dim, op))


def _prox(op: str, tensors: list[Tensor], s: _penalty_kernels.Strengths, dim: int = 0) -> None:
    if not tensors:
        return
    if not dispatch.eager():
        for i, t in enumerate(tensors):
            checks.check(t, op, f"params[{i}]")
        with torch.no_grad():
            torch.ops.fusereg.prox_(tensors, *s.lists(len(tensors)), dim)
    elif distributed.has_dtensor(tensors):
        from . import dtensor as _dtensor

        _dtensor.prox_(op, tensors, s, dim)
    else:
        _penalty_kernels.prox_(op, tensors, s, dim)
