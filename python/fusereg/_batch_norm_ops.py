"""Batch normalization as torch operations: autograd, torch.library, torch.func.

``_BatchNorm``
    the eager autograd function: x, the moments and the parameters are kept, and the residual or one
    bit an element where x alone does not tell the activation's derivative.
``torch.ops.fusereg.batch_norm``, ``torch.ops.fusereg.batch_norm_backward``
    the same as pure functions, for torch.compile, export, fake tensors; running statistics are then
    updated by torch's own operations.
``_Synchronized``
    with a ``reduce_sums`` between the two steps of backward, for several processes.
``batch_norm``
    the entry: picks between them. torch.func transforms, forward-mode derivatives and second
    derivatives are composed of torch's operations (_batch_norm_reference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _batch_norm_kernels as kernels
from . import _batch_norm_reference as reference
from . import _dispatch
from ._batch_norm_kernels import FIXED, RECTIFIERS, Call, Gradients, Running

ReduceSums = Callable[[Tensor], Tensor]

_increment_version: Callable[[Any], None] = torch.autograd.graph.increment_version


def _mark_written(running: Running) -> None:
    written = [t for t in running[:3] if isinstance(t, Tensor) and not t.is_inference()]
    if written:
        _increment_version(written)


def _keeps_residual(call: Call) -> bool:
    """Whether backward has to add the residual again: neither x nor its sign bit tell z."""
    return call.activation not in (0, *RECTIFIERS)


# --- eager autograd -------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        mask: Tensor | None,
        moments: Tensor | None,
        running: Running,
    ) -> Tensor:
        y, moments, bits = kernels.forward(
            call, x, residual, mask, weight, bias, moments, running, keep_bits=True
        )
        fixed = call.statistics == FIXED
        if not fixed:
            _mark_written(running)
        kept = residual if residual is not None and _keeps_residual(call) else None
        if fixed and moments is None:
            ctx.save_for_backward(x, weight, bias, kept, mask, bits, None, running[0], running[1])
        else:
            ctx.save_for_backward(x, weight, bias, kept, mask, bits, moments)
        ctx.call = call
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        x, weight, bias, residual, mask, bits, moments, *fixed = ctx.saved_tensors
        running = Running(*fixed) if fixed else kernels.NO_RUNNING
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad, x, weight, bias, mask, moments, running)
        g = kernels.backward(
            call,
            grad,
            x,
            residual,
            mask,
            bits,
            moments,
            weight,
            bias,
            running,
            (need[0], need[3], need[1], need[2]),
        )
        return g.x, g.weight, g.bias, g.residual, None, None, None, None


def _differentiable_backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    moments: Tensor | None,
    running: Running,
) -> tuple[Tensor | None, ...]:
    raise NotImplementedError
