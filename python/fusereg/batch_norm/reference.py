"""Batch normalization in torch's own operations: differentiable any number of times, in any mode.

Used where the kernels cannot be: second derivatives, torch.func transforms, forward mode. It is the
same formula (batch_norm.h), in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import draws, operator
from .kernels import FIXED, RECTIFIERS, Call, Constants, Inputs

#: Returns the sum of a tensor over processes; may write to the tensor.
SumOver = Callable[[Tensor], Tensor]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask.bool().unsqueeze(1), values, 0.0)


def batch_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel; mask: (N, ...), without channels."""
    dims = [0, *range(2, x.dim())]
    if mask is None:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    count = mask.bool().unsqueeze(1).sum().clamp_min(1)
    mean = _masked(x, mask).sum(dims) / count
    deviation = _masked(x - _per_channel(mean, x), mask)
    return mean, deviation.square().sum(dims) / count


def normalized(
    inputs: Inputs, constants: Constants, op: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return y, and mean and variance: the batch's, or the constants with FIXED statistics."""
    x, mask, group = inputs.x, inputs.mask, constants.group_samples
    if group and x.shape[0] > group and constants.statistics != FIXED:
        parts = []
        for begin in range(0, x.shape[0], group):
            cut = slice(begin, begin + group)
            of_samples = {
                name: t[cut]
                for name in ("x", "residual", "mask")
                if (t := getattr(inputs, name)) is not None
            }
            parts.append(_sum(inputs._replace(**of_samples), constants)[0])
        z = torch.cat(parts)
        moments = batch_moments(_wide(x), mask)
    else:
        z, moments = _sum(inputs, constants)
    y = _activated(z, constants)
    if constants.p:
        y = y * _keep_factors(inputs, constants, op).to(y.dtype)
    return _masked(y, mask).to(x.dtype), moments


def composed(call: Call) -> tuple[Tensor, Tensor]:
    """Return y and the moments of the whole batch (with constant statistics: these)."""
    x, mask = call.inputs.x, call.inputs.mask
    y, (mean, var) = normalized(call.inputs, call.constants, call.op)
    spatial = x.numel() / max(x.shape[1], 1)
    count = torch.full_like(mean, spatial) if mask is None else mask.bool().sum().expand_as(mean)
    return y, torch.stack([mean.detach(), var.detach(), count]).double()


def of_torch(call: Call) -> tuple[Tensor, Tensor | None]:
    """Return the same, with torch's own operator for evaluation, which other programs know."""
    inputs, constants = call.inputs, call.constants
    if constants.statistics != FIXED:
        return composed(call)
    x, residual, mask, weight, bias, moments, *_ = inputs
    mean, var = _fixed(inputs)
    if moments is not None and weight is not None:
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, constants.eps)
    y = _activated(z if residual is None else z + residual, constants)
    return _masked(y, mask), moments


def _fixed(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the mean and variance that are constants."""
    if inputs.moments is not None:
        return inputs.moments[0], inputs.moments[1]
    assert inputs.running_mean is not None
    assert inputs.running_var is not None
    return inputs.running_mean, inputs.running_var


def _sum(inputs: Inputs, constants: Constants) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return z, which is activated, and the mean and variance it was normalized by."""
    x = inputs.x
    wide = _wide(x)
    if constants.statistics == FIXED:
        mean, var = (t.to(wide.dtype) for t in _fixed(inputs))
    else:
        mean, var = batch_moments(wide, inputs.mask)
    normal = (wide - _per_channel(mean, x)) * _per_channel((var + constants.eps).rsqrt(), x)
    return _affine(normal, inputs), (mean, var)


def _affine(z: Tensor, inputs: Inputs) -> Tensor:
    """Return z * weight + bias + residual."""
    if inputs.weight is not None:
        z = z * _per_channel(inputs.weight.to(z.dtype), z)
    if inputs.bias is not None:
        z = z + _per_channel(inputs.bias.to(z.dtype), z)
    if inputs.residual is not None:
        z = z + inputs.residual.to(z.dtype)
    return z


def _activated(z: Tensor, constants: Constants) -> Tensor:
    if constants.activation == 1:
        return z.relu()
    if constants.activation == 2:
        return torch.nn.functional.leaky_relu(z, constants.slope)
    if constants.activation == 3:
        return torch.nn.functional.silu(z)
    if constants.activation == 4:
        return torch.nn.functional.gelu(z)
    return z


def _derivative(z: Tensor, constants: Constants) -> Tensor:
    """Return the derivative of the activation."""
    if constants.activation in RECTIFIERS:
        below = constants.slope if constants.activation == 2 else 0.0
        return torch.where(z > 0.0, 1.0, below).to(z.dtype)
    if constants.activation == 3:
        s = z.sigmoid()
        return s * (1.0 + z * (1.0 - s))
    if constants.activation == 4:
        density = (-0.5 * z.square()).exp() / math.sqrt(2.0 * math.pi)
        return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))) + z * density
    return torch.ones_like(z)


class _Summed(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, add: SumOver) -> Tensor:
        ctx.add = add
        return add(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return operator.applied(_Summed, grad, ctx.add), None


def gradients(
    call: Call, grad: Tensor, constants: Constants, add: SumOver
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight and bias, as functions of all processes' tensors.

    The sums are taken once more about the mean of the call's moments, those of all processes'
    elements, so that they are functions of x. ``add``: sums float64 [2, C] over the processes. Each
    of these has to go through the same calls.
    """
    inputs, moments = call.inputs, call.moments
    assert moments is not None
    x, mask = inputs.x, inputs.mask
    dims = [0, *range(2, x.dim())]
    wide = _wide(x)
    count = moments[2].clamp_min(1.0)

    def over_all(*values: Tensor) -> tuple[Tensor, ...]:
        sums = torch.stack([v.sum(dims, dtype=torch.float64) for v in values])
        summed = operator.applied(_Summed, sums, add)
        return tuple(_per_channel((s / count).to(wide.dtype), x) for s in summed)

    deviation = _masked(wide - _per_channel(moments[0].to(wide.dtype), x), mask)
    low, square = over_all(deviation, deviation.square())
    scale = invstd = (square - low.square() + constants.eps).rsqrt()
    normal = _masked((deviation - low) * invstd, mask)
    if inputs.weight is not None:
        scale = invstd * _per_channel(inputs.weight.to(wide.dtype), x)
    z = _masked(_affine(normal, inputs), mask)
    dz = _masked(grad.to(wide.dtype), mask) * _derivative(z, constants)
    if constants.p:
        dz = dz * _keep_factors(inputs, constants, call.op).to(wide.dtype)
    dot = dz * normal
    mean, mean_dot = over_all(dz, dot)
    grad_x = _masked(scale * (dz - mean - normal * mean_dot), mask)
    return grad_x.to(x.dtype), dz.to(x.dtype), dot.sum(dims), dz.sum(dims)


def _keep_factors(inputs: Inputs, constants: Constants, op: str) -> Tensor:
    """Return 1 / (1 - p) where dropout keeps an element, else 0."""
    ones = torch.ones_like(inputs.x, dtype=torch.float32).detach()
    state = (inputs.seed, constants.p, False, 0, constants.index_offset, op)
    kept: Tensor = draws.mask(ones, *state)
    return kept
