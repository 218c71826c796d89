"""Dropout of elements, channels, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..core import checks, draws
from ..core.docs import share_paragraphs
from ..core.draws import Kind
from ..core.hints import explains, refuse


def _rows(least: int, most: int = 64) -> dict[int, int]:
    """Return ``least`` counted dimensions for an input of each number of dimensions from there."""
    return dict.fromkeys(range(least, most + 1), least)


_DROPOUT = Kind("dropout")
_DROPOUT1D = Kind("dropout1d", rows={2: 1, 3: 2}, strict=True)
_DROPOUT2D = Kind("dropout2d", rows=_rows(2), expected=(4,))
_DROPOUT3D = Kind("dropout3d", rows={**_rows(1), 5: 2}, expected=(4, 5))
_ALPHA = Kind("alpha_dropout", alpha=True)
_FEATURE_ALPHA = Kind("feature_alpha_dropout", alpha=True, rows=_rows(2))
_DROP_PATH = Kind("drop_path", rows=_rows(1))

_DROPOUT_ARGUMENTS = """
        p: the probability of dropping, within [0, 1]; a number of Python or NumPy, or a tensor of
            one element. 0 and ``training=False`` return ``input`` itself, 1 gives zeros.
        training: whether to drop at all.
        inplace: write the result into ``input``.
        seed: an integer that determines the mask, or an int64 tensor (seed, offset) on the same
            device, which is read by the kernel. Default: a new state from ``generator``.
        generator: the torch.Generator to draw from; torch's default one if not given. Under
            torch.compile it breaks the graph, and ``fullgraph=True`` does not take it: pass a
            ``seed`` tensor there.
        index_offset: what is added to every index, so that a shard of a larger tensor gets its part
            of the whole tensor's mask under one ``seed``. DTensors see to it by themselves: a shard
            along the first dimension gets its part, replicas get the same mask.
"""
_DROPOUT_RETURNS = """
    Nothing is kept for backward but the seed: the mask is drawn again. It is a function of seed,
    offset and index alone, the same bits on every device, dtype, instruction set and thread count.
    Without ``seed``, ``generator``, ``index_offset`` and ``inplace``, float32 and float64 tensors
    on the CPU of at most 1024 elements keep their factors, which is faster: the gradient of a
    dropped element is then 0 times the incoming one, as in torch (NaN for an infinite one, else a
    zero of either sign), and otherwise +0.
    The effective probability is a multiple of 2^-16 (2^-32 where that would miss p or 1 - p by more
    than 1 part in 1024), and the scale is made from it, so the mean is unbiased. A dropped inf or
    NaN becomes 0, where torch gives NaN.

    Raises:
        TypeError: ``input`` is not a tensor, ``p`` not a number, or ``seed`` neither an integer nor
            a tensor.
        ValueError: ``p`` is outside [0, 1]; ``input`` has a number of dimensions that this kind
            does not take; elements are to be dropped, and it is of an integer, complex or other
            dtype, sparse, or nested and not jagged; ``out`` does not fit.
"""


@explains()
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    out: Tensor | None = None,
    **unknown: NoReturn,
) -> Tensor:
    r"""Apply dropout: :math:`y_i = x_i / (1-p)` with probability :math:`1-p`, else 0.

    This is inverted dropout (Srivastava et al. 2014): evaluation needs no scaling.

    Args:
        input: x, float64, float32, float16 or bfloat16, of any shape and layout, or a jagged nested
            tensor; any tensor where nothing is dropped.
    {dropout_arguments}
        out: where to write the result, under ``torch.no_grad()``.

    The index of an element is its position in memory: for a contiguous tensor that is row-major
    order, for a channels_last or permuted one the order in which it lies (a tensor with gaps, or an
    expanded one, is taken as ``torch.empty_like`` would lay it out; under ``torch.func`` transforms
    the order is always row-major). :func:`fusereg.dropout_mask` shows the mask.
    {dropout_returns}

    Example:
        >>> y = fusereg.functional.dropout(x, 0.1, training=model.training)
    """
    if unknown:
        refuse(dropout, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _DROPOUT, out)


@explains()
def dropout_mask(
    shape: Sequence[int],
    p: float,
    seed: int,
    offset: int = 0,
    *,
    index_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return dropout's mask: True where a contiguous tensor of this shape keeps its element.

    ``dropout(x, p, seed=seed)`` keeps what ``dropout_mask(x.shape, p, seed)`` says; rows of channel
    dropout have the mask of shape (N, C).

    Args:
        shape: of the tensor.
        p: the probability of dropping, within [0, 1].
        seed: the key of Philox4x32-7; 64 bits count.
        offset: a multiple of 4; offset / 4 is the low half of the counter.
        index_offset: the index of the first element.
        device: where the mask is wanted; the bits are the same everywhere.

    Raises:
        TypeError, ValueError: ``p`` is not a number within [0, 1], ``seed`` or ``offset`` not an
            integer, or a size negative.

    Example:
        >>> fusereg.dropout_mask((2, 8), 0.5, seed=1).float().mean()
    """
    op = "dropout_mask"
    p = checks.check_probability(p, op)
    if isinstance(shape, int):
        shape = (shape,)
    if any(size < 0 for size in shape):
        raise ValueError(f"fusereg.{op}: shape must have no negative size, got {tuple(shape)}")
    ones = torch.ones(tuple(shape), dtype=torch.float32, device=device)
    if p == 0:
        return ones != 0
    kept: Tensor = draws.mask.kernel(ones, (seed, offset), p, False, 0, index_offset, op)
    return kept != 0


