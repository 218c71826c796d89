"""Dropout fused with its neighbors as operations.

Two families, each with its own kernels forward and backward:

``add``
    y = residual + dropout(x + bias), or with one draw for each sample: bias_dropout_add,
    dropout_add and drop_path_add.
``activate``
    y = dropout(f(x)).

The mask and the order of the draws are dropout's, and so is the gradient of x where there is no
bias. Kept for backward is the Philox state, and for an activation what its derivative needs: x, or
the result where it is relu. Second derivatives, torch.func transforms and forward mode take the
same formulas in torch's operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnF

from .. import _C
from ..core import checks, dispatch, draws, memory, operator
from ..core.operator import (
    Operator,
    compute_dtype,
    in_strides,
    keep,
    state_of,
    strides_of_result,
)

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nnF.relu,
    "gelu": nnF.gelu,
    "gelu_tanh": lambda x: nnF.gelu(x, approximate="tanh"),
    "silu": nnF.silu,
}
ACTIVATIONS = tuple(FORMULAS)


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
    state = seed if type(seed) is tuple else (seed, 0)
    draw = (*state, p, rows == 1, index_offset, op)
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
        raise operator.refused(op)
    return y.copy_(made)


def add_by_parts(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    seed: Any,
    p: float,
    rows: int,
    index_offset: int,
    *op: str,
) -> Tensor:
    """Compute ``add`` by one operation after the other, rounded once."""
    wide = compute_dtype(x.dtype)
    y = x.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if p:
        y = draws.mask(y, seed, p, False, rows, index_offset, *op)
    return (residual.to(wide) + y).to(x.dtype)


def _save_add(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, _, _, state, p, rows, index_offset, *op = args
    stride = strides_of_result(x) if y is x else y.stride()
    if type(state) is not tuple:
        keep(ctx, state)
        state = None
    # As dropout's function has it, which gives the gradient of x where there is no bias.
    ctx.rest = (state, p, False, rows, index_offset, stride, *op)


def _add_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    seed, p, _, rows, index_offset, stride, *op = ctx.rest
    needs = ctx.needs_input_grad
    grad_x = grad_bias = None
    if needs[0] and not needs[1] and seed and p and not dispatch.is_dynamo_compiling():
        grad_x = draws.mask.gradient_of(ctx, grad)[0]
    elif needs[0] or needs[1]:
        if seed is None:
            (seed,) = ctx.saved_tensors
        if needs[1]:
            grad_x, grad_bias = _bias_backward(grad, seed, p, index_offset, stride, *op)
        else:
            grad_x = _dropped(grad, seed, p, rows, index_offset, stride, *op)
    return (grad_x if needs[0] else None), grad_bias, (grad if needs[2] else None)


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
    if _sum_columns(grad_x, grad_bias, grad, (*state_of(seed), p, index_offset, op)):
        return grad_x, grad_bias
    # The columns do not lie in turn. The unrounded gradient by itself, then the sums of its rows.
    wide = checks.plain(grad, op, "grad").to(compute_dtype(grad.dtype))
    dropped = draws.mask.backward.kernel(wide, seed, p, False, 0, index_offset, tuple(stride), op)
    grad_x.copy_(dropped)
    rows = dropped.contiguous()
    sums = torch.empty(grad.shape[-1], dtype=rows.dtype, device=grad.device)
    if not _sum_columns(torch.empty_like(rows), sums, rows, (0, 0, 0.0, index_offset, op)):
        raise operator.refused(op)
    return grad_x, grad_bias.copy_(sums)


def _bias_by_parts(
    grad: Tensor, seed: Any, p: float, index_offset: int, stride: Any, *op: str
) -> tuple[Tensor, Tensor]:
    wide = grad.to(compute_dtype(grad.dtype))
    dropped = _dropped(wide, seed, p, 0, index_offset, stride, *op)
    return dropped.to(grad.dtype), dropped.sum_to_size(grad.shape[-1:]).to(grad.dtype)


def _sum_columns(grad_x: Tensor, grad_bias: Tensor, grad: Tensor, draw: tuple[Any, ...]) -> bool:
    count = _C.fused_dropout_partials(grad.numel(), grad.shape[-1])
    partials = torch.empty(count, dtype=torch.float64, device=grad.device)
    counters = memory.workspace(grad.device, 4 * _C.FUSED_DROPOUT_COUNTERS)
    status = _C.fused_dropout_bias_backward(grad_x, grad_bias, grad, partials, counters, *draw)
    return status == 0


add = Operator(
    "fused_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor seed, float p, int row_dims,"
    " SymInt index_offset) -> Tensor",
    _add,
    fake=lambda x, *_: torch.empty_like(x),
    save=_save_add,
    gradient=_add_gradient,
    by_parts=add_by_parts,
)
add.compile(functools.partial(_C.fused_dropout_add_functions, draws.mask.gradient_of))
add_at_once = add.at_once("xvx")
_bias_backward = Operator(
    "fused_dropout_bias_backward(Tensor grad, Tensor seed, float p, SymInt index_offset,"
    " SymInt[] stride) -> (Tensor, Tensor)",
    _bias_kernel,
    fake=lambda grad, seed, p, index_offset, stride: (
        grad.new_empty_strided(grad.shape, stride),
        grad.new_empty(grad.shape[-1]),
    ),
    by_parts=_bias_by_parts,
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
    kernel, draw = _C.activation_dropout_forward, (activation, *state_of(seed), p, index_offset, op)
    return y if kernel(y, x, *draw) == 0 else operator.through_copy(kernel, y, x, draw)


def activate_by_parts(
    x: Tensor, seed: Any, p: float, activation: str, index_offset: int, *op: str
) -> Tensor:
    """Compute ``activate`` by one operation after the other, rounded once."""
    if not p:
        return FORMULAS[activation](x.to(compute_dtype(x.dtype))).to(x.dtype)
    wide = x.double()  # in float32 torch's GELU loses digits in the tails
    factors = draws.keep_factors(wide, seed, p, index_offset, *op)
    # Each of them is 0 at 0, so that a dropped inf or NaN leaves no trace in derivatives either.
    return (FORMULAS[activation](torch.where(factors != 0, wide, 0.0)) * factors).to(x.dtype)


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
    draw = (activation, *state_of(seed), p, index_offset, op)
    if _C.activation_dropout_backward(grad_x, grad, saved, *draw) == 0:
        return grad_x
    grad = in_strides(checks.plain(grad, op, "grad"), stride)
    saved = in_strides(checks.plain(saved, op, "x"), stride)
    if _C.activation_dropout_backward(grad_x, grad, saved, *draw) != 0:
        raise operator.refused(op)
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
    saved, *seed = operator.unpacked(ctx, given)
    return (_activate_backward(grad, saved, *(seed or (state,)), *rest),)


def _activate_gradient_by_parts(grad: Tensor, saved: Tensor, *rest: Any) -> Tensor | None:
    seed, p, activation, index_offset, stride, *op = rest
    if activation == "relu":
        return torch.where(saved > 0, _dropped(grad, seed, p, 0, index_offset, stride, *op), 0.0)

    def formula(x: Tensor) -> Tensor:
        return activate_by_parts(in_strides(x, stride), seed, p, activation, index_offset, *op)

    return operator.gradients(formula, [saved], [grad])[0]


activate = Operator(
    "activation_dropout(Tensor x, Tensor seed, float p, str activation, SymInt index_offset)"
    " -> Tensor",
    _activate,
    fake=lambda x, *_: torch.empty_like(x),
    save=_save_activate,
    gradient=_activate_gradient,
    by_parts=activate_by_parts,
)
activate.compile(_C.activation_dropout_functions)
activate_at_once = activate.at_once("x")
_activate_backward = Operator(
    "activation_dropout_backward(Tensor grad, Tensor saved, Tensor seed, float p, str activation,"
    " SymInt index_offset, SymInt[] stride) -> Tensor",
    _activate_kernel,
    fake=lambda grad, *rest: grad.new_empty_strided(grad.shape, rest[-1]),
    by_parts=_activate_gradient_by_parts,
)
