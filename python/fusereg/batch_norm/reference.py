"""Batch normalization in torch's own operations: differentiable any number of times, in any mode.

Serves what the kernels do not: the second derivative, torch.func transforms, forward-mode
derivatives. The same formula (batch_norm.h), in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch, draws, operator
from .kernels import FIXED, RECTIFIERS, Call, Running

#: Gives the sum of a tensor over processes; may write to the tensor.
SumOver = Callable[[Tensor], Tensor]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def batch_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; mask: of shape (N, ...), without channels."""
    dims = [0, *range(2, x.dim())]
    if mask is None:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    keep = mask.bool().unsqueeze(1)
    count = keep.sum().clamp_min(1)
    mean = torch.where(keep, x, 0.0).sum(dims) / count
    deviation = torch.where(keep, x - _per_channel(mean, x), 0.0)
    return mean, deviation.square().sum(dims) / count


def normalized(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed: tuple[Tensor | None, Tensor | None] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """y, and mean and variance: ``fixed``, or with call.statistics other than FIXED the batch's."""
    group = call.group_samples
    if group and x.shape[0] > group and call.statistics != FIXED:
        parts = []
        for begin in range(0, x.shape[0], group):
            end = begin + group
            part, _ = _activated_sum(
                call,
                x[begin:end],
                None if residual is None else residual[begin:end],
                None if mask is None else mask[begin:end],
                weight,
                bias,
                None,
            )
            parts.append(part)
        z = torch.cat(parts)
        moments = batch_moments(_wide(x), mask)
    else:
        z, moments = _activated_sum(call, x, residual, mask, weight, bias, fixed)
    y = activated(z, call)
    if call.p:
        y = y * keep_factors(x, call).to(y.dtype)
    if mask is not None:
        y = torch.where(mask.bool().unsqueeze(1), y, 0.0)
    return y.to(x.dtype), moments


def composed(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running,
) -> tuple[Tensor, Tensor]:
    """y and the moments of the whole batch (with constant statistics: these)."""
    fixed = None
    if call.statistics == FIXED:
        fixed = running[:2] if moments is None else (moments[0], moments[1])
    y, (mean, var) = normalized(call, x, residual, mask, weight, bias, fixed)
    spatial = x.numel() / max(x.shape[1], 1)
    count = torch.full_like(mean, spatial) if mask is None else mask.bool().sum().expand_as(mean)
    return y, torch.stack([mean.detach(), var.detach(), count]).double()


def of_torch(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running,
) -> tuple[Tensor, Tensor | None]:
    """The same, with torch's own operator for evaluation, which other programs know by name."""
    if call.statistics != FIXED:
        return composed(call, x, residual, mask, weight, bias, moments, running)
    mean, var = running[:2] if moments is None else (moments[0], moments[1])
    if moments is not None and weight is not None:
        mean, var = moments[0].to(weight.dtype), moments[1].to(weight.dtype)
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, call.eps)
    y = activated(z if residual is None else z + residual, call)
    return (y if mask is None else torch.where(mask.bool().unsqueeze(1), y, 0.0)), moments


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _activated_sum(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed: tuple[Tensor | None, Tensor | None] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    wide = _wide(x)
    if call.statistics == FIXED and fixed is not None:
        assert fixed[0] is not None
        assert fixed[1] is not None
        mean, var = fixed[0].to(wide.dtype), fixed[1].to(wide.dtype)
    else:
        mean, var = batch_moments(wide, mask)
    z = (wide - _per_channel(mean, x)) * _per_channel((var + call.eps).rsqrt(), x)
    if weight is not None:
        z = z * _per_channel(weight.to(wide.dtype), x)
    if bias is not None:
        z = z + _per_channel(bias.to(wide.dtype), x)
    if residual is not None:
        z = z + residual.to(wide.dtype)
    return z, (mean, var)


def activated(z: Tensor, call: Call) -> Tensor:
    """The activation of a call."""
    if call.activation == 1:
        return z.relu()
    if call.activation == 2:
        return torch.nn.functional.leaky_relu(z, call.slope)
    if call.activation == 3:
        return torch.nn.functional.silu(z)
    if call.activation == 4:
        return torch.nn.functional.gelu(z)
    return z


def derivative(z: Tensor, call: Call) -> Tensor:
    """Of the activation of a call."""
    if call.activation in RECTIFIERS:
        below = call.slope if call.activation == 2 else 0.0
        return torch.where(z > 0.0, 1.0, below).to(z.dtype)
    if call.activation == 3:
        s = z.sigmoid()
        return s * (1.0 + z * (1.0 - s))
    if call.activation == 4:
        density = (-0.5 * z.square()).exp() / math.sqrt(2.0 * math.pi)
        return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))) + z * density
    return torch.ones_like(z)


class Summed(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, add: SumOver) -> Tensor:
        ctx.add = add
        return add(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return operator.applied(Summed, grad, ctx.add), None


def gradients(
    call: Call,
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    add: SumOver,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual, as functions of all processes' tensors.

    ``moments``: those of all processes' elements, about whose mean the sums are taken once more so
    that they are functions of x. ``add``: sums float64 [2, C] over the processes. Each of these has
    to go through the same calls.
    """
    dims = [0, *range(2, x.dim())]
    wide = _wide(x)
    count = moments[2].clamp_min(1.0)

    def over_all(*values: Tensor) -> tuple[Tensor, ...]:
        sums = torch.stack([v.sum(dims, dtype=torch.float64) for v in values])
        summed = operator.applied(Summed, sums, add)
        return tuple(_per_channel((s / count).to(wide.dtype), x) for s in summed)

    def counted(values: Tensor) -> Tensor:
        return values if mask is None else torch.where(mask.bool().unsqueeze(1), values, 0.0)

    deviation = counted(wide - _per_channel(moments[0].to(wide.dtype), x))
    low, square = over_all(deviation, deviation.square())
    invstd = (square - low.square() + call.eps).rsqrt()
    normal = counted((deviation - low) * invstd)
    scale = invstd
    z = normal
    if weight is not None:
        scale = invstd * _per_channel(weight.to(wide.dtype), x)
        z = z * _per_channel(weight.to(wide.dtype), x)
    if bias is not None:
        z = z + _per_channel(bias.to(wide.dtype), x)
    if residual is not None:
        z = z + residual.to(wide.dtype)
    dz = counted(grad.to(wide.dtype)) * derivative(counted(z), call)
    if call.p:
        dz = dz * keep_factors(x, call).to(wide.dtype)
    dot = dz * normal
    mean, mean_dot = over_all(dz, dot)
    grad_x = counted(scale * (dz - mean - normal * mean_dot))
    return grad_x.to(x.dtype), dot.sum(dims), dz.sum(dims), dz.to(x.dtype)


def keep_factors(x: Tensor, call: Call) -> Tensor:
    """1 / (1 - p) where dropout keeps an element, else 0."""
    ones = torch.ones_like(x, dtype=torch.float32).detach()
    seed = (call.seed, call.offset) if dispatch.direct(ones) else call.seed
    kept: Tensor = draws.mask(ones, seed, call.p, False, 0, call.index_offset, call.op)
    return kept
