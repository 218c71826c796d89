"""The entries of the fused dropouts: checked arguments, and which way a call takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as nnF

from ..core import checks, dispatch, draws, random
from ..core.random import Source
from . import op as ops
from .op import ACTIVATIONS, wide_dtype

#: The Philox state comes from torch's default generator.


# --- y = residual + dropout(x + bias) -------------------------------------------------------------


def add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    source: Source,
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
        and source.seed is None
        and source.generator is None
        and out is None
        and not (inplace or index_offset)
        and not dispatch.is_dynamo_compiling()
        and dispatch.ready(x, residual)
        and x.dim()
        and (
            bias is None
            or (
                dispatch.ready(bias)
                and bias.dtype is x.dtype
                and bias.shape == x.shape[-1:]
                and bias.device == x.device
            )
        )
    ):
        return ops.add.eager(  # type: ignore[no-any-return]
            x, bias, residual, random.new_state(x), p, rows, 0, op
        )

    p = checks.check_probability(p, op)
    _check_operands(x, bias, residual, op)
    x, bias, residual = _promoted(x, bias, residual, out if not inplace else x)
    checks.check_like(x, residual, x.shape, op, "residual")
    if bias is not None:
        checks.check_like(x, bias, x.shape[-1:], op, "bias")
    if rows and x.dim() == 0:
        raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")
    others = [t for t in (residual, bias) if t is not None]
    if out is not None:
        if inplace:
            raise ValueError(f"fusereg.{op}: inplace and out exclude each other")
        checks.check_target(x, out, op)
        _check_others(out, "out", others, op)
    if inplace:
        checks.check_in_place(x, op)
        _check_others(x, "x", others, op, in_place=True)
    if not training:
        p = 0.0
    target = x if inplace else out

    draw = (p, rows, index_offset)
    if not dispatch.direct(x, *others):
        if p == 0:
            wide = wide_dtype(x.dtype)
            y = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
            y = (residual.to(wide) + y).to(x.dtype)
        else:
            y = ops.add.traced(x, bias, residual, random.traced_state(x, source, op), *draw)
        return y if target is None else target.copy_(y)
    checks.check_index_offset(index_offset, op)
    if p == 0:  # nothing is drawn: samples are elements
        draw = (0.0, 0, index_offset)
    state = random.eager_state(x, source, op) if p else (0, 0)
    args = (x, bias, residual, state, *draw, op)
    if target is None:
        return ops.add.eager(*args)  # type: ignore[no-any-return]
    return ops.add.in_place(*args) if inplace else ops.add.into(target, *args)


def _check_operands(x: Tensor, bias: Tensor | None, residual: Tensor, op: str) -> None:
    checks.check_input(x, op)
    checks.check_input(residual, op, "residual")
    if bias is not None:
        checks.check_input(bias, op, "bias")
        if x.dim() == 0:
            raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")


def _promoted(
    x: Tensor, bias: Tensor | None, residual: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the operands in one dtype: under autocast, that of torch's sum."""
    dtypes = {t.dtype for t in (x, bias, residual) if t is not None}
    if len(dtypes) == 1 or not torch.is_autocast_enabled(x.device.type):
        return x, bias, residual
    common = x.dtype if target is x else torch.promote_types(x.dtype, residual.dtype)
    if bias is not None and target is not x:
        common = torch.promote_types(common, bias.dtype)
    return x.to(common), None if bias is None else bias.to(common), residual.to(common)


def _check_others(
    target: Tensor, name: str, others: list[Tensor], op: str, in_place: bool = False
) -> None:
    """Raise if an element is written that another still reads."""
    for other, what in zip(others, ("residual", "bias"), strict=False):
        if not in_place and torch.is_grad_enabled() and other.requires_grad:
            raise ValueError(
                f"fusereg.{op}: out= supports no gradients, and {what} requires one; "
                "leave out= away, or call under torch.no_grad()"
            )
        if checks.overlap_partly(other, target):
            raise ValueError(
                f"fusereg.{op}: {what} and {name} overlap in memory without being the same"
            )


# --- y = dropout(f(x)) ----------------------------------------------------------------------------

_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nnF.relu,
    "gelu": nnF.gelu,
    "gelu_tanh": lambda x: nnF.gelu(x, approximate="tanh"),
    "silu": nnF.silu,
}


def check_activation(activation: object, op: str) -> None:
    """Raise unless ``activation`` is the name of one."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"fusereg.{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def activate(
    x: Tensor,
    p: float,
    activation: str,
    training: bool,
    inplace: bool,
    source: Source,
    index_offset: int,
    out: Tensor | None,
    op: str,
) -> Tensor:
    """Compute activation_dropout."""
    if (
        training
        and type(p) is float
        and 0.0 < p <= 1.0
        and source.seed is None
        and source.generator is None
        and out is None
        and not (inplace or index_offset)
        and activation in ACTIVATIONS
        and not dispatch.is_dynamo_compiling()
        and dispatch.ready(x)
    ):
        return ops.activate.eager(  # type: ignore[no-any-return]
            x, random.new_state(x), p, activation, 0, op
        )

    p = checks.check_probability(p, op)
    check_activation(activation, op)
    checks.check_input(x, op)
    if out is not None:
        if inplace:
            raise ValueError(f"fusereg.{op}: inplace and out exclude each other")
        checks.check_target(x, out, op)
    if inplace:
        checks.check_in_place(x, op)
        if activation != "relu" and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"fusereg.{op}: {activation} in place overwrites x, which its gradient needs, and "
                "x requires one; use inplace=False, or relu"
            )
    if not training:
        p = 0.0
    target = x if inplace else out

    draw = (p, activation, index_offset)
    if not dispatch.direct(x):
        seed = random.traced_state(x, source, op) if p else None
        if p == 0 or dispatch.nested_jvp():
            y = _FORMULAS[activation](x.to(wide_dtype(x.dtype)))
            if p:
                y = draws.mask.traced(y, seed, p, False, 0, index_offset)
            y = y.to(x.dtype)
        else:
            y = ops.activate.traced(x, seed, *draw)
        return y if target is None else target.copy_(y)
    checks.check_index_offset(index_offset, op)
    state = random.eager_state(x, source, op) if p else (0, 0)
    args = (x, state, *draw, op)
    if target is None:
        return ops.activate.eager(*args)  # type: ignore[no-any-return]
    return ops.activate.in_place(*args) if inplace else ops.activate.into(target, *args)
