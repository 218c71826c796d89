"""Batch normalization in torch's own operations: differentiable any number of times, in any mode.

Serves what the kernels do not: the second derivative, torch.func transforms, forward-mode
derivatives. The same formula (batch_norm.h), in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch, _dropout_ops
from ._batch_norm_kernels import FIXED, Call


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


def keep_factors(x: Tensor, call: Call) -> Tensor:
    """1 / (1 - p) where dropout keeps an element, else 0."""
    ones = torch.ones_like(x, dtype=torch.float32).detach()
    if isinstance(call.seed, Tensor) and _dispatch.functorch():
        return _dropout_ops.dropout(
            ones, call.p, True, False, call.seed, None, call.index_offset, None, False, 0, call.op
        )
    return _dropout_ops.forward(
        _dropout_ops.Call(call.seed, call.offset, call.p, False, 0, call.index_offset, call.op),
        ones,
    )
