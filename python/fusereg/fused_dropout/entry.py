"""The entries of the fused dropouts: checked arguments, and which way a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnF

from ..core import checks, dispatch, draws, operator, random
from ..core.draws import Call
from ..core.operator import applied
from . import op as ops
from .op import ACTIVATIONS, Activate, Add, AddInPlace, ReluInPlace, wide_dtype

#: apply() without its question for functorch, which the gate has answered: see draws.
_apply_add: Callable[..., Tensor] = super(torch.autograd.Function, Add).apply
_apply_activate: Callable[..., Tensor] = super(torch.autograd.Function, Activate).apply


def _ordinary(t: object) -> bool:
    return type(t) is Tensor or type(t) is torch.nn.Parameter


def _readable(t: Tensor) -> bool:
    return (
        _ordinary(t)
        and t.dtype in checks.SUPPORTED_DTYPES
        and t.layout is torch.strided
        and (t.is_cpu or t.is_cuda)
    )


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        dispatch.forward_mode() or any(t is not None and t.requires_grad for t in tensors)
    )


# --- y = residual + dropout(x + bias) -------------------------------------------------------------


def add(
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
    row_dims: int,
    op: str,
) -> Tensor:
    """bias_dropout_add, dropout_add and (row_dims 1) drop_path_add."""
    if (
        # What training loops call, with as few questions as possible.
        training
        and type(p) is float
        and 0.0 < p <= 1.0
        and seed is None
        and generator is None
        and out is None
        and not (inplace or index_offset)
        and dispatch.eager()
        and _readable(x)
        and _ordinary(residual)
        and residual.dtype is x.dtype
        and residual.shape == x.shape
        and residual.device == x.device
        and x.dim()
        and (
            bias is None
            or (
                _ordinary(bias)
                and bias.dtype is x.dtype
                and bias.shape == x.shape[-1:]
                and bias.device == x.device
            )
        )
    ):
        call = Call(*random.new_pair(x), p, False, row_dims, 0, op)
        if _differentiated(x, bias, residual):
            return _apply_add(x, bias, residual, call)
        return ops.add(call, x, bias, residual)

    checks.check_probability(p, op)
    _check_operands(x, bias, residual, op)
    x, bias, residual = _promoted(x, bias, residual, out if not inplace else x)
    _check_like(x, residual, x.shape, op, "residual")
    if bias is not None:
        _check_like(x, bias, x.shape[-1:], op, "bias")
    if row_dims and x.dim() == 0:
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

    plain = all(_ordinary(t) for t in (x, *others)) and x.device.type != "meta"
    if not (plain and dispatch.eager()):
        return _observed_add(
            x, bias, residual, p, seed, generator, index_offset, target, row_dims, op
        )
    checks.check_index_offset(index_offset, op)
    numbers = random.eager_pair(x.device, seed, generator, op) if p else (0, 0)
    # Nothing is drawn at p = 0: samples are elements.
    call = Call(*numbers, float(p), False, row_dims if p else 0, index_offset, op)
    if out is not None:
        return operator.written(ops.run_add(out, x, bias, residual, call))
    differentiated = _differentiated(x, bias, residual)
    if not inplace:
        if differentiated:
            return _apply_add(x, bias, residual, call)
        return ops.add(call, x, bias, residual)
    if dispatch.forward_mode():
        return x.copy_(_apply_add(x, bias, residual, call))
    if differentiated:
        return applied(AddInPlace, x, bias, residual, call)
    return operator.written(ops.run_add(x, x, bias, residual, call))


def _check_operands(x: Tensor, bias: Tensor | None, residual: Tensor, op: str) -> None:
    checks.check_input(x, op)
    checks.check_input(residual, op, "residual")
    if bias is not None:
        checks.check_input(bias, op, "bias")
        if x.dim() == 0:
            raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")


def _check_like(x: Tensor, t: Tensor, shape: torch.Size, op: str, name: str) -> None:
    if t.shape != shape:
        raise ValueError(
            f"fusereg.{op}: {name} must have shape {tuple(shape)}, got {tuple(t.shape)}"
        )
    if t.dtype != x.dtype or t.device != x.device:
        raise ValueError(
            f"fusereg.{op}: {name} must be {x.dtype} on {x.device} as x is, "
            f"got {t.dtype} on {t.device}"
        )


def _promoted(
    x: Tensor, bias: Tensor | None, residual: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Under autocast, what comes in several dtypes is taken in the one that torch's sum has."""
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
    """What is written must not be read later by another element."""
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


def _observed_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    target: Tensor | None,
    row_dims: int,
    op: str,
) -> Tensor:
    """Under a compiler, a mode or a transform, and for subclasses."""
    if p == 0 or dispatch.functorch():
        wide = wide_dtype(x.dtype)
        y = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
        if p:
            y = draws.dropout(
                y, p, True, False, seed, generator, index_offset, None, False, row_dims, op
            )
        y = (residual.to(wide) + y).to(x.dtype)
    else:
        pair = random.operator_pair(x.device, seed, generator, op)
        y = torch.ops.fusereg.fused_dropout_add(
            x, bias, residual, pair, float(p), row_dims, index_offset
        )
    return y if target is None else target.copy_(y)


# --- y = dropout(f(x)) ----------------------------------------------------------------------------

_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nnF.relu,
    "gelu": nnF.gelu,
    "gelu_tanh": lambda x: nnF.gelu(x, approximate="tanh"),
    "silu": nnF.silu,
}


def check_activation(activation: object, op: str) -> None:
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
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    out: Tensor | None,
    op: str,
) -> Tensor:
    """activation_dropout."""
    if (
        training
        and type(p) is float
        and 0.0 < p <= 1.0
        and seed is None
        and generator is None
        and out is None
        and not (inplace or index_offset)
        and activation in ACTIVATIONS
        and dispatch.eager()
        and _readable(x)
    ):
        call = Call(*random.new_pair(x), p, False, 0, 0, op)
        if operator.differentiated(x):
            return _apply_activate(x, activation, call)
        return ops.activate(call, x, activation)

    checks.check_probability(p, op)
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

    if not (_ordinary(x) and x.device.type != "meta" and dispatch.eager()):
        return _observed_activate(x, p, activation, seed, generator, index_offset, target, op)
    checks.check_index_offset(index_offset, op)
    numbers = random.eager_pair(x.device, seed, generator, op) if p else (0, 0)
    call = Call(*numbers, float(p), False, 0, index_offset, op)
    if out is not None:
        return operator.written(ops.run_activate(out, x, activation, call))
    if not inplace:
        if operator.differentiated(x):
            return _apply_activate(x, activation, call)
        return ops.activate(call, x, activation)
    if dispatch.forward_mode():
        return x.copy_(_apply_activate(x, activation, call))
    if torch.is_grad_enabled() and x.requires_grad:
        return applied(ReluInPlace, x, call)
    return operator.written(ops.run_activate(x, x, activation, call))


def _observed_activate(
    x: Tensor,
    p: float,
    activation: str,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    target: Tensor | None,
    op: str,
) -> Tensor:
    if p == 0 or dispatch.functorch():
        y = _FORMULAS[activation](x.to(wide_dtype(x.dtype)))
        if p:
            y = draws.dropout(y, p, True, False, seed, generator, index_offset, None, False, 0, op)
        y = y.to(x.dtype)
    else:
        pair = random.operator_pair(x.device, seed, generator, op)
        arguments: tuple[Any, ...] = (x, pair, float(p), activation, index_offset)
        y = torch.ops.fusereg.activation_dropout(*arguments)
    return y if target is None else target.copy_(y)
