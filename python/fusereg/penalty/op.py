"""Penalties and proximal steps as torch operations.

One form serves all public functions: each tensor w has strengths (l1, l2, group) and contributes

    R(w) = l1 * sum |w|  +  l2/2 * sum w^2  +  group * sum_g sqrt(n_g) * ||w_g||_2

with groups along one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch, operator
from ..core.operator import Operator
from . import kernels as _kernels
from .strengths import Strengths

# --- derivatives of one tensor's R in torch's operations ------------------------------------------


def _gradient(w: Tensor, l1: float, l2: float, group: float, dim: int) -> Tensor:
    """Return dR/dw, in float32 or float64."""
    x = w if w.dtype is torch.float64 else w.float()
    # sign() of NaN is 0; a NaN weight must stay visible.
    grad = torch.where(x.isnan(), x, x.sign()) * l1 + l2 * x if l1 else l2 * x
    if group and x.numel():
        zero, norm, factor = _norms(x, group, dim)
        grad = grad + torch.where(zero, torch.zeros_like(x), factor * x / norm)
    return grad


def _hessian_times(w: Tensor, v: Tensor, l1: float, l2: float, group: float, dim: int) -> Tensor:
    """Return d2R/dw2 times v, in float32 or float64."""
    x = w if w.dtype is torch.float64 else w.float()
    v = v.to(x.dtype)
    product = l2 * v
    if group and x.numel():
        zero, norm, factor = _norms(x, group, dim)
        direction = x / norm
        along = _sum(direction * v, _others(x, dim))
        change = factor * (v - direction * along) / norm
        product = product + torch.where(zero, torch.zeros_like(x), change)
    return product


def _norms(x: Tensor, group: float, dim: int) -> tuple[Tensor, Tensor, float]:
    """Return which groups are zero, norms (1 for those), and group * sqrt(n_g)."""
    square = _sum(x.square(), _others(x, dim))
    zero = square == 0
    norm = torch.where(zero, torch.ones_like(square), square).sqrt()
    return zero, norm, group * (x.numel() // square.numel()) ** 0.5


def _others(x: Tensor, dim: int) -> list[int]:
    return [d for d in range(x.dim()) if d != dim % x.dim()]


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x


def _total(dtype: torch.dtype, parts: list[Tensor]) -> Tensor:
    """Return the sum of all elements, on the first tensor's device."""
    return _kernels.sum_on_first([part.to(dtype).sum() for part in parts])


# --- the value ------------------------------------------------------------------------------------


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """Keep only what backward reads: a frozen tensor may change, or be an inference tensor."""
    params, *ctx.strengths = args
    wanted = [i for i, p in enumerate(params) if p.requires_grad]
    ctx.listed, ctx.wanted = len(params), wanted
    if len(wanted) == len(params) or dispatch.forward_mode():
        ctx.wanted = None
        operator.keep(ctx, *params)
    else:
        ctx.save_for_backward(*[params[i] for i in wanted])


def _value_gradient(ctx: Any, scale: Tensor) -> tuple[list[Tensor | None]]:
    tensors = list(ctx.saved_tensors)  # asked once: activation checkpointing allows no more
    l1, l2, group, dim, *op = ctx.strengths
    if ctx.wanted is not None:
        l1, l2, group, dim = Strengths.of(l1, l2, group, dim).select(ctx.wanted).arguments()
    arguments = (scale, tensors, l1, l2, group, dim)
    if not dispatch.eager():
        grads = _penalty_backward.traced(*arguments)
    elif dispatch.wrapped((scale,)):
        # torch.autograd.grad(is_grads_batched=True) has no loop over operators that take lists.
        grads = _written_out(*arguments)
    else:
        grads = _penalty_backward.eager(*arguments, *op)
    if ctx.wanted is None:
        return (list(grads),)
    found: list[Tensor | None] = [None] * ctx.listed
    for i, g in zip(ctx.wanted, grads, strict=True):
        found[i] = g
    return (found,)


def _written_out(scale: Tensor, params: Sequence[Tensor], *strengths: Any) -> list[Tensor]:
    """Return scale * dR/dw from torch's operations."""
    return [
        (scale.to(p.device) * _gradient(p, *s)).to(p.dtype)
        for p, s in zip(params, Strengths.of(*strengths).each(len(params)), strict=True)
    ]


def _value_tangent(ctx: Any, tangents: Sequence[Tensor | None], *_: None) -> Tensor:
    tensors = ctx.saved_tensors
    each = Strengths.of(*ctx.strengths[:4]).each(len(tensors))
    parts = [
        _gradient(p, *s) * t
        for p, s, t in zip(tensors, each, tangents, strict=True)
        if t is not None
    ]
    return _total(_kernels.value_dtype(tensors), parts)


