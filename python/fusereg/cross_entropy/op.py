"""Cross-entropy as an operation: forward keeps a number a row, backward computes the rest again.

Derivatives of higher order, and those in forward mode, are formulas of torch's operations on the
target weights q as a dense tensor (cross_entropy.h has the formula).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch
from ..core.operator import Operator, keep, refused

OP = "cross_entropy"
#: As torch numbers them.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, class weights and gradients' terms."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def class_dim(x: Tensor) -> int:
    """Return the dimension of the classes: the first of one, else the second."""
    return 0 if x.dim() == 1 else 1


def shape_of_rows(x: Tensor) -> list[int]:
    """Return the shape without the classes."""
    shape = list(x.shape)
    del shape[class_dim(x)]
    return shape


def _empty_results(
    x: Tensor, target: Tensor, reduction: int, wide: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return memory for the loss and for what backward keeps."""
    shape = shape_of_rows(x)
    rows = 1
    for size in shape:
        rows = rows * size
    kept = rows * (2 if target.is_floating_point() else 1) + 3
    dtype = torch.float32 if wide and x.dtype is not torch.float64 else x.dtype
    device = x.device
    loss = torch.empty(shape if reduction == 0 else (), dtype=dtype, device=device)
    return loss, torch.empty(kept, dtype=torch.float64, device=device)


def _prepared(x: Tensor, *others: Tensor | None, op: str) -> tuple[Any, ...]:
    """Return copies in a layout that the kernels support."""
    x = checks.plain(x, op, "input").contiguous()
    found: list[Tensor | None] = [x]
    for t in others:
        if t is not None:
            t = t.detach()
            if t.is_floating_point():
                t = checks.plain(t, op, "an argument")
            t = t.contiguous()
        found.append(t)
    return tuple(found)


