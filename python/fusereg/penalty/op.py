"""Penalties and proximal steps as torch operations: autograd, torch.library, torch.func.

One form serves all public functions: each tensor w has strengths (l1, l2, group) and contributes

    R(w) = l1 * sum |w|  +  l2/2 * sum w^2  +  group * sum_g sqrt(n_g) * ||w_g||_2

with groups along one dimension. Layers, from the kernel outwards:

``_penalty_kernels``
    calls the kernels; no autograd.
``_Penalty``
    the eager autograd function over ``value`` and ``write_grads``.
``torch.ops.fusereg.penalty*``, ``torch.ops.fusereg.prox_``
    the same for torch.compile, export, fake tensors and functorch.
``penalty``
    the entry: picks between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..core import checks, dispatch
from .kernels import add_grads_, prox_, value, value_dtype, write_grads
from .strengths import Strengths

# --- autograd ------------------------------------------------------------------------------------


def _differentiable_grad(
    scale: Tensor, w: Tensor, l1: float, l2: float, group: float, dim: int
) -> Tensor:
    """scale * dR/dw from torch's own operations, for where the gradient is differentiated."""
    x = w if w.dtype is torch.float64 else w.float()
    # sign() of NaN is 0; a NaN weight must stay visible.
    grad = torch.where(x.isnan(), x, x.sign()) * l1 + l2 * x if l1 else l2 * x
    if group and x.numel():
        dims = [d for d in range(x.dim()) if d != dim % x.dim()] if x.dim() else []
        square = x.square().sum(dims, keepdim=True) if dims else x.square()
        size = x.numel() // square.numel()
        zero = square == 0
        norm = torch.where(zero, torch.ones_like(square), square).sqrt()
        grad = grad + torch.where(zero, torch.zeros_like(x), (group * size**0.5) * x / norm)
    return (scale.to(device=x.device, dtype=x.dtype) * grad).to(w.dtype)


def _differentiable_grads(
    scale: Tensor, tensors: Sequence[Tensor], s: Strengths
) -> list[Tensor]:
    lists = zip(*s.lists(len(tensors))[:3], strict=True)
    return [
        _differentiable_grad(scale, w, *strengths, s.dim)
        for w, strengths in zip(tensors, lists, strict=True)
    ]