penalty = Operator(
    "penalty(Tensor[] params, float[] l1, float[] l2, float[] group, int dim) -> Tensor",
    lambda params, l1, l2, group, dim, op="penalty": _kernels.value(
        op, params, Strengths.of(l1, l2, group, dim)
    ),
    fake=lambda params, *_: _fake_value(params),
    save=_save,
    gradient=_value_gradient,
    tangent=_value_tangent,
)


def _fake_value(params: Sequence[Tensor]) -> Tensor:
    return params[0].new_empty((), dtype=_kernels.value_dtype(params))


# --- the gradient ---------------------------------------------------------------------------------


def _save_all(ctx: Any, args: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    scale, params, *strengths = args
    ctx.strengths = strengths[:4]
    operator.keep(ctx, scale, *params)


def _gradient_gradient(ctx: Any, *grads: Any) -> tuple[Tensor, list[Tensor | None]]:
    if len(grads) == 1 and isinstance(grads[0], (list, tuple)):
        (grads,) = grads
    scale, *params = ctx.saved_tensors
    of_scale = [torch.zeros_like(scale)]
    of_params: list[Tensor | None] = []
    each = Strengths.of(*ctx.strengths).each(len(params))
    for p, g, s in zip(params, grads, each, strict=True):
        if g is None:
            of_params.append(None)
            continue
        of_scale.append((_gradient(p, *s) * g).to(scale.dtype).sum())
        of_params.append((scale.to(p.device) * _hessian_times(p, g, *s)).to(p.dtype))
    return _kernels.sum_on_first(of_scale), of_params


def _gradient_tangent(
    ctx: Any, of_scale: Tensor | None, of_params: Sequence[Tensor | None], *_: None
) -> tuple[Tensor, ...]:
    scale, *params = ctx.saved_tensors
    found = []
    each = Strengths.of(*ctx.strengths).each(len(params))
    for p, t, s in zip(params, of_params, each, strict=True):
        tangent = torch.zeros_like(p)
        if of_scale is not None:
            tangent = tangent + of_scale.to(p.device) * _gradient(p, *s)
        if t is not None:
            tangent = tangent + scale.to(p.device) * _hessian_times(p, t, *s)
        found.append(tangent.to(p.dtype))
    return tuple(found)


_penalty_backward = Operator(
    "penalty_backward(Tensor scale, Tensor[] params,"
    " float[] l1, float[] l2, float[] group, int dim) -> Tensor[]",
    lambda scale, params, l1, l2, group, dim, op="penalty": tuple(
        _kernels.write_grads(op, scale, params, Strengths.of(l1, l2, group, dim))
    ),
    fake=lambda scale, params, *_: [torch.empty_like(p) for p in params],
    save=_save_all,
    gradient=_gradient_gradient,
    tangent=_gradient_tangent,
)


# --- what writes over its arguments ---------------------------------------------------------------


def _add_grad(
    params: list[Tensor], grads: list[Tensor], scale: Tensor | None, factor: float, *strengths: Any
) -> Tensor:
    whole = factor if scale is None else scale if factor == 1.0 else scale * factor
    s = Strengths.of(*strengths)
    return _kernels.add_grads_("add_penalty_grad_", params, grads, whole, s)


_penalty_add_grad = Operator(
    "penalty_add_grad_(Tensor[] params, Tensor(a!)[] grads, Tensor? scale, float factor,"
    " float[] l1, float[] l2, float[] group, int dim) -> Tensor",
    _add_grad,
    fake=lambda params, *_: _fake_value(params),
)
_prox = Operator(
    "prox_(Tensor(a!)[] params, float[] l1, float[] l2, float[] group, int dim) -> ()",
    lambda params, *strengths: _kernels.prox_("prox", params, Strengths.of(*strengths)),
    fake=lambda *_: None,
)


def add_grads_(tensors: list[Tensor], scale: Tensor | float | None, s: Strengths) -> Tensor:
    """Add scale * dR/dw into every ``.grad`` and return the sum of R, through the operators."""
    needed = [i for i, t in enumerate(tensors) if t.requires_grad]
    frozen = [i for i, t in enumerate(tensors) if not t.requires_grad]
    with torch.no_grad():
        grads = []
        for i in needed:
            t = tensors[i]
            if t.grad is None:
                t.grad = torch.zeros_like(t)
            grads.append(t.grad)
        total = torch.zeros((), device=tensors[0].device)
        if needed:
            params = [tensors[i] for i in needed]
            scales = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale or 1.0))
            own = s.select(needed).arguments()
            total = _penalty_add_grad.overload(params, grads, *scales, *own)
        if frozen:
            params = [tensors[i] for i in frozen]
            value = penalty.overload(params, *s.select(frozen).arguments())
            total = total + value.to(total.device)
        return total


def prox_(tensors: list[Tensor], s: Strengths) -> None:
    """Apply the proximal operator of R in place, through the operator."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        with torch.no_grad():  # only where it is needed: exported graphs have a part of its own
            prox_(tensors, s)
    else:
        _prox.overload(tensors, *s.arguments())