def _forward(
    x: Tensor,
    target: Tensor,
    other: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    ignore_index: int,
    reduction: int,
    wide: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the statistics of the rows."""
    loss, statistics = _empty_results(x, target, reduction, wide)
    workspace = None
    if x.is_cuda or _C.CUDA_ON_HOST:
        workspace = torch.empty(_C.CROSS_ENTROPY_WORKSPACE, dtype=torch.float64, device=x.device)
    results: tuple[Any, ...] = (loss, statistics, workspace)
    rest: tuple[Any, ...] = (smoothing, ignore_index, reduction, OP)
    given: tuple[Any, ...] = (x, target, other, share, weight)
    if _C.cross_entropy_forward(*results, *given, *rest) != 0:
        given = _prepared(*given, op=OP)
        if _C.cross_entropy_forward(*results, *given, *rest) != 0:
            raise refused(OP)
    return loss, statistics


def _save(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
    x, target, other, share, weight, *ctx.constants, ctx.overwrite = args
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    keep(ctx, x, target, other, share, weight, statistics)


def _gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    _refuse_targets(ctx, ctx.needs_input_grad[1:5])
    if grad is None:
        return (None,)
    constants = ctx.constants[:3]
    if ctx.overwrite and not torch.is_grad_enabled() and dispatch.direct(grad, *tensors):
        return (_over_logits(grad, *tensors, *constants),)
    return (_backward(grad, *tensors, *constants),)


def _over_logits(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Write the gradient over the logits, and tell autograd, which kept them."""
    out = x.detach()
    given: tuple[Any, ...] = (grad.contiguous(), x, *rest, OP)
    if _C.cross_entropy_backward(out, *given) != 0:
        out.copy_(_backward_kernel(grad, x, *rest))
    torch.autograd.graph.increment_version(x)
    return out


def _refuse_targets(ctx: Any, wanted: Any) -> None:
    if any(wanted):
        raise RuntimeError(
            f"fusereg.{OP}: no gradient of target and weight here; detach them, or use "
            "torch.nn.functional.cross_entropy"
        )


def _tangent(ctx: Any, tangent: Tensor | None, *others: Any) -> tuple[Tensor | None, None]:
    _refuse_targets(ctx, [t is not None for t in others if isinstance(t, Tensor)])
    x, *rest = ctx.saved_tensors
    smoothing, ignore_index, reduction, wide = ctx.constants
    assert tangent is not None
    shape = shape_of_rows(x) if reduction == 0 else []
    loss_dtype = torch.float32 if wide and x.dtype is not torch.float64 else x.dtype
    ones = x.new_ones(shape, dtype=loss_dtype)
    slope = _backward(ones, x, *rest, smoothing, ignore_index, reduction)
    product = slope.to(compute_dtype(x.dtype)) * tangent
    total = product.sum(class_dim(x)) if reduction == 0 else product.sum()
    return total.to(loss_dtype), None


def _backward_kernel(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Return the gradient of the logits."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    given: tuple[Any, ...] = (grad.contiguous(), x, *rest[:-3])
    constants: tuple[Any, ...] = (*rest[-3:], OP)
    grad_x = torch.empty_like(x)
    if _C.cross_entropy_backward(grad_x, *given, *constants) != 0:
        given = _prepared(x, grad, *rest[:-3], op=OP)
        given = (given[1], given[0], *given[2:])
        grad_x = torch.empty_like(given[1])
        if _C.cross_entropy_backward(grad_x, *given, *constants) != 0:
            raise refused(OP)
    return grad_x


def _dense_weights(x: Tensor, others: list[Any], smoothing: float, ignore_index: int) -> Tensor:
    """Return q as a tensor like x, times the factors that the reduction has."""
    target, other, share, weight, statistics = others
    dim, dtype = class_dim(x), compute_dtype(x.dtype)
    by_class = [1] * x.dim()
    by_class[dim] = -1
    of_class = None if weight is None else weight.to(dtype).view(by_class)

    def smoothed(t: Tensor) -> Tensor:
        q = t * (1 - smoothing) + smoothing / max(x.shape[dim], 1)
        return q if of_class is None else q * of_class

    factors: Tensor = statistics[-3:].to(dtype)
    if target.is_floating_point():
        soft: Tensor = smoothed(target.to(dtype)) * factors[0]
        return soft

    def of_indices(index: Tensor) -> Tensor:
        there = (index != ignore_index).unsqueeze(dim)
        safe = index.unsqueeze(dim).where(there, 0)
        classes = torch.arange(x.shape[dim], device=x.device).view(by_class)
        # Where nothing is there, the factor may be infinite.
        return torch.where(there, smoothed((classes == safe).to(dtype)), 0.0)

    q: Tensor = of_indices(target) * factors[0]
    if other is None or share is None:
        return q
    first: Tensor = share.to(dtype).view(-1, *[1] * (x.dim() - 1))
    return first * q + (1 - first) * of_indices(other) * factors[1]


def _save_backward(ctx: Any, args: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.smoothing, ctx.ignore_index, ctx.reduction = args
    keep(ctx, *tensors)


def _parts(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return the incoming gradient, softmax, q, its sum along the classes, and their dimension."""
    grad, x, *others = ctx.saved_tensors
    dim, dtype = class_dim(x), compute_dtype(x.dtype)
    q = _dense_weights(x, others, ctx.smoothing, ctx.ignore_index)
    along = grad.to(dtype)
    if ctx.reduction == 0:
        along = along.unsqueeze(dim)
    return along, torch.softmax(x.to(dtype), dim), q, q.sum(dim, keepdim=True), dim


def _second_gradient(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_targets(ctx, ctx.needs_input_grad[2:6])
    grad, x = ctx.saved_tensors[:2]
    along, p, q, s, dim = _parts(ctx)
    v = v.to(p.dtype)
    mean = (p * v).sum(dim, keepdim=True)
    of_grad = (s * mean - (q * v).sum(dim, keepdim=True)).squeeze(dim)
    if ctx.reduction != 0:
        of_grad = of_grad.sum()
    return of_grad.to(grad.dtype), (along * s * p * (v - mean)).to(x.dtype)


def _second_tangent(
    ctx: Any, grad_tangent: Tensor | None, tangent: Tensor | None, *others: Any
) -> Tensor:
    # The statistics have a tangent of zeros under torch.func: p is computed of x here.
    x = ctx.saved_tensors[1]
    along, p, q, s, dim = _parts(ctx)
    total = torch.zeros_like(p)
    if grad_tangent is not None:
        other = grad_tangent.to(p.dtype)
        total = total + (other.unsqueeze(dim) if ctx.reduction == 0 else other) * (s * p - q)
    if tangent is not None:
        t = tangent.to(p.dtype)
        total = total + along * s * p * (t - (p * t).sum(dim, keepdim=True))
    return total.to(x.dtype)


_TENSORS = "Tensor x, Tensor target, Tensor? other, Tensor? share, Tensor? weight"

cross_entropy = Operator(
    f"cross_entropy({_TENSORS}, float smoothing, SymInt ignore_index, int reduction, bool wide,"
    " bool overwrite) -> (Tensor, Tensor)",
    _forward,
    fake=lambda x, target, other, share, weight, smoothing, ignore_index, reduction, wide, _: (
        _empty_results(x, target, reduction, wide)
    ),
    save=_save,
    gradient=_gradient,
    tangent=_tangent,
)
_backward = Operator(
    f"cross_entropy_backward(Tensor grad, {_TENSORS}, Tensor statistics, float smoothing,"
    " SymInt ignore_index, int reduction) -> Tensor",
    _backward_kernel,
    fake=lambda grad, x, *_: torch.empty_like(x),
    save=_save_backward,
    gradient=_second_gradient,
    tangent=_second_tangent,
)
