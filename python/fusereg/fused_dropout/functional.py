"""Dropout together with what stands before and after it, in one pass over memory."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..core import checks, dispatch, random
from ..core.docs import share_paragraphs
from ..core.hints import explains, refuse
from ..core.random import Source
from . import op as ops

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


@explains()
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
    **unknown: NoReturn,
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
    if unknown:
        refuse(bias_dropout_add, unknown)
    op, inplace = "bias_dropout_add", False
    return _add(x, bias, residual, p, training, inplace, seed, generator, index_offset, out, 0, op)


@explains()
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
    **unknown: NoReturn,
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
    if unknown:
        refuse(dropout_add, unknown)
    op = "dropout_add"
    return _add(x, None, residual, p, training, inplace, seed, generator, index_offset, out, 0, op)


@explains()
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
    **unknown: NoReturn,
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
    if unknown:
        refuse(drop_path_add, unknown)
    op = "drop_path_add"
    return _add(x, None, residual, p, training, inplace, seed, generator, index_offset, out, 1, op)


@explains()
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
    **unknown: NoReturn,
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
    if unknown:
        refuse(activation_dropout, unknown)
    op = "activation_dropout"
    if (
        # What training loops call, with as few questions as possible.
        training
        and type(p) is float
        and 0.0 < p <= 1.0
        and seed is None
        and generator is None
        and out is None
        and not (inplace or index_offset)
        and activation in ops.ACTIVATIONS
        and not dispatch.is_dynamo_compiling()
    ):
        found: Tensor | None = ops.activate_at_once((p, activation, 0, op), x)
        if found is not None:
            return found
    p = checks.check_probability(p, op)
    check_activation(activation, op)
    checks.check_input(x, op)
    target = checks.target(x, out, inplace, op)
    if inplace and activation != "relu" and torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"fusereg.{op}: {activation} in place overwrites x, which its gradient needs, and "
            "x requires one; use inplace=False, or relu"
        )
    p = p if training else 0.0
    checks.check_index_offset(index_offset, op)
    source = Source(seed, generator)
    if not dispatch.direct(x):
        if p:
            seed = random.traced_state(x, source, op)
            y = ops.activate.traced(x, seed, p, activation, index_offset)
        else:
            y = ops.activate_by_parts(x, None, p, activation, index_offset)
        return y if target is None else target.copy_(y)
    state = random.eager_state(x, source, op) if p else (0, 0)
    return ops.activate.to(target, x, state, p, activation, index_offset, op)


# --- the calls ------------------------------------------------------------------------------------


def _add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    out: Tensor | None,
    rows: int,
    op: str,
) -> Tensor:
    """Compute bias_dropout_add, dropout_add or, with a draw for each row, drop_path_add."""
    if (
        # What training loops call, with as few questions as possible.
        training
        and type(p) is float
        and 0.0 < p <= 1.0
        and seed is None
        and generator is None
        and out is None
        and not (inplace or index_offset)
        and residual is not None
        and not dispatch.is_dynamo_compiling()
    ):
        found: Tensor | None = ops.add_at_once((p, rows, 0, op), x, bias, residual)
        if found is not None:
            return found
    p = checks.check_probability(p, op)
    others = {"residual": residual} if bias is None else {"residual": residual, "bias": bias}
    checks.check_input(x, op)
    for name, t in others.items():
        checks.check_input(t, op, name)
    if x.dim() == 0 and (rows or bias is not None):
        raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")
    if not inplace:
        x, bias, residual = checks.promoted(x, bias, residual)
    elif torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    checks.check_like(x, residual, x.shape, op, "residual")
    if bias is not None:
        checks.check_like(x, bias, x.shape[-1:], op, "bias")
    target = checks.target(x, out, inplace, op)
    if target is not None:
        _check_others(target, others, inplace, op)
    p = p if training else 0.0
    checks.check_index_offset(index_offset, op)
    source = Source(seed, generator)
    if not dispatch.direct(x, *others.values()):
        if p:
            seed = random.traced_state(x, source, op)
            y = ops.add.traced(x, bias, residual, seed, p, rows, index_offset)
        else:
            y = ops.add_by_parts(x, bias, residual, None, p, rows, index_offset)
        return y if target is None else target.copy_(y)
    if not p:
        rows = 0  # nothing is drawn: samples are elements
    state = random.eager_state(x, source, op) if p else (0, 0)
    return ops.add.to(target, x, bias, residual, state, p, rows, index_offset, op)


def _check_others(target: Tensor, others: dict[str, Tensor], inplace: bool, op: str) -> None:
    """Raise if an element is written that another argument still reads."""
    for name, other in others.items():
        if not inplace and torch.is_grad_enabled() and other.requires_grad:
            raise ValueError(
                f"fusereg.{op}: out= supports no gradients, and {name} requires one; "
                "leave out= away, or call under torch.no_grad()"
            )
        if checks.overlap_partly(other, target):
            raise ValueError(
                f"fusereg.{op}: {name} and {'x' if inplace else 'out'} overlap in memory without "
                "being the same"
            )


def check_activation(activation: object, op: str) -> None:
    """Raise unless ``activation`` is the name of one."""
    if activation not in tuple(ops.ACTIVATIONS):
        raise ValueError(
            f"fusereg.{op}: activation must be one of {', '.join(ops.ACTIVATIONS)}, "
            f"got {activation!r}"
        )


for _function in (bias_dropout_add, dropout_add, drop_path_add, activation_dropout):
    share_paragraphs(_function, fused_arguments=_ARGUMENTS, fused_returns=_RETURNS)
