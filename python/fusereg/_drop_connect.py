"""A linear layer under DropConnect: dropout of its weight, which backward draws again.

Kept for backward are the input and the weight that is there anyway, never the dropped weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _dispatch, _dropout_ops, _random
from ._dropout_ops import Call


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return F.linear(x, _dropout_ops.forward(call, weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = grad @ _dropout_ops.dropped(weight, ctx.call)
        if needs_weight:
            rows = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            strides = torch.empty_like(weight, device="meta").stride()
            grad_weight = _dropout_ops.gradient(rows, ctx.call, strides)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    training: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    op: str,
) -> Tensor:
    """x @ dropout(weight).T + bias."""
    _dropout_ops.check_probability(p, op)
    _dropout_ops.check_input(weight, op, "weight")
    if weight.dim() != 2:
        raise ValueError(f"fusereg.{op}: weight must have 2 dimensions, got {weight.dim()}")
    if not training or p == 0:
        return F.linear(x, weight, bias)
    plain = all(
        t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in (x, weight, bias)
    )
    if not (plain and _dispatch.eager()) or _dispatch.forward_mode() or weight.is_meta:
        dropped = _dropout_ops.dropout(
            weight, p, True, False, seed, generator, 0, None, False, 0, op
        )
        return F.linear(x, dropped, bias)
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        # Backward runs outside of autocast: the casts are made, and differentiated, out here.
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    numbers = _random.eager_pair(weight.device, seed, generator, op)
    call = Call(*numbers, float(p), False, 0, 0, op)
    with torch.autocast(device, enabled=False):
        return _dropout_ops.applied(_Linear, x, weight, bias, call)
