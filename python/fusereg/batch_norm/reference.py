"""Batch normalization in torch's own operations: differentiable any number of times, in any mode.

Used where the kernels cannot be: second derivatives, torch.func transforms, forward mode. It is the
same formula (batch_norm.h), in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import draws, operator
from .kernels import FIXED, Call, Constants, Inputs

#: Returns the sum of a tensor over processes; may write to the tensor.
SumOver = Callable[[Tensor], Tensor]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return a value for each channel in a shape that broadcasts with x."""
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
    deviation = _masked(x - per_channel(mean, x), mask)
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
    return _finished(z, inputs, constants, op), moments


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
    normal = (wide - per_channel(mean, x)) * per_channel((var + constants.eps).rsqrt(), x)
    return _affine(normal, inputs), (mean, var)


def _affine(z: Tensor, inputs: Inputs) -> Tensor:
    """Return z * weight + bias + residual."""
    if inputs.weight is not None:
        z = z * per_channel(inputs.weight.to(z.dtype), z)
    if inputs.bias is not None:
        z = z + per_channel(inputs.bias.to(z.dtype), z)
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


# --- for code that a compiler generates -----------------------------------------------------------
#
# Neither mask nor dropout nor groups. Both functions begin with the same operations, of which the
# compiler keeps one: it decides what is kept for backward, and what is computed again.


def generated(call: Call) -> tuple[Tensor, Tensor | None]:
    """Return y and, unless statistics are FIXED, moments with three rows more.

    These are 1 / sqrt(variance + eps), and the scale and shift of x. All have the dtype that the
    arithmetic has: backward reads them once for each element.
    """
    x, moments = call.inputs.x, None
    if call.constants.statistics != FIXED:
        mean, var = batch_moments(_wide(x), None)
        count = torch.full_like(mean, x.numel() / x.shape[1])
        invstd = (var + call.constants.eps).rsqrt()
        moments = torch.stack([mean, var, count, invstd, *_line(mean, invstd, call.inputs)])
    *_, z = _parts(call, moments)
    return _activated(z, call.constants).to(x.dtype), moments


def generated_gradients(call: Call, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual, weight and bias, and the sums (batch_norm.h).

    A residual before a rectifier means that ``grad`` is that of the sum already (op.py).
    """
    inputs, constants = call.inputs, call.constants
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    deviation, invstd, scale, z = _parts(call, inputs.moments)
    of_z = _wide(grad)
    if inputs.residual is None or call.keeps_residual():
        of_z = _before_activation(of_z, z, constants)
    dims = [0, *range(2, x.dim())]
    total, dot = of_z.sum(dims), (of_z * deviation).sum(dims)
    centered = of_z
    if constants.statistics != FIXED:
        share = x.shape[1] / x.numel()
        slope = per_channel(dot * share * (invstd * invstd), x)
        centered = of_z - deviation * slope - per_channel(total * share, x)
    return (
        (centered * per_channel(scale, x)).to(x.dtype),
        of_z.to(x.dtype),
        None if weight is None else (dot * invstd).to(weight.dtype),
        None if bias is None else total.to(bias.dtype),
        torch.stack([total, dot]).double(),
    )


def _parts(call: Call, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x - mean, 1 / sqrt(variance + eps), the scale of x, and z.

    As scale * x + shift, z is read from three tensors. Inductor writes a value that is used more
    than once to memory if it is read from more than four, and its gradient is read from one more.
    """
    x, residual = call.inputs.x, call.inputs.residual
    wide = _wide(x)
    if call.constants.statistics == FIXED:
        mean, var = (t.to(wide.dtype) for t in _fixed(call.inputs))
        invstd = (var + call.constants.eps).rsqrt()
        scale, shift = _line(mean, invstd, call.inputs)
    else:
        assert moments is not None
        mean, _, _, invstd, scale, shift = moments.unbind()
    z = wide * per_channel(scale, x) + per_channel(shift, x)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return wide - per_channel(mean, x), invstd, scale, z


def _line(mean: Tensor, invstd: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift of x, as in torch's kernel for CPUs."""
    scale = invstd if inputs.weight is None else invstd * inputs.weight.to(invstd.dtype)
    shift = -mean * scale
    return scale, shift if inputs.bias is None else shift + inputs.bias.to(shift.dtype)


def _before_activation(grad: Tensor, z: Tensor, constants: Constants) -> Tensor:
    """Return the gradient of z from that of the activation's result.

    A rectifier's by z, which is computed from x; the result would be read in addition, twice.
    """
    if constants.activation == 1:
        return torch.where(z <= 0, 0.0, grad)
    if constants.activation == 2:
        return torch.where(z > 0, grad, grad * constants.slope)
    backward: Any = {3: torch.ops.aten.silu_backward, 4: torch.ops.aten.gelu_backward}
    if constants.activation in backward:
        grad = backward[constants.activation](grad, z)
    return grad


# --- over several processes -----------------------------------------------------------------------


class _Summed(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, add: SumOver) -> Tensor:
        ctx.add = add
        return add(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return operator.applied(_Summed, grad, ctx.add), None


def over_processes(inputs: Inputs, constants: Constants, call: Call, add: SumOver) -> Tensor:
    """Return y as a function of the tensors of all processes.

    The sums are taken once more about the mean of the call's moments, those of all processes'
    elements, so that they are functions of x. ``add``: sums float64 [2, C] over the processes. Each
    of these has to go through the same calls.
    """
    assert call.moments is not None
    center, _, count = call.moments
    x, mask = inputs.x, inputs.mask
    wide = _wide(x)
    deviation = _masked(wide - per_channel(center.to(wide.dtype), x), mask)
    dims = [0, *range(2, x.dim())]
    sums = [v.sum(dims, dtype=torch.float64) for v in (deviation, deviation.square())]
    means = operator.applied(_Summed, torch.stack(sums), add) / count.clamp_min(1.0)
    low, square = (per_channel(m.to(wide.dtype), x) for m in means)
    normal = (deviation - low) * (square - low.square() + constants.eps).rsqrt()
    return _finished(_masked(_affine(normal, inputs), mask), inputs, constants, call.op)


def _finished(z: Tensor, inputs: Inputs, constants: Constants, op: str) -> Tensor:
    """Return y of the sum that is activated."""
    y = _activated(z, constants)
    if constants.p:
        state = (inputs.seed, constants.p, constants.index_offset)
        y = y * draws.keep_factors(inputs.x, *state, op).to(y.dtype)
    return _masked(y, inputs.mask).to(inputs.x.dtype)
