"""Dropout, residual addition and normalization in one pass."""

from __future__ import annotations

from typing import Literal, NoReturn, overload

import torch
from torch import Tensor

from ..core.docs import share_paragraphs
from ..core.hints import explains, refuse
from ..core.random import Source
from . import op as _dropout_norm_ops

_ARGUMENTS = """
        x: what is dropped, of shape (..., n): float64, float32, float16 or bfloat16.
        residual: what is added, of x's shape, or None. Of x's dtype; it may be float32 where x has
            16 bits, and then so is the sum.
"""
_MORE_ARGUMENTS = """
        p: the probability of dropping, within [0, 1]; 0 and ``training=False`` add and normalize
            only, 1 normalizes ``residual`` alone.
"""
_DROPOUT_ARGUMENTS = """
        training: whether to drop at all.
        seed: as in :func:`dropout`.
        generator: as in :func:`dropout`.
        index_offset: as in :func:`dropout`.
        return_sum: whether to return s as well, for networks that normalize first and add later
            (pre-norm): s is the next residual. Its gradient is added in backward.
"""
_NOTES = """
    Returns y of x's shape and dtype; with ``return_sum`` the pair (y, s), s of residual's dtype
    (of x's without one; without dropping and residual, s is ``x`` itself).

    The mask is that of :func:`dropout`: ``fusereg.dropout_mask(x.shape, p, seed)``, indices in
    row-major order whatever the layout; it is drawn again in backward. A dropped inf or NaN becomes
    0. One launch forward, one backward. Arithmetic and statistics are in float32 (float64 for
    float64), results are rounded once; y is right to float32 even where a row's mean is 10,000
    times its standard deviation. Kept for backward: s, which costs nothing where it is returned,
    and 12 bytes a row (4 for RMS). For dropout and normalization one after the other torch keeps s,
    the mask and the statistics.

    Under autocast y keeps x's dtype, as statistics are in float32 anyway; weight and bias may stay
    float32. A residual whose dtype does not go with x's is taken there, too: both get the dtype
    that torch's sum has. Gradients of weight and bias are added in a fixed order. Twice
    differentiable: the second derivative is a formula of torch operations. Under ``torch.func``
    transforms and in forward mode the steps run one by one, with the same mask.

    Raises:
        TypeError: an argument is not a tensor, ``p`` or ``eps`` not a number, ``seed`` not an
            integer or tensor.
        ValueError: ``p`` is outside [0, 1], ``eps`` negative; shapes, dtypes or devices do not
            fit; ``x`` is of an integer, complex or other dtype, sparse or nested.
"""


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    p: float = ...,
    eps: float = ...,
    training: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    index_offset: int = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    p: float = ...,
    eps: float = ...,
    training: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    index_offset: int = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    p: float = ...,
    eps: float = ...,
    training: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    index_offset: int = ...,
    return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@explains()
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.5,
    eps: float = 1e-5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    return_sum: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Apply layer normalization to residual + dropout(x) over the last dimension.

    :math:`s = r + m \odot x / (1-p)` and :math:`y = \frac{s - \mathrm{E}[s]}{\sqrt{\mathrm{Var}[s]
    + \epsilon}} \odot w + b` (Ba et al. 2016; Srivastava et al. 2014).

    Args:
    {arguments}
        weight: of shape (n,), or None for ones. Of x's dtype, or float32 where x has 16 bits.
        bias: of shape (n,) and weight's dtype, or None for zeros.
    {more_arguments}
        eps: what is added to the variance, which is the biased one.
    {dropout_arguments}

    {notes}

    Example:
        >>> y = F.dropout_add_layer_norm(attention(x), x, norm.weight, norm.bias, 0.1)
    """
    if unknown:
        refuse(dropout_add_layer_norm, unknown)
    return _dropout_norm_ops.dropout_norm(
        x,
        residual,
        weight,
        bias,
        p,
        eps,
        training,
        False,
        Source(seed, generator),
        index_offset,
        return_sum,
        "dropout_add_layer_norm",
    )


@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = ...,
    p: float = ...,
    eps: float | None = ...,
    training: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    index_offset: int = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = ...,
    p: float = ...,
    eps: float | None = ...,
    training: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    index_offset: int = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = ...,
    p: float = ...,
    eps: float | None = ...,
    training: bool = ...,
    *,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    index_offset: int = ...,
    return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@explains()
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    p: float = 0.5,
    eps: float | None = None,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    return_sum: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Apply RMS normalization to residual + dropout(x) over the last dimension.

    :math:`s = r + m \odot x / (1-p)` and :math:`y = \frac{s}{\sqrt{\mathrm{E}[s^2] + \epsilon}}
    \odot w` (Zhang, Sennrich 2019; Srivastava et al. 2014).

    Args:
    {arguments}
        weight: of shape (n,), or None for ones. Of x's dtype, or float32 where x has 16 bits.
    {more_arguments}
        eps: what is added to the mean square; if not given, as in torch, the machine epsilon of
            float32 (of float64 for float64).
    {dropout_arguments}

    {notes}

    Example:
        >>> y, s = F.dropout_add_rms_norm(mlp(y), s, norm.weight, 0.1, return_sum=True)
    """
    if unknown:
        refuse(dropout_add_rms_norm, unknown)
    return _dropout_norm_ops.dropout_norm(
        x,
        residual,
        weight,
        None,
        p,
        eps,
        training,
        True,
        Source(seed, generator),
        index_offset,
        return_sum,
        "dropout_add_rms_norm",
    )


for _function in (dropout_add_layer_norm, dropout_add_rms_norm):
    share_paragraphs(
        _function,
        arguments=_ARGUMENTS,
        more_arguments=_MORE_ARGUMENTS,
        dropout_arguments=_DROPOUT_ARGUMENTS,
        notes=_NOTES,
    )
