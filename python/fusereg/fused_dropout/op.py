"""Dropout fused with its neighbours, as torch operations: kernels, autograd, torch.library.

Two families, each with its own kernels forward and backward:

``_fused_dropout`` checks the arguments and picks between them.

``add``
    y = residual + dropout(x + bias), or with one draw for each sample: the entry of
    ``bias_dropout_add``, ``dropout_add`` and ``drop_path_add``.
``activate``
    y = dropout(f(x)).

The mask, the order of the draws and a call's constants are dropout's (``core.draws``), and so is
the gradient of x where there is no bias. Kept for backward is the pair (seed, offset), and for an
activation what its derivative needs: x, or the result where it is relu.

Under torch.func transforms the operations are put together from ``draws.dropout`` and
torch's own, which have the rules for it; p = 0 inside a compiler is torch's formula alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, draws, memory, operator
from ..core.draws import Call, laid_out
from ..core.operator import applied

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on a dtype is done in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _refused(op: str) -> RuntimeError:
    return RuntimeError(f"fusereg.{op}: the kernel refused a prepared tensor; please report this")


def _flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie."""
    return t.as_strided((t.numel(),), (1,))


# --- the kernels, on whatever tensors there are ---------------------------------------------------


def run_add(y: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, call: Call) -> Tensor:
    """Writes into y, whatever the layouts; x's decides on the order of the draws."""

    def kernel(y: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
        status = _C.fused_dropout_add(
            y,
            x,
            bias,
            residual,
            call.seed,
            call.offset,
            call.p,
            call.row_dims == 1,
            call.index_offset,
            call.op,
        )
        return status == 0

    if kernel(y, x, bias, residual):
        return y
    plain = checks.plain(x, call.op, "x")
    ready = torch.empty_like(plain)
    if call.row_dims:
        ready = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
    ready.copy_(plain)
    beside = torch.empty_like(ready).copy_(checks.plain(residual, call.op, "residual"))
    if bias is not None:
        bias = checks.plain(bias, call.op, "bias").contiguous()
        if ready.stride(-1) != 1 and ready.shape[-1] != 1:
            # The columns do not come in turn: a bias for each element, then, as it lies.
            bias = _flat(torch.empty_like(ready).copy_(bias.expand(ready.shape)))
            if not kernel(_flat(ready), _flat(ready), bias, _flat(beside)):
                raise _refused(call.op)
            return y.copy_(ready)
    if not kernel(ready, ready, bias, beside):
        raise _refused(call.op)
    return y.copy_(ready)


def add(call: Call, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return run_add(torch.empty_like(x), x, bias, residual, call)


def _bias_backward(call: Call, grad: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_bias), grad walked in the order in which forward walked x."""
    grad = laid_out(grad, strides)
    grad_x = torch.empty_like(grad)
    grad_bias = torch.empty(grad.shape[-1], dtype=grad.dtype, device=grad.device)
    if _sum_columns(grad_x, grad_bias, grad, call):
        return grad_x, grad_bias
    # The columns do not come in turn. The unrounded gradient by itself, then the sums of its rows.
    wide = checks.plain(grad, call.op, "grad").to(wide_dtype(grad.dtype))
    dropped = draws.backward(call, laid_out(wide, strides), strides)
    grad_x.copy_(dropped)
    rows = dropped.contiguous()
    sums = torch.empty(grad.shape[-1], dtype=rows.dtype, device=grad.device)
    if not _sum_columns(torch.empty_like(rows), sums, rows, call._replace(p=0.0)):
        raise _refused(call.op)
    return grad_x, grad_bias.copy_(sums)


def _sum_columns(grad_x: Tensor, grad_bias: Tensor, grad: Tensor, call: Call) -> bool:
    count = _C.fused_dropout_partials(grad.numel(), grad.shape[-1])
    partials = torch.empty(count, dtype=torch.float64, device=grad.device)
    status = _C.fused_dropout_bias_backward(
        grad_x,
        grad_bias,
        grad,
        partials,
        memory.workspace(grad.device, 4 * _C.FUSED_DROPOUT_COUNTERS),
        call.seed,
        call.offset,
        call.p,
        call.index_offset,
        call.op,
    )
    return status == 0


def run_activate(y: Tensor, x: Tensor, activation: str, call: Call) -> Tensor:
    constants = (activation, call.seed, call.offset, call.p, call.index_offset, call.op)
    if _C.activation_dropout_forward(y, x, *constants) == 0:
        return y
    plain = checks.plain(x, call.op, "x")
    ready = torch.empty_like(plain).copy_(plain)
    if _C.activation_dropout_forward(ready, ready, *constants) != 0:
        raise _refused(call.op)
    return y.copy_(ready)


def activate(call: Call, x: Tensor, activation: str) -> Tensor:
    return run_activate(torch.empty_like(x), x, activation, call)


def _activate_backward(
    call: Call, grad: Tensor, saved: Tensor, activation: str, strides: Sequence[int]
) -> Tensor:
    grad, saved = laid_out(grad, strides), laid_out(saved, strides)
    grad_x = torch.empty_like(grad)
    constants = (activation, call.seed, call.offset, call.p, call.index_offset, call.op)
    if _C.activation_dropout_backward(grad_x, grad, saved, *constants) == 0:
        return grad_x
    grad = laid_out(checks.plain(grad, call.op, "grad"), strides)
    saved = laid_out(checks.plain(saved, call.op, "x"), strides)
    if _C.activation_dropout_backward(grad_x, grad, saved, *constants) != 0:
        raise _refused(call.op)
    return grad_x


# --- eager autograd: add --------------------------------------------------------------------------


def _gradients(
    grad: Tensor, call: Call, strides: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of (x, bias, residual), differentiable where that is asked for."""
    grad_x = grad_bias = None
    if needs[1]:
        if torch.is_grad_enabled():
            grad_x, grad_bias = cast(
                "tuple[Tensor, Tensor]", applied(_BiasBackward, grad, call, strides)
            )
        else:
            grad_x, grad_bias = _bias_backward(call, grad, strides)
    elif needs[0]:
        grad_x = operator.gradient(grad, call, strides) if call.p else grad
    return (grad_x if needs[0] else None), grad_bias, (grad if needs[2] else None)


class Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, call: Call) -> Tensor:
        y = add(call, x, bias, residual)
        ctx.call = (call, y.stride())
        if dispatch.forward_mode():
            ctx.shape, ctx.zero = y.shape, y.new_zeros(())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, strides = ctx.call
        return (*_gradients(grad, call, strides, ctx.needs_input_grad), None)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *others: Tensor | None) -> Tensor:
        call, strides = ctx.call
        residual, _ = others
        zero = ctx.zero.expand(ctx.shape)
        return add(
            call,
            laid_out(zero if x is None else x, strides),
            bias,
            zero if residual is None else residual,
        )


class AddInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, call: Call) -> Tensor:
        ctx.call = (call, torch.empty_like(x, device="meta").stride())
        ctx.mark_dirty(x)
        return run_add(x, x, bias, residual, call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, strides = ctx.call
        return (*_gradients(grad, call, strides, ctx.needs_input_grad), None)


class _BiasBackward(torch.autograd.Function):
    """Linear in the gradient: its own backward is dropout's, of the sum of both."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, call: Call, strides: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.call = (call, strides)
        return _bias_backward(call, grad, strides)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_bias: Tensor) -> tuple[Tensor, None, None]:
        total = grad_x + grad_bias
        return operator.gradient(total, *ctx.call), None, None


# --- eager autograd: activate ---------------------------------------------------------------------


def _curvature(x: Tensor, activation: str) -> Tensor:
    """The second derivative of an activation that has one."""
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


def _second(grad: Tensor, before: Tensor, x: Tensor, activation: str) -> Tensor:
    """What dropout has to be applied to for the second derivative's share."""
    wide = wide_dtype(x.dtype)
    product = grad.to(wide) * before.to(wide) * _curvature(x.to(wide), activation)
    return product.to(x.dtype)


def _activation_gradient(
    grad: Tensor, saved: Tensor, activation: str, call: Call, strides: Sequence[int]
) -> Tensor:
    """_activate_backward(), differentiable where that is asked for."""
    if torch.is_grad_enabled():
        return applied(_ActivateBackward, grad, saved, activation, call, strides)
    return _activate_backward(call, grad, saved, activation, strides)


class Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, call: Call) -> Tensor:
        y = activate(call, x, activation)
        ctx.call = (activation, call, y.stride())
        saved = y if activation == "relu" else x
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        return _activation_gradient(grad, saved, *ctx.call), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (saved,) = ctx.saved_tensors
        activation, call, strides = ctx.call
        return _activate_backward(call, tangent, saved, activation, strides)


