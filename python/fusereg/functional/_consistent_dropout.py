"""Dropout with one mask for all steps of a sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _dropout_ops

__all__ = ["consistent_dropout"]


def consistent_dropout(
    x: Tensor,
    p: float = 0.5,
    dim: int | None = 1,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Dropout whose mask is the same at each step along a dimension.

    :math:`y_{ntc} = x_{ntc} / (1-p)` for all t with probability :math:`1-p`, else 0 for all t: one
    draw for each (n, c), as variational dropout wants it for recurrent networks (Gal and Ghahramani
    2016, "A theoretically grounded application of dropout in recurrent neural networks"). For
    sequences that come step by step, see :class:`fusereg.nn.ConsistentDropout`.

    Args:
        x: float64, float32, float16 or bfloat16, of shape (N, T, C) or any other.
        p: the probability of dropping, within [0, 1]; 0 and ``training=False`` return ``x`` itself,
            1 gives zeros.
        dim: the dimension of the steps, along which the mask is the same. None: a draw for each
            element.
        training: whether to drop at all.
        seed: an integer that determines the mask, or an int64 tensor (seed, offset) on x's device.
            ``dropout_mask(shape, p, seed)`` is then the mask, with x's shape without ``dim``.
            Default: a new pair from ``generator``.
        generator: the torch.Generator to draw from; torch's default one if not given.
        index_offset: what is added to every index.

    The index that is drawn for counts x's other dimensions in row-major order, whatever the layout:
    row n of the mask does not depend on how many rows or steps there are. Nothing is kept for
    backward but the seed. A tensor that is not contiguous is copied first.

    Raises:
        TypeError, ValueError: as :func:`dropout`; also if x has no such dimension.

    Example:
        >>> y = fusereg.functional.consistent_dropout(sequences, 0.3, dim=1)
    """
    op = "consistent_dropout"
    _dropout_ops.check_probability(p, op)
    _dropout_ops.check_input(x, op)
    dim = None if dim is None else _dimension(dim, x.dim(), op)
    if not training or p == 0:
        return x
    rows = x.contiguous()
    if dim is not None:
        # As the kernels know it from channels_last images: the step is what the rows share.
        outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
        rows = rows.view(outer, x.shape[dim], inner).permute(0, 2, 1)
    y = _dropout_ops.dropout(
        rows,
        p,
        True,
        False,
        seed,
        generator,
        index_offset,
        None,
        False,
        0 if dim is None else 2,
        op,
    )
    return y if dim is None else y.permute(0, 2, 1).reshape(x.shape)


def _dimension(dim: object, dims: int, op: str) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"fusereg.{op}: dim must be an integer or None, got {type(dim).__name__}")
    if not -dims <= dim < dims:
        raise ValueError(f"fusereg.{op}: dim is {dim}, but x has {dims} dimensions")
    return dim % dims