@explains()
def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Drop whole channels of (N, C, L) or (C, L): one draw for each (n, c) (Tompson et al. 2015).

    Args:
        input: as in :func:`dropout`.
    {dropout_arguments}

    The index that is drawn for is :math:`n C + c`, for contiguous and channels_last tensors alike.
    {dropout_returns}
    """
    if unknown:
        refuse(dropout1d, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _DROPOUT1D)


@explains()
def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Drop whole channels of (N, C, H, W): one draw for each (n, c) (Tompson et al. 2015).

    Three dimensions are taken as (N, C, L), and any other number from two on as (N, C, ...), both
    with a warning, as torch does.

    Args:
        input: as in :func:`dropout`.
    {dropout_arguments}

    The index that is drawn for is :math:`n C + c`, for contiguous and channels_last tensors alike.
    {dropout_returns}
    """
    if unknown:
        refuse(dropout2d, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _DROPOUT2D)


@explains()
def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Drop whole channels of (N, C, D, H, W) or (C, D, H, W) (Tompson et al. 2015).

    Any other number of dimensions is taken as (C, ...), with a warning, as torch does.

    Args:
        input: as in :func:`dropout`.
    {dropout_arguments}

    The index that is drawn for is :math:`n C + c`, for contiguous and channels_last tensors alike.
    {dropout_returns}
    """
    if unknown:
        refuse(dropout3d, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _DROPOUT3D)


@explains()
def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Apply alpha dropout, which keeps mean 0 and variance 1 (Klambauer et al. 2017).

    :math:`y = a (m x + (1 - m) s) + b` with :math:`s = -1.7581`, the limit of SELU,
    :math:`a = (q (1 + (1-q) s^2))^{-1/2}` and :math:`b = -a (1-q) s`, where :math:`q = 1-p` is the
    probability that :math:`m` is 1. ``p=1`` gives zeros.

    Args:
        input: as in :func:`dropout`.
    {dropout_arguments}

    {dropout_returns}
    """
    if unknown:
        refuse(alpha_dropout, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _ALPHA)


@explains()
def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Apply alpha dropout to whole channels: one draw for each (n, c) of (N, C, ...).

    Args:
        input: as in :func:`dropout`, of at least two dimensions.
    {dropout_arguments}

    The formula is that of :func:`alpha_dropout`, the index :math:`n C + c`.
    {dropout_returns}
    """
    if unknown:
        refuse(feature_alpha_dropout, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _FEATURE_ALPHA)


@explains()
def drop_path(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Drop whole samples of (N, ...), one draw for each n: stochastic depth (Huang et al. 2016).

    :math:`y_n = x_n / (1-p)` with probability :math:`1-p`, else 0. A dropped sample is not read.

    Args:
        input: as in :func:`dropout`, of at least one dimension.
    {dropout_arguments}

    {dropout_returns}

    Example:
        >>> x = x + fusereg.functional.drop_path(block(x), 0.1, model.training)
    """
    if unknown:
        refuse(drop_path, unknown)
    return draws.dropout(input, p, training, inplace, seed, generator, index_offset, _DROP_PATH)


for _function in (
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    alpha_dropout,
    feature_alpha_dropout,
    drop_path,
):
    draws.public[_function.__name__] = _function
    share_paragraphs(
        _function, dropout_arguments=_DROPOUT_ARGUMENTS, dropout_returns=_DROPOUT_RETURNS
    )
