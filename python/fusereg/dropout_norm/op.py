"""Dropout, residual sum and layer or RMS normalization as one operation.

Forward gives the sum s as a result of its own, whether or not the caller wants it: backward keeps
it, and through it derivatives of any order find their way to x and residual. A second derivative is
a formula of torch operations (formulas.py), and so is everything under torch.func transforms and in
forward mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, draws, memory, random
from ..core.operator import Operator, keep_state, kept, refused, unpacked
from ..core.random import Source, State
from .formulas import Gradients, compute_dtype, second_gradient, unfused

_HALVES = (torch.float16, torch.bfloat16)


def _sum_is_x(p: float, residual: object) -> bool:
    return p == 0 and residual is None


def _state(seed: Any) -> State:
    if type(seed) is tuple:
        return seed
    return (0, 0) if seed is None else (seed, 0)


def _supported(tensor: Tensor | None, op: str, name: str) -> Tensor | None:
    return None if tensor is None else checks.plain(tensor, op, name).contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Any,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    keep: bool,
    op: str = "dropout_norm",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y and, if kept, the sum (None where that is x itself) and the statistics of rows."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = statistics = None
    if keep:
        if not _sum_is_x(p, residual):
            like = x if residual is None else residual
            total = torch.empty(x.shape, dtype=like.dtype, device=x.device)
        rows = (*x.shape[:-1], 1 if rms else 3)
        statistics = torch.empty(rows, dtype=compute_dtype(x.dtype), device=x.device)
    rest: tuple[Any, ...] = (*_state(seed), p, eps, rms, index_offset, op)
    given: tuple[Any, ...] = (
        x.contiguous(),
        _contiguous(residual),
        _contiguous(weight),
        _contiguous(bias),
    )
    if _C.dropout_norm_forward(y, total, statistics, *given, *rest) != 0:
        names = ("x", "residual", "weight", "bias")
        copies: list[Any] = [_supported(t, op, name) for t, name in zip(given, names, strict=True)]
        if _C.dropout_norm_forward(y, total, statistics, *copies, *rest) != 0:
            raise refused(op)
    return y, total, statistics


def _save(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, _bias, ctx.state, *constants = args
    _, total, statistics = output
    p, eps, rms, index_offset, ctx.kept, *op = constants
    if not ctx.kept:
        return
    ctx.constants = (p, eps, rms, index_offset)
    ctx.op = op
    ctx.dtype = x.dtype
    ctx.sum_is_x = _sum_is_x(p, residual)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    keep_state(ctx, x if ctx.sum_is_x else total, statistics, weight)


def _gradient(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, _: None, *saved: Any
) -> tuple[Tensor | None, ...]:
    if not ctx.kept:
        raise RuntimeError("fusereg::dropout_norm: called with keep=False, so it has no gradient")
    total, statistics, weight, *state = unpacked(ctx, saved)
    (seed,) = state or (ctx.state,)
    if grad is None:  # only the sum was used
        grad = torch.zeros(total.shape, dtype=ctx.dtype, device=total.device)
    if ctx.sum_is_x:
        grad_sum = None
    wanted = ctx.needs_input_grad[:4]
    # Without dropping, the gradients of x and residual are the same.
    shared = ctx.constants[0] == 0 and wanted[0] and wanted[1] and grad.dtype is total.dtype
    asked = [wanted[0], wanted[1] and not shared, *wanted[2:]]
    found = _backward(
        grad, grad_sum, total, statistics, weight, seed, *ctx.constants, asked, *ctx.op
    )
    given = [t if want else None for t, want in zip(found, asked, strict=True)]
    if shared:
        given[1] = given[0]
    return tuple(given)


def _backward_kernel(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    seed: Any,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    wanted: Sequence[bool],
    op: str = "dropout_norm",
) -> Gradients:
    """Return the wanted ones of the gradients of x, residual, weight and bias."""
    of_x, of_residual, of_weight, of_bias = wanted
    grad, total = grad.contiguous(), total.contiguous()
    device, length = grad.device, grad.shape[-1]
    grad_x = torch.empty_like(grad) if of_x else None
    grad_residual = torch.empty_like(total) if of_residual else None
    grad_weight = grad_bias = partials = barrier = None
    slots = of_weight + of_bias
    if slots:
        assert weight is not None
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        grad_bias = torch.empty_like(grad_weight) if of_bias else None
        grad_weight = grad_weight if of_weight else None
        on_cuda = grad.is_cuda or _C.CUDA_ON_HOST
        chunks = _C.dropout_norm_chunks(grad.numel() // max(length, 1), on_cuda)
        partials = torch.empty(
            (chunks, slots, length), dtype=compute_dtype(grad.dtype), device=device
        )
        barrier = memory.barrier(device)
    results = (grad_x, grad_residual, grad_weight, grad_bias)
    rest: tuple[Any, ...] = (*_state(seed), p, rms, index_offset, partials, barrier, op)
    given: tuple[Any, ...] = (
        grad,
        _contiguous(grad_sum),
        total,
        statistics.contiguous(),
        _contiguous(weight),
    )
    if _C.dropout_norm_backward(*results, *given, *rest) != 0:
        names = ("grad", "grad_sum", "sum", "statistics", "weight")
        copies: list[Any] = [_supported(t, op, name) for t, name in zip(given, names, strict=True)]
        if _C.dropout_norm_backward(*results, *copies, *rest) != 0:
            raise refused(op)
    return results


def _save_backward(ctx: Any, args: tuple[Any, ...], output: object) -> None:
    grad, grad_sum, total, _, weight, ctx.state, *constants = args
    *ctx.constants, ctx.wanted = constants[:5]
    ctx.op = constants[5:]
    ctx.has_grad_sum = grad_sum is not None
    ctx.set_materialize_grads(False)
    keep_state(ctx, grad, total, weight)


def _second_gradient(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, total, weight, seed = kept(ctx)
    p, eps, rms, index_offset = ctx.constants

    def drop(v: Tensor) -> Tensor:
        if p == 0:
            return v
        dropped: Tensor = draws.mask(v, seed, p, False, 0, index_offset, *ctx.op)
        return dropped

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
    return of_grad, of_grad_sum if ctx.has_grad_sum else None, of_sum, None, of_weight


def _fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, p, _, rms, _, keep = rest
    y = x.new_empty(x.shape)
    if not keep:
        return y, None, None  # type: ignore[return-value]
    statistics = x.new_empty((*x.shape[:-1], 1 if rms else 3), dtype=compute_dtype(x.dtype))
    if _sum_is_x(p, residual):
        return y, None, statistics  # type: ignore[return-value]
    return y, x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype), statistics


def _fake_backward(
    grad: Tensor, _: object, total: Tensor, _statistics: object, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    like = (grad, total, weight, weight)
    return tuple(
        t.new_empty(t.shape) if want and t is not None else None
        for t, want in zip(like, rest[-1], strict=True)
    )


_norm = Operator(
    "dropout_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p,"
    " float eps, bool rms, SymInt index_offset, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake,
    save=_save,
    gradient=_gradient,
)
_norm.compile(_C.dropout_norm_functions)
_backward = Operator(
    "dropout_norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor statistics,"
    " Tensor? weight, Tensor? seed, float p, float eps, bool rms, SymInt index_offset,"
    " bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=_fake_backward,
    save=_save_backward,
    gradient=_second_gradient,
)


# --- the entry ------------------------------------------------------------------------------------


def _check_companion(t: object, x: Tensor, shape: torch.Size, op: str, name: str) -> None:
    """Raise unless t is a tensor of this shape on x's device, in x's dtype or float32."""
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


def _fit(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Return whether the kernel may be called at once, on tensors that go together."""
    if not (dispatch.ready(x) if residual is None else dispatch.ready(x, residual)) or not x.dim():
        return False
    vectors = [t for t in (weight, bias) if t is not None]
    if not vectors:
        return True
    first = vectors[0]
    return (
        dispatch.ready(*vectors)
        and first.dtype is x.dtype
        and first.shape == x.shape[-1:]
        and first.device == x.device
    )


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
    if not torch.compiler.is_compiling():
        checks.check_index_offset(index_offset, op)


