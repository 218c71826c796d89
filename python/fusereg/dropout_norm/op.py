"""Dropout + residual + layer or RMS normalization as torch operations.

``forward``, ``backward``
    prepare what the kernels cannot take as it is and call them; no autograd.
``_DropoutNorm``, ``_DropoutNormBackward``
    the eager autograd functions. Forward gives the sum s as a result of its own, for the caller or
    not: backward keeps it, and through it derivatives of any order find their way to x and
    residual. A second derivative is a formula of torch operations
    (_dropout_norm_formulas.py).
``torch.ops.fusereg.dropout_norm``, ``torch.ops.fusereg.dropout_norm_backward``
    the same as pure functions, for torch.compile, export, fake tensors.
``dropout_norm``
    the entry: checks, and picks between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, draws, memory, random
from .formulas import Gradients, compute_dtype, second_gradient, unfused

_HALVES = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A call's constants. Without dropping (p = 0) seed and offset are 0."""

    seed: int | Tensor
    offset: int
    p: float
    eps: float
    rms: bool
    index_offset: int
    op: str


#: Which of the gradients of x, residual, weight, bias are wanted.
Wanted: TypeAlias = Sequence[bool]


def _sum_is_x(p: float, residual: object) -> bool:
    return p == 0 and residual is None


# --- the kernels, on whatever tensors there are ---------------------------------------------------


def _ready(tensor: Tensor | None, op: str, name: str) -> Tensor | None:
    return None if tensor is None else checks.plain(tensor, op, name).contiguous()


def _refused(op: str) -> RuntimeError:
    return RuntimeError(f"fusereg.{op}: the kernel refused prepared tensors; please report this")


