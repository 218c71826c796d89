"""Cross-entropy as an operation: forward keeps a number a row, backward computes the rest again.

Derivatives of higher order, torch.func transforms and forward mode take torch's own loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as cross_entropy_of_torch

from .. import _C
from ..core import dispatch
from ..core.operator import (
    Operator,
    compute_dtype,
    contiguous_copies,
    gradients,
    keep,
    refused,
    unpacked,
)

OP = "cross_entropy"
#: As torch numbers them.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NAMES = ("input", "target", "target.b", "target.weight", "weight")


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
    loss = torch.empty(shape if reduction == 0 else (), dtype=_loss_dtype(x, wide), device=x.device)
    return loss, torch.empty(kept, dtype=torch.float64, device=x.device)


def _loss_dtype(x: Tensor, wide: bool) -> torch.dtype:
    return compute_dtype(x.dtype) if wide else x.dtype


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
        copies: Any = contiguous_copies(given, _NAMES, OP)
        if _C.cross_entropy_forward(*results, *copies, *rest) != 0:
            raise refused(OP)
    return loss, statistics


def _by_parts(x: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, None]:
    """Return the loss by torch's function; of mixed labels, by one call for each part."""
    other, share, weight, smoothing, ignore_index, reduction, wide, _ = rest
    dtype = compute_dtype(x.dtype)
    logits = x.to(dtype)
    options: Any = {"label_smoothing": smoothing}
    if not target.is_floating_point():
        options["ignore_index"] = ignore_index
    if other is None:
        target = target.to(dtype) if target.is_floating_point() else target
        name = next(name for name, number in REDUCTIONS.items() if number == reduction)
        loss = cross_entropy_of_torch(logits, target, weight, reduction=name, **options)
    else:
        loss = logits.new_zeros(())
        share = share.to(dtype).view(-1, *[1] * (x.dim() - 2))
        for index, part in ((target, share), (other, 1 - share)):
            rows = part * cross_entropy_of_torch(logits, index, weight, reduction="none", **options)
            if reduction == REDUCTIONS["mean"]:
                there = index != ignore_index
                counted = there if weight is None else weight[index.where(there, 0)].where(there, 0)
                rows = rows.sum() / counted.sum()
            loss = loss + (rows.sum() if reduction == REDUCTIONS["sum"] else rows)
    return loss.to(_loss_dtype(x, wide)), None


def _save(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
    x, target, other, share, weight, *constants, _, overwrite = args
    _, statistics = output
    ctx.rest = (*constants, overwrite)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    keep(ctx, x, target, other, share, weight, statistics)


def _gradient(ctx: Any, grad: Tensor | None, *saved: Any) -> tuple[Tensor | None, ...]:
    tensors = unpacked(ctx, saved)
    if any(ctx.needs_input_grad[1:5]):
        raise RuntimeError(
            f"fusereg.{OP}: no gradient of target and weight here; detach them, or use "
            "torch.nn.functional.cross_entropy"
        )
    if grad is None:
        return (None,)
    smoothing, ignore_index, reduction, overwrite, *statistics = ctx.rest
    if statistics:  # of the compiled call, as bytes
        tensors = (*tensors, torch.frombuffer(bytearray(*statistics), dtype=torch.float64))
    constants = (smoothing, ignore_index, reduction)
    if overwrite and not torch.is_grad_enabled() and dispatch.direct(grad, *tensors):
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


def _backward_kernel(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Return the gradient of the logits."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    given: tuple[Any, ...] = (grad.contiguous(), x, *rest[:-3])
    constants: tuple[Any, ...] = (*rest[-3:], OP)
    grad_x = torch.empty_like(x)
    if _C.cross_entropy_backward(grad_x, *given, *constants) != 0:
        names = ("grad", *_NAMES, "statistics")
        given = tuple(contiguous_copies(given, names, OP))
        grad_x = torch.empty_like(given[1])
        if _C.cross_entropy_backward(grad_x, *given, *constants) != 0:
            raise refused(OP)
    return grad_x


def _gradient_by_parts(grad: Tensor, x: Tensor, *rest: Any) -> Tensor | None:
    tensors, constants = rest[:4], rest[5:]  # without the statistics

    def formula(x: Tensor) -> Tensor:
        return _by_parts(x, *tensors, *constants, False, False)[0].to(grad.dtype)

    return gradients(formula, [x], [grad])[0]


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
    by_parts=_by_parts,
)
cross_entropy.compile(_C.cross_entropy_functions)
_backward = Operator(
    f"cross_entropy_backward(Tensor grad, {_TENSORS}, Tensor statistics, float smoothing,"
    " SymInt ignore_index, int reduction) -> Tensor",
    _backward_kernel,
    fake=lambda grad, x, *_: torch.empty_like(x),
    by_parts=_gradient_by_parts,
)
