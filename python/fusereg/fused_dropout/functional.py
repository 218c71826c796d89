"""Dropout together with what stands before and after it, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.docs import share_paragraphs
from ..core.random import Source
from . import entry as _fused_dropout

__all__ = ["activation_dropout", "bias_dropout_add", "drop_path_add", "dropout_add"]

_ARGUMENTS = """
        training: whether to drop at all. Without it, or with ``p=0``, the rest of the formula
            stays.
        seed: as in :func:`dropout`; ``dropout_mask(x.shape, p, seed)`` is then the mask of a
            contiguous ``x``.
        generator: as in :func:`dropout`.
        index_offset: as in :func:`dropout`.
"""
_RETURNS = """
    Forward and backward are one launch each, and nothing is kept for backward but the seed. The
    mask, the effective probability and what becomes of a dropped inf or NaN (nothing: its term is
    0) are as in :func:`dropout`. All tensors have one dtype, float64, float32, float16 or bfloat16
    (under autocast several may come: the result has the one that torch's sum would have); 16-bit
    ones are computed in float32 and rounded once. Under ``torch.func`` transforms the formula is
    computed by its parts.

    Raises:
        TypeError: what should be a tensor is none, ``p`` no number, ``seed`` no integer or tensor.
        ValueError: ``p`` is outside [0, 1]; shapes, dtypes or devices do not fit; ``out``, or ``x``
            in place, shares memory with another argument in another order.
"""


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Apply bias, dropout and a residual connection: :math:`y = r + \mathrm{dropout}(x + b)`.

    Args:
        x: of any shape and layout.
        bias: of shape (x.shape[-1],), or None for :func:`dropout_add`.
        residual: of x's shape.
        p: the probability of dropping, within [0, 1]; 1 gives the residual.
    {fused_arguments}
        out: where to write the result, under ``torch.no_grad()``; may be ``x`` or ``residual``.

    The gradient of the bias is summed in float64 (on CUDA after at most 8 float32 terms), before
    the gradient is rounded to the dtype, in an order that depends on the shape alone; that of the
    residual is the gradient itself, not a copy.
    {fused_returns}

    Example:
        >>> y = bias_dropout_add(linear_without_bias(h), linear.bias, h, 0.1, model.training)
    """
    return _fused_dropout.add(
        x,
        bias,
        residual,
        p,
        training,
        False,
        Source(seed, generator),
        index_offset,
        out,
        0,
        "bias_dropout_add",
    )


def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Apply dropout and a residual connection: :math:`y = r + \mathrm{dropout}(x)`.

    Args:
        x: of any shape and layout.
        residual: of x's shape.
        p: the probability of dropping, within [0, 1]; 1 gives the residual.
        inplace: write the result into ``x``.
    {fused_arguments}
        out: where to write the result, under ``torch.no_grad()``; may be ``x`` or ``residual``.
    {fused_returns}

    Example:
        >>> h = fusereg.functional.dropout_add(attention(h), h, 0.1, model.training)
    """
    return _fused_dropout.add(
        x,
        None,
        residual,
        p,
        training,
        inplace,
        Source(seed, generator),
        index_offset,
        out,
        0,
        "dropout_add",
    )


def drop_path_add(
    x: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Apply stochastic depth and its residual connection (Huang et al. 2016).

    :math:`y_n = r_n + x_n / (1-p)` with probability :math:`1-p`, else :math:`r_n`: one draw for
    each sample of (N, ...). A dropped sample is not read.

    Args:
        x: of shape (N, ...).
        residual: of x's shape.
        p: the probability of dropping a sample, within [0, 1]; 1 gives the residual.
        inplace: write the result into ``x``.
        training: whether to drop at all. Without it, or with ``p=0``, the sum stays.
        seed: as in :func:`dropout`; ``dropout_mask((N,), p, seed)`` is then the mask.
        generator: as in :func:`dropout`.
        index_offset: the first sample's index in the whole batch.
        out: where to write the result, under ``torch.no_grad()``; may be ``x`` or ``residual``.
    {fused_returns}

    Example:
        >>> h = fusereg.functional.drop_path_add(block(h), h, 0.1, model.training)
    """
    return _fused_dropout.add(
        x,
        None,
        residual,
        p,
        training,
        inplace,
        Source(seed, generator),
        index_offset,
        out,
        1,
        "drop_path_add",
    )


def activation_dropout(
    x: Tensor,
    p: float = 0.5,
    activation: str = "relu",
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Apply an activation and dropout: :math:`y = \mathrm{dropout}(f(x))`.

    ``"relu"``: :math:`\max(x, 0)`. ``"gelu"``: :math:`x \Phi(x)` with the normal distribution
    function (Hendrycks, Gimpel 2016), ``"gelu_tanh"``: its tanh form. ``"silu"``:
    :math:`x / (1 + e^{-x})`. Exponential and distribution function are the kernel's own, good to
    some units of the last place in the tails too (``"gelu_tanh"`` as far as its cubic argument is),
    and the same bits on every CPU instruction set.

    Args:
        x: of any shape and layout.
        p: the probability of dropping, within [0, 1]; 1 gives zeros.
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        inplace: write the result into ``x``. With a gradient this is for relu alone: the others'
            derivative needs ``x``, and a copy of it would cost what writing in place saves.
    {fused_arguments}
        out: where to write the result, under ``torch.no_grad()``.

    Kept for backward is ``x`` (for relu the result, whose sign tells what was kept), no mask.
    {fused_returns}

    Example:
        >>> h = fusereg.functional.activation_dropout(linear(x), 0.1, "gelu", model.training)
    """
    return _fused_dropout.activate(
        x,
        p,
        activation,
        training,
        inplace,
        Source(seed, generator),
        index_offset,
        out,
        "activation_dropout",
    )


for _function in (bias_dropout_add, dropout_add, drop_path_add, activation_dropout):
    share_paragraphs(_function, fused_arguments=_ARGUMENTS, fused_returns=_RETURNS)