def forward(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y and, if kept, the sum (None where that is x itself) and the statistics of the rows."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = statistics = None
    if keep:
        if not _sum_is_x(call.p, residual):
            like = x if residual is None else residual
            total = torch.empty(x.shape, dtype=like.dtype, device=x.device)
        rows = (*x.shape[:-1], 1 if call.rms else 3)
        statistics = torch.empty(rows, dtype=compute_dtype(x.dtype), device=x.device)
    if _C.dropout_norm_forward(y, total, statistics, x, residual, weight, bias, *call) != 0:
        op = call.op
        ready = (
            _ready(x, op, "x"),
            _ready(residual, op, "residual"),
            _ready(weight, op, "weight"),
            _ready(bias, op, "bias"),
        )
        assert ready[0] is not None
        if _C.dropout_norm_forward(y, total, statistics, *ready, *call) != 0:  # type: ignore[arg-type]
            raise _refused(op)
    return y, total, statistics


def backward(
    call: Call,
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """The wanted gradients; that of x and that of residual may be one tensor."""
    if not grad.is_contiguous():
        grad = grad.contiguous()
    if grad_total is not None and not grad_total.is_contiguous():
        grad_total = grad_total.contiguous()
    of_x, of_residual, of_weight, of_bias = wanted
    # Without dropping they are the same.
    shared = call.p == 0 and of_x and of_residual and grad.dtype is total.dtype
    device, length = grad.device, grad.shape[-1]
    grad_x = torch.empty_like(grad) if of_x else None
    grad_residual = torch.empty_like(total) if of_residual and not shared else None
    grad_weight = grad_bias = partials = barrier = None
    slots = of_weight + of_bias
    if slots:
        assert weight is not None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.empty_like(weight) if of_bias else None
        on_cuda = grad.is_cuda or _C.CUDA_ON_HOST
        chunks = _C.dropout_norm_chunks(grad.numel() // max(length, 1), on_cuda)
        partials = torch.empty(
            (chunks, slots, length), dtype=compute_dtype(grad.dtype), device=device
        )
        barrier = memory.barrier(device)

    def run(
        grad: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
    ) -> int:
        return _C.dropout_norm_backward(
            grad_x,
            grad_residual,
            grad_weight,
            grad_bias,
            grad,
            grad_total,
            total,
            statistics,
            weight,
            call.seed,
            call.offset,
            call.p,
            call.rms,
            call.index_offset,
            partials,
            barrier,
            call.op,
        )

    if run(grad, grad_total, total, statistics, weight) != 0:
        op = call.op
        names = ("grad", "grad_sum", "sum", "statistics", "weight")
        given = (grad, grad_total, total, statistics, weight)
        ready = [_ready(t, op, name) for t, name in zip(given, names, strict=True)]
        if run(*ready) != 0:  # type: ignore[arg-type]
            raise _refused(op)
    return grad_x, grad_x if shared else grad_residual, grad_weight, grad_bias


# --- eager autograd -------------------------------------------------------------------------------


class _DropoutNorm(torch.autograd.Function):
    """(x, residual, weight, bias) to y and the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        y, total, statistics = forward(call, x, residual, weight, bias, True)
        ctx.call = call
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if total is None else total, weight, statistics)
        return y, total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if grad is None:  # only the sum was used
            grad = torch.zeros(total.shape, dtype=ctx.dtype, device=total.device)
        if torch.is_grad_enabled():
            gradients = _apply_backward(
                grad, grad_total, total, weight, statistics, ctx.call, wanted
            )
        else:
            gradients = backward(ctx.call, grad, grad_total, total, statistics, weight, wanted)
        return *gradients, None


class _DropoutNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        weight: Tensor | None,
        statistics: Tensor,
        call: Call,
        wanted: Wanted,
    ) -> Gradients:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, total, weight)
        found = backward(call, grad, grad_total, total, statistics, weight, wanted)
        if found[0] is not None and found[1] is found[0]:
            found = (found[0], found[0].clone(), *found[2:])
        return found

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, total, weight = ctx.saved_tensors
        call: Call = ctx.call

        def drop(v: Tensor) -> Tensor:
            if call.p == 0:
                return v
            numbers = (call.seed, call.offset, call.p, False, 0, call.index_offset, call.op)
            return draws.dropped(v, draws.Call(*numbers))

        of_grad, of_grad_total, of_total, of_weight = second_gradient(
            drop,
            call.eps,
            call.rms,
            grad,
            total,
            weight,
            along,  # type: ignore[arg-type]
        )
        of_grad_total_or_none = of_grad_total if ctx.needs_input_grad[1] else None
        return of_grad, of_grad_total_or_none, of_total, of_weight, None, None, None


#: apply() without its question for functorch, which the gate has answered.
_apply: Callable[..., tuple[Tensor, Tensor | None]] = super(
    torch.autograd.Function, _DropoutNorm
).apply
_apply_backward: Callable[..., Gradients] = super(
    torch.autograd.Function, _DropoutNormBackward
).apply


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Any], str], object] = dispatch.library.impl
_define(
    "dropout_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p,"
    " float eps, bool rms, SymInt index_offset, bool keep) -> (Tensor, Tensor, Tensor)"
)
_define(
    "dropout_norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor statistics,"
    " Tensor? weight, Tensor? seed, float p, float eps, bool rms, SymInt index_offset,"
    " bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)

_Results: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _op_call(seed: Tensor | None, p: float, eps: float, rms: bool, index_offset: int) -> Call:
    op = "dropout_add_rms_norm" if rms else "dropout_add_layer_norm"
    return Call(0 if seed is None else seed, 0, p, eps, rms, index_offset, op)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _op_dropout_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    keep: bool,
) -> _Results:
    call = _op_call(seed, p, eps, rms, index_offset)
    given = x.contiguous(), _contiguous(residual), _contiguous(weight), _contiguous(bias)
    y, total, statistics = forward(call, *given, keep)
    return (
        y,
        x.new_empty(0) if total is None else total,
        x.new_empty(0) if statistics is None else statistics,
    )


def _fake_dropout_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    keep: bool,
) -> _Results:
    y = x.new_empty(x.shape)
    if not keep:
        return y, x.new_empty(0), x.new_empty(0)
    statistics = x.new_empty((*x.shape[:-1], 1 if rms else 3), dtype=compute_dtype(x.dtype))
    if _sum_is_x(p, residual):
        return y, x.new_empty(0), statistics
    return y, x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype), statistics


def _op_dropout_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    wanted: Wanted,
) -> tuple[Tensor, ...]:
    call = _op_call(seed, p, eps, rms, index_offset)
    given = sum.contiguous(), statistics.contiguous(), _contiguous(weight)
    found = backward(call, grad, grad_sum, *given, wanted)
    results = [grad.new_empty(0) if t is None else t for t in found]
    if found[1] is not None and found[1] is found[0]:
        results[1] = found[1].clone()
    return tuple(results)


def _fake_dropout_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    wanted: Wanted,
) -> tuple[Tensor, ...]:
    like = (grad, sum, weight, weight)
    return tuple(
        t.new_empty(t.shape) if want and t is not None else grad.new_empty(0)
        for t, want in zip(like, wanted, strict=True)
    )


for _key in ("CPU", "CUDA"):
    _implement("dropout_norm", _op_dropout_norm, _key)
    _implement("dropout_norm_backward", _op_dropout_norm_backward, _key)
torch.library.register_fake("fusereg::dropout_norm", _fake_dropout_norm, lib=dispatch.library)
torch.library.register_fake(
    "fusereg::dropout_norm_backward", _fake_dropout_norm_backward, lib=dispatch.library
)


def _save_for_dropout_norm(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    x, residual, weight, _bias, seed, *ctx.constants, keep = inputs
    if not keep:
        return
    _, total, statistics = output
    ctx.kept = True
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.sum_is_x = _sum_is_x(ctx.constants[0], residual)
    ctx.save_for_backward(x if ctx.sum_is_x else total, statistics, weight, seed)


def _dropout_norm_gradient(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if not hasattr(ctx, "kept"):
        raise RuntimeError("fusereg::dropout_norm: called with keep=False, so it has no gradient")
    total, statistics, weight, seed = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros(total.shape, dtype=ctx.dtype, device=total.device)
    if ctx.sum_is_x:
        grad_sum = None
    wanted = list(ctx.needs_input_grad[:4])
    found = torch.ops.fusereg.dropout_norm_backward(
        grad, grad_sum, total, statistics, weight, seed, *ctx.constants, wanted
    )
    given = (t if want else None for t, want in zip(found, wanted, strict=True))
    return *given, None, None, None, None, None, None


def _save_for_backward_op(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    grad, grad_sum, total, _, weight, seed, *ctx.constants, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.has_grad_sum = grad_sum is not None
    ctx.save_for_backward(grad, total, weight, seed)


def _second_gradient_op(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, total, weight, seed = ctx.saved_tensors
    p, eps, rms, index_offset = ctx.constants

    def drop(v: Tensor) -> Tensor:
        if seed is None:
            return v
        result: Tensor = torch.ops.fusereg.dropout(v, seed, p, False, 0, index_offset)
        return result

    given = tuple(v if want else None for v, want in zip(along, ctx.wanted, strict=True))
    of_grad, of_grad_sum, of_sum, of_weight = second_gradient(
        drop,
        eps,
        rms,
        grad,
        total,
        weight,
        given,  # type: ignore[arg-type]
    )
    first = (of_grad, of_grad_sum if ctx.has_grad_sum else None, of_sum, None, of_weight)
    return *first, None, None, None, None, None, None


torch.library.register_autograd(
    "fusereg::dropout_norm",
    _dropout_norm_gradient,
    setup_context=_save_for_dropout_norm,
    lib=dispatch.library,
)
torch.library.register_autograd(
    "fusereg::dropout_norm_backward",
    _second_gradient_op,
    setup_context=_save_for_backward_op,
    lib=dispatch.library,
)


# --- the entry ------------------------------------------------------------------------------------


def _is_plain(t: object) -> bool:
    return type(t) is Tensor or type(t) is torch.nn.Parameter


def _check_companion(t: object, x: Tensor, shape: torch.Size, op: str, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"fusereg.{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    checks.check_input(t, op, name)
    if t.shape != shape:
        raise ValueError(
            f"fusereg.{op}: {name} must have shape {tuple(shape)}, got {tuple(t.shape)}"
        )
    if t.device != x.device:
        raise ValueError(f"fusereg.{op}: {name} must be on {x.device}, got {t.device}")
    if t.dtype is not x.dtype and not (x.dtype in _HALVES and t.dtype is torch.float32):
        wide = " or torch.float32" if x.dtype in _HALVES else ""
        raise ValueError(f"fusereg.{op}: {name} must have x's dtype {x.dtype}{wide}, got {t.dtype}")


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    index_offset: int,
    op: str,
) -> None:
    checks.check_probability(p, op)
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"fusereg.{op}: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0.0:
        raise ValueError(f"fusereg.{op}: eps must not be negative, got {eps}")
    checks.check_input(x, op)
    if x.dim() == 0:
        raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")
    if residual is not None:
        _check_companion(residual, x, x.shape, op, "residual")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check_companion(t, x, x.shape[-1:], op, name)
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise ValueError(
            f"fusereg.{op}: bias must have weight's dtype {weight.dtype}, got {bias.dtype}"
        )
    if not torch.compiler.is_compiling() and (
        isinstance(index_offset, bool) or not isinstance(index_offset, int) or index_offset < 0
    ):
        raise ValueError(
            f"fusereg.{op}: index_offset must be an integer and not negative, got {index_offset!r}"
        )


def dropout_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float | None,
    training: bool,
    rms: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    return_sum: bool,
    op: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Both kinds, with given arguments; the public functions say what they mean."""
    if eps is None:  # as torch.nn.functional.rms_norm
        double = isinstance(x, Tensor) and x.dtype is torch.float64
        eps = torch.finfo(torch.float64 if double else torch.float32).eps
    _check(x, residual, weight, bias, p, eps, index_offset, op)
    p = float(p) if training else 0.0
    eps = float(eps)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    tensors = (x, residual, weight, bias)
    if dispatch.functorch() or dispatch.forward_mode():
        given = (*tensors, p, eps, rms, seed, generator, index_offset, op)
        y, total = unfused(*given)
        return (y, total) if return_sum else y

    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    alone = _sum_is_x(p, residual)
    result: Tensor | None
    if (
        not dispatch.eager()
        or x.device.type == "meta"
        or not all(t is None or _is_plain(t) for t in tensors)
    ):
        pair = random.operator_pair(x.device, seed, generator, op) if p else None
        y, result, _ = torch.ops.fusereg.dropout_norm(
            *tensors, pair, p, eps, rms, index_offset, keep or return_sum
        )
    else:
        numbers = random.eager_pair(x.device, seed, generator, op) if p else (0, 0)
        call = Call(*numbers, p, eps, rms, index_offset, op)
        ready = (
            x.contiguous(),
            _contiguous(residual),
            _contiguous(weight),
            _contiguous(bias),
        )
        if keep:
            y, result = _apply(*ready, call)
        else:
            y, result, _ = forward(call, *ready, return_sum)
    if not return_sum:
        return y
    if alone or result is None:
        return y, x
    return y, result
