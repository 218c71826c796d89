"""Penalties that are no sum over the elements or groups of weights, and the max-norm constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.hints import explains
from ..core.params import Params
from .functional import elastic_net_penalty
from .strengths import Strength, Strengths, check_dim, check_number, collect, dimension_of

__all__ = ["activity_penalty", "orthogonality_penalty", "spectral_norm_penalty"]


@explains()
def activity_penalty(x: Tensor, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    r"""Return the mean over a batch of a penalty on activations.

    .. math:: \frac{1}{N} \left( l_1 \sum_i |x_i| + l_2 \sum_i x_i^2 \right)

    with N the size of the first dimension: the loss of Keras's ActivityRegularization, whose second
    term has no factor 1/2.

    Args:
        x: activations [N, ...], float64, float32, float16 or bfloat16.
        l1, l2: strengths >= 0.

    Returns:
        A 0-d tensor, float32 (float64 for float64); 0 for an empty batch.

    Raises:
        TypeError, ValueError: as :func:`l1_penalty`; also if x has no dimension.

    Example:
        >>> hidden = torch.relu(layer(x))
        >>> loss = criterion(head(hidden), y) + activity_penalty(hidden, l1=1e-4)
    """
    op = "activity_penalty"
    checks.check_input(x, op)
    if x.dim() == 0:
        raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")
    for name, strength in (("l1", l1), ("l2", l2)):
        if not isinstance(strength, (int, float)) or not 0.0 <= strength < math.inf:
            check_number(strength, f"fusereg.{op}: {name}")
    return elastic_net_penalty([x], l1, 2 * l2) / max(x.shape[0], 1)


@explains()
def orthogonality_penalty(params: Params, strength: Strength, dim: int = 0) -> Tensor:
    r"""Return the soft orthogonality penalty :math:`\lambda \sum_W \|W W^T - I\|_F^2`.

    The rows of the matrix W are the slices of a weight along ``dim``. Where there are more rows
    than columns, they cannot be orthogonal, and the columns are: :math:`W^T W - I` (Bansal, Chen,
    Wang 2018). Computed by torch's operations in float32 (float64 for float64), the smaller of both
    products alone.

    Args:
        params: a tensor, an iterable of tensors, or a module (its parameters). Tensors of fewer
            than two dimensions, such as biases, are left out.
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        dim: the dimension whose indices are the rows.

    Returns:
        A 0-d tensor, float32 (float64 if any weight is).

    Raises:
        TypeError, ValueError: as :func:`l1_penalty`; also if a tensor has no dimension ``dim``.

    Example:
        >>> loss = criterion(model(x), y) + orthogonality_penalty(model.fc.weight, 1e-3)
    """

    def value(w: Tensor) -> Tensor:
        w = w if w.shape[0] <= w.shape[1] else w.T
        one = torch.eye(w.shape[0], dtype=w.dtype, device=w.device)
        return (w @ w.T - one).square().sum()

    return _over_matrices("orthogonality_penalty", params, strength, dim, value)


@explains()
def spectral_norm_penalty(params: Params, strength: Strength, dim: int = 0) -> Tensor:
    r"""Return the penalty :math:`\tfrac{\lambda}{2} \sum_W \sigma_{max}(W)^2` of spectral norms.

    See Yoshida and Miyato 2017. The largest singular value is exact, by torch's singular value
    decomposition in float32 (float64 for float64); its gradient is not defined where two are equal.

    Args:
        params: a tensor, an iterable of tensors, or a module (its parameters). Tensors of fewer
            than two dimensions are left out.
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        dim: the dimension whose indices are the rows of the matrix; the others are its columns.

    Returns:
        A 0-d tensor, float32 (float64 if any weight is).

    Raises:
        TypeError, ValueError: as :func:`l1_penalty`; also if a tensor has no dimension ``dim``.

    Example:
        >>> loss = criterion(model(x), y) + spectral_norm_penalty(model, 1e-2)
    """

    def value(w: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(w, 2)
        return 0.5 * norm.square() if w.numel() else w.sum()

    return _over_matrices("spectral_norm_penalty", params, strength, dim, value)


def _over_matrices(
    op: str, params: Params, strength: Strength, dim: int, value: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the sum of strength * value(matrix) over the tensors of two dimensions or more."""
    listed = collect(op, params, Strengths(l1=strength, dim=check_dim(op, dim)), "strength")
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for i, (w, (own, *_)) in enumerate(
        zip(listed.tensors, listed.strengths.each(len(listed.tensors)), strict=True)
    ):
        checks.check(w, op, f"params[{i}]")
        if w.dim() < 2 or own == 0.0:
            continue
        rows = _by_rows(op, i, w, dim)
        wide = rows if w.dtype is torch.float64 else rows.float()
        total = total.to(w.device) + own * value(wide)
    return total


def _by_rows(op: str, i: int, w: Tensor, dim: int) -> Tensor:
    """Return a weight as a matrix whose rows are the slices along a dimension."""
    dim = dimension_of(w, dim, f"fusereg.{op}: dim", f"params[{i}]")
    return w.movedim(dim, 0).flatten(1)


def limited(
    op: str, tensors: Sequence[Tensor], limits: Iterator[float], dim: int
) -> list[tuple[Tensor, Tensor]]:
    """Return each weight of two dimensions or more, and the factors that keep slices in limits."""
    found = []
    for i, (w, limit) in enumerate(zip(tensors, limits, strict=True)):
        checks.check(w, op, f"params[{i}]")
        if w.dim() < 2:
            continue
        rows = _by_rows(op, i, w.detach(), dim)
        norms = torch.linalg.vector_norm(
            rows, dim=1, dtype=torch.float64 if w.dtype is torch.float64 else torch.float32
        )
        shape = [1] * w.dim()
        shape[dim] = -1
        # Where the norm is within the limit, and for NaN, the factor is 1 or NaN.
        factor = torch.where(norms <= limit, 1.0, limit / norms)
        found.append((w, factor.view(shape)))
    return found
