"""Dropout, residual sum and layer or RMS normalization as one operation.

Forward gives the sum s as a result of its own, whether or not the caller wants it: backward keeps
it, and through it derivatives of any order find their way to x and residual. Second derivatives,
torch.func transforms and forward mode take the same formula in torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, draws, memory, random
from ..core.operator import (
    Operator,
    compute_dtype,
    contiguous_copies,
    gradients,
    keep_state,
    refused,
    state_of,
    unpacked,
)
from ..core.random import Source

#: Of x, residual, weight, bias.
_Gradients: TypeAlias = tuple[Tensor | None, ...]


def _sum_is_x(p: float, residual: object) -> bool:
    return p == 0 and residual is None


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- in torch's operations ------------------------------------------------------------------------


def _normalized(s: Tensor, weight: Tensor | None, eps: float, rms: bool) -> Tensor:
    # Not torch's layer_norm: as of 2.13, its derivative in forward mode has a wrong gradient.
    centered = s if rms else s - s.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.to(y.dtype)


def _by_parts(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, None]:
    """Return y and the sum, step by step with the same mask, in the kernels' dtype."""
    weight, bias, seed, p, eps, rms, index_offset, _, *op = rest
    compute = compute_dtype(x.dtype)
    s = x.to(compute).contiguous()
    if p:
        s = draws.mask(s, seed, p, False, 0, index_offset, *op)
    if residual is not None:
        s = residual.to(compute) + s
    y = _normalized(s, weight, eps, rms)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype), s.to((x if residual is None else residual).dtype), None


def _gradients_by_parts(
    grad: Tensor, grad_sum: Tensor | None, total: Tensor, *rest: Any
) -> _Gradients:
    _, weight, seed, p, eps, rms, index_offset, wanted, *op = rest
    wide = grad.to(compute_dtype(grad.dtype))
    s = total.to(wide.dtype)
    vector = None if weight is None else weight.to(wide.dtype)
    of_sum, of_weight = gradients(
        lambda s, weight: _normalized(s, weight, eps, rms), (s, vector), [wide]
    )
    assert of_sum is not None
    if grad_sum is not None:
        of_sum = of_sum + grad_sum
    of_x = of_sum.contiguous()
    if p:
        of_x = draws.mask(of_x, seed, p, False, 0, index_offset, *op)
    of_bias = wide.sum_to_size(wide.shape[-1:])
    found: Any = zip(
        (of_x, of_sum, of_weight, of_bias), (grad, total, weight, weight), wanted, strict=True
    )
    return tuple(t.to(like.dtype) if want else None for t, like, want in found)


# --- by the kernels -------------------------------------------------------------------------------


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
    results: tuple[Any, ...] = (y, total, statistics)
    rest: tuple[Any, ...] = (*state_of(seed), p, eps, rms, index_offset, op)
    given: tuple[Any, ...] = (
        x.contiguous(),
        _contiguous(residual),
        _contiguous(weight),
        _contiguous(bias),
    )
    if _C.dropout_norm_forward(*results, *given, *rest) != 0:
        copies: Any = contiguous_copies(given, ("x", "residual", "weight", "bias"), op)
        if _C.dropout_norm_forward(*results, *copies, *rest) != 0:
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
) -> _Gradients:
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
    rest: tuple[Any, ...] = (*state_of(seed), p, rms, index_offset, partials, barrier, op)
    given: tuple[Any, ...] = (
        grad,
        _contiguous(grad_sum),
        total,
        statistics.contiguous(),
        _contiguous(weight),
    )
    if _C.dropout_norm_backward(*results, *given, *rest) != 0:
        names = ("grad", "grad_sum", "sum", "statistics", "weight")
        copies: Any = contiguous_copies(given, names, op)
        if _C.dropout_norm_backward(*results, *copies, *rest) != 0:
            raise refused(op)
    return results


def _fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    _, _, _, p, _, rms, _, keep = rest
    y = x.new_empty(x.shape)
    if not keep:
        return y, None, None
    statistics = x.new_empty((*x.shape[:-1], 1 if rms else 3), dtype=compute_dtype(x.dtype))
    if _sum_is_x(p, residual):
        return y, None, statistics
    return y, x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype), statistics


def _fake_backward(
    grad: Tensor, _: object, total: Tensor, _statistics: object, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    like = (grad, total, weight, weight)
    return tuple(
        t.new_empty(t.shape) if want and t is not None else None
        for t, want in zip(like, rest[-1], strict=True)
    )


norm = Operator(
    "dropout_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p,"
    " float eps, bool rms, SymInt index_offset, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake,
    save=_save,
    gradient=_gradient,
    by_parts=_by_parts,
)
norm.compile(_C.dropout_norm_functions)
_norm_at_once = norm.at_once("xxvv", without_gradient=False)
_backward = Operator(
    "dropout_norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor statistics,"
    " Tensor? weight, Tensor? seed, float p, float eps, bool rms, SymInt index_offset,"
    " bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=_fake_backward,
    by_parts=_gradients_by_parts,
)


# --- the entry ------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    others: dict[str, Tensor | None],
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
    if x.dim() == 0:
        raise ValueError(f"fusereg.{op}: x must have at least 1 dimension, got 0")
    for name, t in others.items():
        if t is not None:
            checks.check_input(t, op, name)
            shape = x.shape if name == "residual" else x.shape[-1:]
            checks.check_like(x, t, shape, op, name, wide=True)
    weight, bias = others["weight"], others["bias"]
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise ValueError(
            f"fusereg.{op}: bias must have weight's dtype {weight.dtype}, got {bias.dtype}"
        )
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
    if (
        # What training loops call, with as few questions as possible.
        type(p) is type(eps) is float
        and 0.0 <= p <= 1.0
        and eps >= 0.0
        and source.seed is None
        and source.generator is None
        and not index_offset
        and not (weight is None and bias is not None)
        and not dispatch.is_dynamo_compiling()
    ):
        constants: tuple[Any, ...] = (p if training else 0.0, eps, rms, 0, True, op)
        found = _norm_at_once(constants, x, residual, weight, bias)
        if found is not None:
            return found[0] if not return_sum else (found[0], x if found[1] is None else found[1])
    checks.check_input(x, op)
    wide = x.dtype in (torch.float16, torch.bfloat16)
    if not (wide and isinstance(residual, Tensor) and residual.dtype is torch.float32):
        x, residual = checks.promoted(x, residual)
    _check(x, {"residual": residual, "weight": weight, "bias": bias}, p, eps, index_offset, op)
    p = float(p) if training else 0.0
    eps = float(eps)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    tensors = (x, residual, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    constants = (p, eps, rms, index_offset, keep or return_sum)
    if dispatch.direct(*tensors):
        state = random.eager_state(x, source, op) if p else (0, 0)
        y, total, _ = norm.eager(*tensors, state, *constants, op)
    else:
        seed = random.traced_state(x, source, op) if p else None
        y, total, _ = norm.traced(*tensors, seed, *constants)
    if not return_sum:
        return y  # type: ignore[no-any-return]
    return y, x if total is None or _sum_is_x(p, residual) else total
