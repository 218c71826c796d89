"""Batch normalization with the statistics of several processes.

Forward is one all-gather of 3 numbers a channel, backward one all-reduce of 2, all float64; their
sizes do not depend on the batch, so processes may have different numbers of samples, or none.
Nothing waits for the device on the host, and torch.compile traces it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import distributed, operator, random
from . import op as ops
from . import reference
from .kernels import GIVEN, Call, Constants
from .reference import SumOver


def combined(parts: Tensor) -> Tensor:
    """Return the moments [3, C] of all parts [P, 3, C] together (Chan et al. 1979), in order.

    A part without elements counts nothing, whatever its mean is.
    """
    mean, var, count = parts.unbind(1)
    mean, var = torch.where(count > 0.0, mean, 0.0), torch.where(count > 0.0, var, 0.0)
    total = count.sum(0)
    whole = total.clamp_min(1.0)
    # About the first part's mean, so that a large common mean does not drown the differences.
    origin = mean[0]
    center = origin + ((mean - origin) * count).sum(0) / whole
    square = ((var + (mean - center).square()) * count).sum(0)
    return torch.stack([center, square / whole, total])


class _Synchronized(torch.autograd.Function):
    """Sums over processes between the two steps of backward; torch.compile traces it as it is."""

    @staticmethod
    def forward(ctx: Any, constants: Constants, reduce_sums: SumOver, *inputs: Any) -> Tensor:
        x, residual, mask, weight, bias, moments, _, _, seed = inputs
        y, _, bits = ops.batch_norm.exact(*inputs, *constants, True)
        call = ops.call_of(inputs, constants)
        ctx.bits_kept = call.keeps_bits()
        ctx.has_residual = residual is not None
        kept = residual if call.keeps_residual() else None
        ctx.save_for_backward(x, kept, mask, weight, bias, moments, seed, bits)
        ctx.constants = constants
        ctx.reduce_sums = reduce_sums
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, moments, seed, bits = ctx.saved_tensors
        call = ops.call_of((*inputs, moments, None, None, seed), ctx.constants)
        call.bits = bits if ctx.bits_kept else None
        has = (True, ctx.has_residual, inputs[3] is not None, inputs[4] is not None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _gradients(call, grad, ctx.reduce_sums)
        else:
            compute = ops.backward.exact
            *_, gw, gb, sums = compute(*ops.arguments(call, grad), [False, False, *has[2:]], True)
            sums = ctx.reduce_sums(sums)
            gx, gr, *_ = compute(*ops.arguments(call, grad, sums), [*has[:2], False, False], False)
            found = [gx, gr, gw, gb]
        gx, gr, gw, gb = (t if there else None for t, there in zip(found, has, strict=True))
        return None, None, gx, gr, None, gw, gb, None, None, None, None


def _gradients(call: Call, grad: Tensor, add: SumOver) -> list[Tensor | None]:
    """Return the gradients as functions of all that they depend on, in all processes."""
    constants, inputs = call.constants, call.inputs
    if call.bits is not None:
        # Of the activation after a residual its sign is what is known, and a constant.
        grad = grad * ops.derivative_after_sum(call)
        constants = constants._replace(activation=0, p=0.0)
    residual = inputs.residual
    if residual is None:  # or its values are not needed
        residual = torch.zeros_like(inputs.x)

    def formula(x: Tensor, residual: Tensor, weight: Any, bias: Any) -> Tensor:
        given = inputs._replace(x=x, residual=residual, weight=weight, bias=bias)
        return reference.over_processes(given, constants, call, add)

    return operator.gradients(formula, (inputs.x, residual, inputs.weight, inputs.bias), [grad])


def normalize(call: Call, moments: Tensor, reduce_sums: SumOver) -> Tensor:
    """Return y with these moments of all processes.

    ``reduce_sums`` adds backward's sums (float64 [2, statistics]) over the processes.
    """
    seed: Any = call.inputs.seed
    if type(seed) is tuple:
        seed = random.as_tensor(seed, call.inputs.x.device)
    inputs = call.inputs._replace(moments=moments, running_mean=None, running_var=None, seed=seed)
    constants = call.constants._replace(statistics=GIVEN)
    y = operator.applied(_Synchronized, constants, reduce_sums, *inputs)
    ops.update_running(call, moments)
    return y


def synchronized(call: Call, group: Any) -> Tensor:
    """Return y with the statistics of all processes of the group; the arguments are checked."""
    own = ops.statistics(call.inputs.x, call.inputs.mask)
    moments = combined(distributed.all_gather(own, group))
    return normalize(call, moments, lambda sums: distributed.all_reduce(sums, group))
