"""Dropout fused with its neighbors as operations.

Two families, each with its own kernels forward and backward; ``entry.py`` checks the arguments and
picks between them.

``add``
    y = residual + dropout(x + bias), or with one draw for each sample: bias_dropout_add,
    dropout_add and drop_path_add.
``activate``
    y = dropout(f(x)).

The mask and the order of the draws are dropout's, and so is the gradient of x where there is no
bias. Kept for backward is the Philox state, and for an activation what its derivative needs: x, or
the result where it is relu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, draws, memory
from ..core.operator import (
    Operator,
    in_strides,
    keep,
    keep_state,
    kept,
    refused,
    strides_of_result,
    unpacked,
)

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels compute on tensors of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _flat(t: Tensor) -> Tensor:
    """Return the elements of a dense tensor in their order in memory."""
    return t.as_strided((t.numel(),), (1,))


# --- y = residual + dropout(x + bias) -------------------------------------------------------------


def _add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    seed: Any,
    p: float,
    rows: int,
    index_offset: int,
    op: str = "fused_dropout_add",
    out: Tensor | None = None,
) -> Tensor:
    y = torch.empty_like(x) if out is None else out
    draw = (*(seed if type(seed) is tuple else (seed, 0)), p, rows == 1, index_offset, op)
    if _C.fused_dropout_add(y, x, bias, residual, *draw) == 0:
        return y
    x = checks.plain(x, op, "x")
    like = torch.empty(x.shape, dtype=x.dtype, device=x.device) if rows else torch.empty_like(x)
    copy = like.copy_(x)
    beside = torch.empty_like(copy).copy_(checks.plain(residual, op, "residual"))
    if bias is not None:
        bias = checks.plain(bias, op, "bias").contiguous()
    made = copy
    if bias is not None and copy.stride(-1) != 1 and copy.shape[-1] != 1:
        # The columns do not lie in turn: take a bias for each element, in the order of memory.
        bias = _flat(torch.empty_like(copy).copy_(bias.expand(copy.shape)))
        copy, beside = _flat(copy), _flat(beside)
    if _C.fused_dropout_add(copy, copy, bias, beside, *draw) != 0:
        raise refused(op)
    return y.copy_(made)


def _save_add(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, bias, _, ctx.state, *ctx.constants = args
    ctx.has_bias, ctx.shape = bias is not None, y.shape
    ctx.stride = strides_of_result(x) if y is x else y.stride()
    keep_state(ctx)


def _add_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = kept(ctx)
    p, rows, index_offset, *op = ctx.constants
    needs = ctx.needs_input_grad
    grad_x = grad_bias = None
    if ctx.has_bias and needs[1]:
        grad_x, grad_bias = _bias_backward(grad, seed, p, index_offset, ctx.stride, *op)
    elif needs[0] and p and type(seed) is tuple and not dispatch.is_dynamo_compiling():
        ctx.rest = (seed, p, False, rows, index_offset, ctx.stride, *op)
        grad_x = draws.mask.gradient_of(ctx, grad)[0]
    elif needs[0]:
        grad_x = _dropped(grad, seed, p, rows, index_offset, ctx.stride, *op)
    return (grad_x if needs[0] else None), grad_bias, (grad if needs[2] else None)


def _add_tangent(
    ctx: Any, x: Tensor | None, bias: Tensor | None, residual: Tensor | None, *_: None
) -> Tensor:
    (seed,) = kept(ctx)
    given = next(t for t in (residual, x, bias) if t is not None)
    shape = ctx.shape
    zero = given.new_zeros(()).expand(shape)
    moved = in_strides(zero if x is None else x, ctx.stride)
    result: Tensor = add(moved, bias, zero if residual is None else residual, seed, *ctx.constants)
    return result


def _dropped(
    grad: Tensor, seed: Any, p: float, rows: int, index_offset: int, stride: Any, *op: str
) -> Tensor:
    """Return dropout's gradient, which at p = 0 is the gradient itself."""
    if p == 0:
        return grad
    result: Tensor = draws.mask.backward(grad, seed, p, False, rows, index_offset, stride, *op)
    return result