def dropout_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float | None,
    training: bool,
    rms: bool,
    source: Source,
    index_offset: int,
    return_sum: bool,
    op: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute either kind; the public functions document the arguments."""
    if eps is None:  # as torch.nn.functional.rms_norm
        double = isinstance(x, Tensor) and x.dtype is torch.float64
        eps = torch.finfo(torch.float64 if double else torch.float32).eps
    # What training loops call, with as few questions as possible.
    plain = (
        type(p) is type(eps) is float
        and 0.0 <= p <= 1.0
        and eps >= 0.0
        and index_offset == 0
        and not dispatch.is_dynamo_compiling()
        and _fit(x, residual, weight, bias)
    )
    if not plain:
        _check(x, residual, weight, bias, p, eps, index_offset, op)
    p = float(p) if training else 0.0
    eps = float(eps)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    tensors = (x, residual, weight, bias)
    if dispatch.forward_mode() or (not plain and dispatch.functorch()):
        y, total = unfused(*tensors, p, eps, rms, source, index_offset, op)
        return (y, total) if return_sum else y

    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    constants = (p, eps, rms, index_offset, keep or return_sum)
    if plain or dispatch.direct(*tensors):
        state = random.eager_state(x, source, op) if p else (0, 0)
        rest = (state, *constants, op)
        y, total, _ = _norm.apply(*tensors, rest) if keep else _norm.kernel(*tensors, *rest)
    else:
        seed = random.traced_state(x, source, op) if p else None
        y, total, _ = _norm.traced(*tensors, seed, *constants)
    if not return_sum:
        return y  # type: ignore[no-any-return]
    return y, x if total is None or _sum_is_x(p, residual) else total