class ReluInPlace(torch.autograd.Function):
    """Its derivative needs no more than the result, which stays where x was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call) -> Tensor:
        ctx.call = ("relu", call, torch.empty_like(x, device="meta").stride())
        ctx.mark_dirty(x)
        run_activate(x, x, "relu", call)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return _activation_gradient(grad, saved, *ctx.call), None


class _ActivateBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, saved: Tensor, activation: str, call: Call, strides: Sequence[int]
    ) -> Tensor:
        ctx.call = (activation, call, strides)
        ctx.save_for_backward(grad, saved)
        return _activate_backward(call, grad, saved, activation, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, saved = ctx.saved_tensors
        activation, call, strides = ctx.call
        grad_grad = _activation_gradient(grad, saved, activation, call, strides)
        grad_saved = None
        if activation != "relu":
            share = _second(grad, before, saved, activation)
            grad_saved = operator.gradient(share, call, strides) if call.p else share
        return grad_grad, grad_saved, None, None, None


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Any], str], object] = dispatch.library.impl
_OPS = torch.ops.fusereg

_define(
    "fused_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor seed, float p, int row_dims,"
    " SymInt index_offset) -> Tensor"
)
_define(
    "fused_dropout_bias_backward(Tensor grad, Tensor seed, float p, SymInt index_offset,"
    " SymInt[] stride) -> (Tensor, Tensor)"
)
_define(
    "activation_dropout(Tensor x, Tensor seed, float p, str activation, SymInt index_offset)"
    " -> Tensor"
)
_define(
    "activation_dropout_backward(Tensor grad, Tensor saved, Tensor seed, float p, str activation,"
    " SymInt index_offset, SymInt[] stride) -> Tensor"
)


def _call(seed: Tensor, p: float, row_dims: int, index_offset: int, op: str) -> Call:
    return Call(seed, 0, p, False, row_dims, index_offset, op)


def _op_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    seed: Tensor,
    p: float,
    row_dims: int,
    index_offset: int,
) -> Tensor:
    return add(_call(seed, p, row_dims, index_offset, "fused_dropout_add"), x, bias, residual)


def _op_bias_backward(
    grad: Tensor, seed: Tensor, p: float, index_offset: int, stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _bias_backward(_call(seed, p, 0, index_offset, "fused_dropout_add"), grad, tuple(stride))


def _op_activate(x: Tensor, seed: Tensor, p: float, activation: str, index_offset: int) -> Tensor:
    return activate(_call(seed, p, 0, index_offset, "activation_dropout"), x, activation)


def _op_activate_backward(
    grad: Tensor,
    saved: Tensor,
    seed: Tensor,
    p: float,
    activation: str,
    index_offset: int,
    stride: Sequence[int],
) -> Tensor:
    call = _call(seed, p, 0, index_offset, "activation_dropout")
    return _activate_backward(call, grad, saved, activation, tuple(stride))


for _key in ("CPU", "CUDA"):
    _implement("fused_dropout_add", _op_add, _key)
    _implement("fused_dropout_bias_backward", _op_bias_backward, _key)
    _implement("activation_dropout", _op_activate, _key)
    _implement("activation_dropout_backward", _op_activate_backward, _key)


def _fake(name: str, function: Callable[..., Any]) -> None:
    torch.library.register_fake(f"fusereg::{name}", function, lib=dispatch.library)


_fake(
    "fused_dropout_add",
    lambda x, bias, residual, seed, p, row_dims, index_offset: torch.empty_like(x),
)
_fake(
    "fused_dropout_bias_backward",
    lambda grad, seed, p, index_offset, stride: (
        grad.new_empty_strided(grad.shape, stride),
        grad.new_empty(grad.shape[-1]),
    ),
)
_fake("activation_dropout", lambda x, seed, p, activation, index_offset: torch.empty_like(x))
_fake(
    "activation_dropout_backward",
    lambda grad, saved, seed, p, activation, index_offset, stride: grad.new_empty_strided(
        grad.shape, stride
    ),
)


def _save_for_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, seed, *ctx.constants = inputs
    ctx.with_bias = bias is not None
    ctx.stride = output.stride()
    ctx.save_for_backward(seed)


def _add_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    p, row_dims, index_offset = ctx.constants
    grad_x = grad_bias = None
    if ctx.with_bias and ctx.needs_input_grad[1]:
        grad_x, grad_bias = _OPS.fused_dropout_bias_backward(
            grad, seed, p, index_offset, ctx.stride
        )
    elif ctx.needs_input_grad[0]:
        grad_x = _OPS.dropout_backward(grad, seed, p, False, row_dims, index_offset, ctx.stride)
    return grad_x, grad_bias, grad, None, None, None, None


def _save_for_bias_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, seed, *ctx.constants = inputs
    ctx.save_for_backward(seed)


def _bias_backward_gradient(ctx: Any, grad_x: Tensor, grad_bias: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    p, index_offset, stride = ctx.constants
    total = grad_x + grad_bias
    gradient = _OPS.dropout_backward(total, seed, p, False, 0, index_offset, stride)
    return gradient, None, None, None, None


def _save_for_activate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, *ctx.constants = inputs
    ctx.stride = output.stride()
    ctx.save_for_backward(output if ctx.constants[1] == "relu" else x, seed)


def _activate_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved, seed = ctx.saved_tensors
    gradient = _OPS.activation_dropout_backward(grad, saved, seed, *ctx.constants, ctx.stride)
    return gradient, None, None, None, None


def _save_for_activate_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, saved, seed, *ctx.constants = inputs
    ctx.save_for_backward(grad, saved, seed)


def _activate_second_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    before, saved, seed = ctx.saved_tensors
    p, activation, index_offset, stride = ctx.constants
    grad_grad = _OPS.activation_dropout_backward(grad, saved, seed, *ctx.constants)
    grad_saved = None
    if activation != "relu":
        grad_saved = _OPS.dropout_backward(
            _second(grad, before, saved, activation), seed, p, False, 0, index_offset, stride
        )
    return grad_grad, grad_saved, None, None, None, None, None


for _name, _gradient, _save in (
    ("fused_dropout_add", _add_gradient, _save_for_add),
    ("fused_dropout_bias_backward", _bias_backward_gradient, _save_for_bias_backward),
    ("activation_dropout", _activate_gradient, _save_for_activate),
    ("activation_dropout_backward", _activate_second_gradient, _save_for_activate_backward),
):
    torch.library.register_autograd(
        f"fusereg::{_name}", _gradient, setup_context=_save, lib=dispatch.library
    )
