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

from .. import _C
from ..core import checks, dispatch, distributed
from ..core import params as _params
from ..core.params import Strength
from .kernels import Strengths, add_grads_, prox_, value, value_dtype, write_grads

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
    scale: Tensor, tensors: Sequence[Tensor], s: Strengths, dim: int
) -> list[Tensor]:
    lists = zip(*s.lists(len(tensors)), strict=True)
    return [
        _differentiable_grad(scale, w, *strengths, dim)
        for w, strengths in zip(tensors, lists, strict=True)
    ]


def _tangent(
    s: Strengths, dim: int, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """Forward mode: the sum of <dR/dw, tangent of w>."""
    dtype = value_dtype(tensors)
    total = torch.zeros((), dtype=dtype, device=tensors[0].device)
    one = torch.ones((), dtype=dtype, device=tensors[0].device)
    grads = _differentiable_grads(one, tensors, s, dim)
    for g, t in zip(grads, tangents, strict=True):
        if t is not None:
            total = total + (g.to(dtype) * t.to(dtype)).sum().to(total.device)
    return total


def _backward(
    op: str, scale: Tensor, tensors: Sequence[Tensor], s: Strengths, dim: int
) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return write_grads(op, scale, tensors, s, dim)
    return _differentiable_grads(scale, tensors, s, dim)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """torch types neither apply() nor what it returns."""
    return function.apply(*args)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, s: Strengths, dim: int, *tensors: Tensor) -> Tensor:
        ctx.call = (op, s, dim)
        # Only what backward reads: a frozen tensor may change before it, or be an inference tensor.
        ctx.wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        ctx.count = len(tensors)
        ctx.save_for_backward(*(tensors[i] for i in ctx.wanted))
        ctx.save_for_forward(*tensors)
        return value(op, list(tensors), s, dim)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, s, dim = ctx.call
        return _tangent(s, dim, ctx.saved_tensors, tangents[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        op, s, dim = ctx.call
        saved = ctx.saved_tensors  # asked once: activation checkpointing allows no more
        grads: list[Tensor | None] = [None] * ctx.count
        for i, g in zip(
            ctx.wanted, _backward(op, grad, saved, s.select(ctx.wanted), dim), strict=True
        ):
            grads[i] = g
        return (None, None, None, *grads)


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
    return value("penalty", params, Strengths(l1, l2, group), dim)


def _op_penalty_backward(
    scale: Tensor, params: list[Tensor], l1: _Floats, l2: _Floats, group: _Floats, dim: int
) -> list[Tensor]:
    return write_grads("penalty", scale, params, Strengths(l1, l2, group), dim)


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
    return add_grads_("add_penalty_grad_", params, grads, whole, Strengths(l1, l2, group), dim)


def _op_prox_(params: list[Tensor], l1: _Floats, l2: _Floats, group: _Floats, dim: int) -> None:
    prox_("prox", params, Strengths(l1, l2, group), dim)


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
        first = _differentiable_grads(scale, params, Strengths(l1, l2, group), dim)
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
    def forward(op: str, s: Strengths, dim: int, *tensors: Tensor) -> Tensor:
        if dispatch.eager():
            return value(op, list(tensors), s, dim)
        result: Tensor = torch.ops.fusereg.penalty(tensors, *s.lists(len(tensors)), dim)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, s, dim = ctx.call
        return _tangent(s, dim, ctx.saved_tensors, tangents[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_apply(_GradTransform, *ctx.call, grad, *ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], op: str, s: Strengths, dim: int, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        # One call a sample: the kernel takes lists, not batches.
        values = [
            _apply(_PenaltyTransform, op, s, dim, *_unbatched(tensors, in_dims[3:], i))
            for i in range(info.batch_size)
        ]
        return torch.stack(values), 0


class _GradTransform(torch.autograd.Function):
    """scale * dR/dw, differentiable again through torch's own operations."""

    @staticmethod
    def forward(
        op: str, s: Strengths, dim: int, scale: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        if dispatch.eager():
            return tuple(write_grads(op, scale, tensors, s, dim))
        lists = s.lists(len(tensors))
        return tuple(torch.ops.fusereg.penalty_backward(scale, tensors, *lists, dim))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        pullback = torch.func.vjp(_GradTransform._formula(ctx), *ctx.saved_tensors)[1]
        return None, None, None, *pullback(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        given = tuple(
            torch.zeros_like(x) if t is None else t
            for x, t in zip(saved, tangents[3:], strict=True)
        )
        out: tuple[Tensor, ...] = torch.func.jvp(_GradTransform._formula(ctx), saved, given)[1]
        return out

    @staticmethod
    def _formula(ctx: Any) -> Callable[..., tuple[Tensor, ...]]:
        _, s, dim = ctx.call
        return lambda scale, *tensors: tuple(_differentiable_grads(scale, tensors, s, dim))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], op: str, s: Strengths, dim: int, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        grads = [
            _apply(_GradTransform, op, s, dim, *_unbatched(tensors, in_dims[3:], i))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(g) for g in zip(*grads, strict=True))
        return stacked, (0,) * len(stacked)


# --- the entries ----------------------------------------------------------------------------------


Names = tuple[str, str, str]


def collect(
    params: _params.Params,
    strengths: tuple[object, object, object],
    op: str,
    names: Names = Strengths._fields,
    l2_factor: float = 1.0,
) -> tuple[list[Tensor], Strengths]:
    """The distinct tensors and their strengths (l1, l2, group), which errors call ``names``."""
    tensors = _params.as_list(params, op)
    s: tuple[Strength, ...] = tuple(
        _params.check_strength(x, len(tensors), op, name)
        for x, name in zip(strengths, names, strict=True)
    )
    if isinstance(params, torch.nn.Module):
        repeated: list[int] = []
    elif torch.compiler.is_compiling():  # cannot be traced through compiled code
        seen: dict[int, int] = {}
        repeated = [i for i, t in enumerate(tensors) if seen.setdefault(id(t), i) != i]
    else:
        repeated = _C.scan(tensors)[1]
    tensors, s = _params.without_repeats(tensors, s, repeated, op)
    l1, l2, group = s
    return tensors, Strengths(l1, _params.scaled(l2, l2_factor), group)


def penalty(op: str, tensors: list[Tensor], s: Strengths, dim: int = 0) -> Tensor:
    """The differentiable sum of R over the tensors."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    if not dispatch.eager():
        for i, t in enumerate(tensors):
            checks.check(t, op, f"params[{i}]")
        if dispatch.functorch():
            return cast(Tensor, _apply(_PenaltyTransform, op, s, dim, *tensors))
        result: Tensor = torch.ops.fusereg.penalty(tensors, *s.lists(len(tensors)), dim)
        return result
    if not _C.scan(tensors)[0]:
        for i, t in enumerate(tensors):
            checks.check(t, op, f"params[{i}]")
        if distributed.has_dtensor(tensors):
            from . import dtensor as _dtensor

            return _dtensor.penalty(op, tensors, s, dim)
    if torch.is_grad_enabled():
        return cast(Tensor, _apply(_Penalty, op, s, dim, *tensors))
    return value(op, tensors, s, dim)