def _bias_kernel(
    grad: Tensor,
    seed: Any,
    p: float,
    index_offset: int,
    stride: Sequence[int],
    op: str = "fused_dropout_add",
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias, grad taken in the order in which forward took x."""
    grad = in_strides(grad, tuple(stride))
    grad_x = torch.empty_like(grad)
    grad_bias = torch.empty(grad.shape[-1], dtype=grad.dtype, device=grad.device)
    draw = (*(seed if type(seed) is tuple else (seed, 0)), p, index_offset, op)
    if _sum_columns(grad_x, grad_bias, grad, draw):
        return grad_x, grad_bias
    # The columns do not lie in turn. The unrounded gradient by itself, then the sums of its rows.
    wide = checks.plain(grad, op, "grad").to(wide_dtype(grad.dtype))
    dropped = draws.mask.backward.kernel(wide, seed, p, False, 0, index_offset, tuple(stride), op)
    grad_x.copy_(dropped)
    rows = dropped.contiguous()
    sums = torch.empty(grad.shape[-1], dtype=rows.dtype, device=grad.device)
    if not _sum_columns(torch.empty_like(rows), sums, rows, (0, 0, 0.0, index_offset, op)):
        raise refused(op)
    return grad_x, grad_bias.copy_(sums)


def _sum_columns(grad_x: Tensor, grad_bias: Tensor, grad: Tensor, draw: tuple[Any, ...]) -> bool:
    count = _C.fused_dropout_partials(grad.numel(), grad.shape[-1])
    partials = torch.empty(count, dtype=torch.float64, device=grad.device)
    counters = memory.workspace(grad.device, 4 * _C.FUSED_DROPOUT_COUNTERS)
    status = _C.fused_dropout_bias_backward(grad_x, grad_bias, grad, partials, counters, *draw)
    return status == 0


def _save_bias_backward(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
    _, ctx.state, *ctx.constants = args
    keep_state(ctx)


def _bias_tangent(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _bias_backward(grad, *kept(ctx), *ctx.constants)
    return result


def _bias_gradient(ctx: Any, grad_x: Tensor, grad_bias: Tensor) -> tuple[Tensor]:
    (seed,) = kept(ctx)
    p, index_offset, *rest = ctx.constants
    return (_dropped(grad_x + grad_bias, seed, p, 0, index_offset, *rest),)


add = Operator(
    "fused_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor seed, float p, int row_dims,"
    " SymInt index_offset) -> Tensor",
    _add,
    fake=lambda x, *_: torch.empty_like(x),
    save=_save_add,
    gradient=_add_gradient,
    tangent=_add_tangent,
    linear=True,
    row_major=True,
)
_bias_backward = Operator(
    "fused_dropout_bias_backward(Tensor grad, Tensor seed, float p, SymInt index_offset,"
    " SymInt[] stride) -> (Tensor, Tensor)",
    _bias_kernel,
    fake=lambda grad, seed, p, index_offset, stride: (
        grad.new_empty_strided(grad.shape, stride),
        grad.new_empty(grad.shape[-1]),
    ),
    save=_save_bias_backward,
    gradient=_bias_gradient,
    tangent=_bias_tangent,
    linear=True,
    row_major=True,
)


# --- y = dropout(f(x)) ----------------------------------------------------------------------------


def _activate(
    x: Tensor,
    seed: Any,
    p: float,
    activation: str,
    index_offset: int,
    op: str = "activation_dropout",
    out: Tensor | None = None,
) -> Tensor:
    y = torch.empty_like(x) if out is None else out
    draw = (activation, *(seed if type(seed) is tuple else (seed, 0)), p, index_offset, op)
    if _C.activation_dropout_forward(y, x, *draw) == 0:
        return y
    x = checks.plain(x, op, "x")
    copy = torch.empty_like(x).copy_(x)
    if _C.activation_dropout_forward(copy, copy, *draw) != 0:
        raise refused(op)
    return y.copy_(copy)


def _activate_kernel(
    grad: Tensor,
    saved: Tensor,
    seed: Any,
    p: float,
    activation: str,
    index_offset: int,
    stride: Sequence[int],
    op: str = "activation_dropout",
) -> Tensor:
    stride = tuple(stride)
    grad, saved = in_strides(grad, stride), in_strides(saved, stride)
    grad_x = torch.empty_like(grad)
    draw = (activation, *(seed if type(seed) is tuple else (seed, 0)), p, index_offset, op)
    if _C.activation_dropout_backward(grad_x, grad, saved, *draw) == 0:
        return grad_x
    grad = in_strides(checks.plain(grad, op, "grad"), stride)
    saved = in_strides(checks.plain(saved, op, "x"), stride)
    if _C.activation_dropout_backward(grad_x, grad, saved, *draw) != 0:
        raise refused(op)
    return grad_x


def _save_activate(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, state, p, activation, index_offset, *op = args
    stride = strides_of_result(x) if y is x else y.stride()
    saved = y if activation == "relu" else x
    if type(state) is tuple:
        keep(ctx, saved)
    else:
        keep(ctx, saved, state)
        state = None
    ctx.rest = (state, p, activation, index_offset, stride, *op)


def _activate_gradient(ctx: Any, grad: Tensor, *given: Any) -> tuple[Tensor]:
    state, *rest = ctx.rest
    saved, *seed = unpacked(ctx, given)
    return (_activate_backward(grad, saved, *(seed or (state,)), *rest),)


def _save_activate_backward(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    grad, saved, ctx.state, *ctx.constants = args
    keep_state(ctx, grad, saved)


def _activate_second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, saved, seed = kept(ctx)
    p, activation, index_offset, stride, *op = ctx.constants
    grad_grad = _activate_backward(grad, saved, seed, *ctx.constants)
    if activation == "relu":
        return grad_grad, None
    share = _curved(grad, before, saved, activation)
    return grad_grad, _dropped(share, seed, p, 0, index_offset, stride, *op)


def _activate_backward_tangent(
    ctx: Any, grad: Tensor | None, saved_tangent: Tensor | None, *_: None
) -> Tensor:
    before, saved, seed = kept(ctx)
    p, activation, index_offset, stride, *op = ctx.constants
    result = torch.zeros_like(before)
    if grad is not None:
        result = _activate_backward(grad, saved, seed, *ctx.constants)
    if saved_tangent is not None and activation != "relu":
        share = _curved(saved_tangent, before, saved, activation)
        result = result + _dropped(share, seed, p, 0, index_offset, stride, *op)
    return result


def _curved(a: Tensor, b: Tensor, x: Tensor, activation: str) -> Tensor:
    """Return a b f''(x), rounded once."""
    wide = wide_dtype(x.dtype)
    return (a.to(wide) * b.to(wide) * _curvature(x.to(wide), activation)).to(x.dtype)


def _curvature(x: Tensor, activation: str) -> Tensor:
    """Return the second derivative of an activation that has one."""
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) * 0.3989422804014327
        return density * (2.0 - x * x)
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))
    # x s(z), z = k (x + c x^3)
    k, c = 1.5957691216057308, 0.044715
    s = torch.sigmoid(k * x * (1 + c * x * x))
    first, second = k * (1 + 3 * c * x * x), 6 * k * c * x
    return s * (1 - s) * (2 * first + x * ((1 - 2 * s) * first * first + second))


activate = Operator(
    "activation_dropout(Tensor x, Tensor seed, float p, str activation, SymInt index_offset)"
    " -> Tensor",
    _activate,
    fake=lambda x, *_: torch.empty_like(x),
    save=_save_activate,
    gradient=_activate_gradient,
    tangent=lambda ctx, tangent, *_: _activate_gradient(ctx, tangent)[0],
    row_major=True,
)
activate.compile(_C.activation_dropout_functions)
_activate_backward = Operator(
    "activation_dropout_backward(Tensor grad, Tensor saved, Tensor seed, float p, str activation,"
    " SymInt index_offset, SymInt[] stride) -> Tensor",
    _activate_kernel,
    fake=lambda grad, *rest: grad.new_empty_strided(grad.shape, rest[-1]),
    save=_save_activate_backward,
    gradient=_activate_second_gradient,
    tangent=_activate_backward_tangent,
    row_major=True,
)