def _tangent(
    s: Strengths, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """Forward mode: the sum of <dR/dw, tangent of w>."""
    dtype = value_dtype(tensors)
    total = torch.zeros((), dtype=dtype, device=tensors[0].device)
    one = torch.ones((), dtype=dtype, device=tensors[0].device)
    grads = _differentiable_grads(one, tensors, s)
    for g, t in zip(grads, tangents, strict=True):
        if t is not None:
            total = total + (g.to(dtype) * t.to(dtype)).sum().to(total.device)
    return total


def _backward(
    op: str, scale: Tensor, tensors: Sequence[Tensor], s: Strengths
) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return write_grads(op, scale, tensors, s)
    return _differentiable_grads(scale, tensors, s)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """torch types neither apply() nor what it returns."""
    return function.apply(*args)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, s: Strengths, *tensors: Tensor) -> Tensor:
        ctx.call = (op, s)
        # Only what backward reads: a frozen tensor may change before it, or be an inference tensor.
        ctx.wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        ctx.count = len(tensors)
        ctx.save_for_backward(*(tensors[i] for i in ctx.wanted))
        ctx.save_for_forward(*tensors)
        return value(op, list(tensors), s)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, s = ctx.call
        return _tangent(s, ctx.saved_tensors, tangents[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        op, s = ctx.call
        saved = ctx.saved_tensors  # asked once: activation checkpointing allows no more
        grads: list[Tensor | None] = [None] * ctx.count
        for i, g in zip(
            ctx.wanted, _backward(op, grad, saved, s.select(ctx.wanted)), strict=True
        ):
            grads[i] = g
        return (None, None, *grads)


# --- torch.library -------------------------------------------------------------------------------

dispatch.library.define(
    "penalty(Tensor[] params, float[] l1, float[] l2, float[] group, int dim) -> Tensor"
)
dispatch.library.define(
    "penalty_backward(Tensor scale, Tensor[] params,"
    " float[] l1, float[] l2, float[] group, int dim) -> Tensor[]"
)
dispatch.library.define(
    "penalty_add_grad_(Tensor[] params, Tensor(a!)[] grads, Tensor? scale, float factor,"
    " float[] l1, float[] l2, float[] group, int dim) -> Tensor"
)
dispatch.library.define(
    "prox_(Tensor(a!)[] params, float[] l1, float[] l2, float[] group, int dim) -> ()"
)

_Floats = list[float]


def _op_penalty(params: list[Tensor], l1: _Floats, l2: _Floats, group: _Floats, dim: int) -> Tensor:
    return value("penalty", params, Strengths(l1, l2, group, dim))


def _op_penalty_backward(
    scale: Tensor, params: list[Tensor], l1: _Floats, l2: _Floats, group: _Floats, dim: int
) -> list[Tensor]:
    return write_grads("penalty", scale, params, Strengths(l1, l2, group, dim))


def _op_penalty_add_grad_(
    params: list[Tensor],
    grads: list[Tensor],
    scale: Tensor | None,
    factor: float,
    l1: _Floats,
    l2: _Floats,
    group: _Floats,
    dim: int,
) -> Tensor:
    whole = factor if scale is None else scale if factor == 1.0 else scale * factor
    return add_grads_("add_penalty_grad_", params, grads, whole, Strengths(l1, l2, group, dim))


def _op_prox_(params: list[Tensor], l1: _Floats, l2: _Floats, group: _Floats, dim: int) -> None:
    prox_("prox", params, Strengths(l1, l2, group, dim))


for _key in ("CPU", "CUDA"):
    dispatch.library.impl("penalty", _op_penalty, _key)
    dispatch.library.impl("penalty_backward", _op_penalty_backward, _key)
    dispatch.library.impl("penalty_add_grad_", _op_penalty_add_grad_, _key)
    dispatch.library.impl("prox_", _op_prox_, _key)


def _fake_value(params: Sequence[Tensor]) -> Tensor:
    return params[0].new_empty((), dtype=value_dtype(params))


torch.library.register_fake(
    "fusereg::penalty",
    lambda params, l1, l2, group, dim: _fake_value(params),
    lib=dispatch.library,
)
torch.library.register_fake(
    "fusereg::penalty_backward",
    lambda scale, params, l1, l2, group, dim: [torch.empty_like(p) for p in params],
    lib=dispatch.library,
)
torch.library.register_fake(
    "fusereg::penalty_add_grad_",
    lambda params, grads, scale, factor, l1, l2, group, dim: _fake_value(params),
    lib=dispatch.library,
)
torch.library.register_fake(
    "fusereg::prox_", lambda params, l1, l2, group, dim: None, lib=dispatch.library
)


def _save_for_penalty(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    params, *ctx.call = inputs
    ctx.save_for_backward(*params)


def _penalty_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.fusereg.penalty_backward(grad, list(ctx.saved_tensors), *ctx.call)
    return grads, None, None, None, None


def _save_for_backward_op(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    scale, params, *ctx.call = inputs
    ctx.save_for_backward(scale, *params)


def _penalty_second_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    scale, *params = ctx.saved_tensors
    l1, l2, group, dim = ctx.call
    with torch.enable_grad():
        scale = scale.detach().requires_grad_()
        params = [p.detach().requires_grad_() for p in params]
        first = _differentiable_grads(scale, params, Strengths(l1, l2, group, dim))
        used = [(f, g) for f, g in zip(first, grads, strict=True) if g is not None]
        if not used:
            return None, [None] * len(params), None, None, None, None
        second = torch.autograd.grad(
            [f for f, _ in used], [scale, *params], [g for _, g in used], allow_unused=True
        )
    return second[0], list(second[1:]), None, None, None, None


torch.library.register_autograd(
    "fusereg::penalty", _penalty_gradient, setup_context=_save_for_penalty, lib=dispatch.library
)
torch.library.register_autograd(
    "fusereg::penalty_backward",
    _penalty_second_gradient,
    setup_context=_save_for_backward_op,
    lib=dispatch.library,
)


# --- torch.func -----------------------------------------------------------------------------------


def _unbatched(tensors: Sequence[Tensor], in_dims: Sequence[int | None], i: int) -> list[Tensor]:
    return [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]


class _PenaltyTransform(torch.autograd.Function):
    """As _Penalty, for torch.func: grad, jacrev, vmap and their compositions."""

    @staticmethod
    def forward(op: str, s: Strengths, *tensors: Tensor) -> Tensor:
        if dispatch.eager():
            return value(op, list(tensors), s)
        result: Tensor = torch.ops.fusereg.penalty(tensors, *s.lists(len(tensors)))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, s = ctx.call
        return _tangent(s, ctx.saved_tensors, tangents[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_apply(_GradTransform, *ctx.call, grad, *ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], op: str, s: Strengths, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        # One call a sample: the kernel takes lists, not batches.
        values = [
            _apply(_PenaltyTransform, op, s, *_unbatched(tensors, in_dims[2:], i))
            for i in range(info.batch_size)
        ]
        return torch.stack(values), 0


class _GradTransform(torch.autograd.Function):
    """scale * dR/dw, differentiable again through torch's own operations."""

    @staticmethod
    def forward(
        op: str, s: Strengths, scale: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        if dispatch.eager():
            return tuple(write_grads(op, scale, tensors, s))
        lists = s.lists(len(tensors))
        return tuple(torch.ops.fusereg.penalty_backward(scale, tensors, *lists))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        pullback = torch.func.vjp(_GradTransform._formula(ctx), *ctx.saved_tensors)[1]
        return None, None, *pullback(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        given = tuple(
            torch.zeros_like(x) if t is None else t
            for x, t in zip(saved, tangents[2:], strict=True)
        )
        out: tuple[Tensor, ...] = torch.func.jvp(_GradTransform._formula(ctx), saved, given)[1]
        return out

    @staticmethod
    def _formula(ctx: Any) -> Callable[..., tuple[Tensor, ...]]:
        _, s = ctx.call
        return lambda scale, *tensors: tuple(_differentiable_grads(scale, tensors, s))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], op: str, s: Strengths, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        grads = [
            _apply(_GradTransform, op, s, *_unbatched(tensors, in_dims[2:], i))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(g) for g in zip(*grads, strict=True))
        return stacked, (0,) * len(stacked)


# --- the entries ----------------------------------------------------------------------------------


def penalty(op: str, tensors: list[Tensor], s: Strengths) -> Tensor:
    """Return the differentiable sum of R over plain tensors."""
    if not dispatch.eager():
        for i, t in enumerate(tensors):
            checks.check(t, op, f"params[{i}]")
        if dispatch.functorch():
            return cast(Tensor, _apply(_PenaltyTransform, op, s, *tensors))
        result: Tensor = torch.ops.fusereg.penalty(tensors, *s.lists(len(tensors)))
        return result
    if torch.is_grad_enabled():
        return cast(Tensor, _apply(_Penalty, op, s, *tensors))
    return value(op, tensors, s)


def add_grads(tensors: list[Tensor], scale: Tensor | float | None, s: Strengths) -> Tensor:
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
            total = torch.ops.fusereg.penalty_add_grad_(
                [tensors[i] for i in needed],
                grads,
                scale if isinstance(scale, Tensor) else None,
                float(scale) if isinstance(scale, (int, float)) else 1.0,
                *s.select(needed).lists(len(needed)),
            )
        if frozen:
            value = torch.ops.fusereg.penalty(
                [tensors[i] for i in frozen], *s.select(frozen).lists(len(frozen))
            )
            total = total + value.to(total.device)
        return total
