"""Batch normalization whose statistics are found apart from the rest: over several processes.

``moments``
    mean, biased variance and count of each channel, by the kernels or, under a compiler, by the
    operator ``torch.ops.fusereg.batch_norm_moments``. Not differentiable: ``normalize`` with GIVEN
    statistics and ``_Synchronized`` carry the gradient through them.
``combined``
    the moments of all processes' elements together.
``synchronized``
    the entry. Forward is one all-gather of 3 numbers a channel, backward one all-reduce of 2, all
    float64; their sizes do not depend on the batch, so processes may have different numbers of
    samples, or none. Nothing waits for the device on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _batch_norm_kernels as kernels
from . import _batch_norm_ops as ops
from . import _batch_norm_reference as reference
from . import _dispatch, _dropout_ops
from ._batch_norm_kernels import GIVEN, NO_RUNNING, Call, Running

_define: Callable[[str], object] = _dispatch.library.define
_implement: Callable[[str, Callable[..., Any], str], object] = _dispatch.library.impl
_define("batch_norm_moments(Tensor x, Tensor? mask, int group_samples) -> Tensor")


def _moments_call(group_samples: int) -> Call:
    return Call(kernels.COMPUTE, 1.0, group_samples, 0, 0.0, 0.0, 0, 0, 0, "batch_norm")


def _op_moments(x: Tensor, mask: Tensor | None, group_samples: int) -> Tensor:
    return kernels.moments_of(_moments_call(group_samples), x, mask)


for _key in ("CPU", "CUDA"):
    _implement("batch_norm_moments", _op_moments, _key)
torch.library.register_fake(
    "fusereg::batch_norm_moments",
    lambda x, mask, group_samples: x.new_empty(
        (3, kernels.statistics_shape(x, _moments_call(group_samples))), dtype=torch.float64
    ),
    lib=_dispatch.library,
)


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean, biased variance and count of each channel: float64 [3, C]; no gradient."""
    x = x.detach()
    if _dispatch.functorch():
        mean, var = reference.batch_moments(x.double(), mask)
        elements = x.numel() // x.shape[1] if mask is None else mask.sum()
        return torch.stack([mean, var, torch.zeros_like(mean) + elements])
    if _dispatch.eager() and type(x) is Tensor and not x.is_meta:
        return _op_moments(x, mask, 0)
    result: Tensor = torch.ops.fusereg.batch_norm_moments(x, mask, 0)
    return result


def combined(parts: Tensor) -> Tensor:
    """The moments [3, C] of what parts [P, 3, C] are the moments of (Chan et al. 1979), in order.

    A part without elements counts nothing, whatever its mean is.
    """
    mean, var, count = parts.unbind(1)
    mean, var = torch.where(count > 0.0, mean, 0.0), torch.where(count > 0.0, var, 0.0)
    total = count.sum(0)
    whole = total.clamp_min(1.0)
    # About the first part's mean, so that a large common mean does not drown the differences.
    origin = mean[0]
    shift = ((mean - origin) * count).sum(0) / whole
    center = origin + shift
    square = ((var + (mean - center).square()) * count).sum(0)
    return torch.stack([center, square / whole, total])


class _Synchronized(torch.autograd.Function):
    """Traced by torch.compile as it stands: it then calls the operators, else the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        mask: Tensor | None,
        group: Any,
        running: Running,
    ) -> Tensor:
        own = moments(x, mask)
        everyone = combined(_dispatch.all_gather(own, group))
        seed = call.seed if isinstance(call.seed, Tensor) else None
        if _dispatch.eager():
            y, _, bits = kernels.forward(
                call, x, residual, mask, weight, bias, everyone, running, keep_bits=True
            )
            ops.mark_written(running)
        else:
            y, _, bits = torch.ops.fusereg.batch_norm(
                x, residual, mask, weight, bias, everyone, None, None, seed,
                *ops.constants_of(call), True,
            )  # fmt: skip
            ops.update_running(running, everyone, x.shape[1])
        kept = residual if residual is not None and ops.keeps_residual(call) else None
        if not kernels.keeps_bits(call, residual):
            bits = None
        ctx.save_for_backward(x, weight, bias, kept, mask, bits, everyone, seed)
        ctx.call = call
        ctx.group = group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mask, bits, everyone, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        inputs = (grad, x, residual, mask, bits, everyone, weight, bias)
        first = (False, False, need_weight, need_bias)
        second = (need_x, need_residual, False, False)
        gx = gr = None
        if _dispatch.eager():
            call = ctx.call
            eager = (call, *inputs, NO_RUNNING)
            _, _, gw, gb, sums = kernels.backward(*eager, first, keep_sums=True)
            assert sums is not None
            everyones = _dispatch.all_reduce(sums, ctx.group)
            if need_x or need_residual:
                gx, gr, *_ = kernels.backward(*eager, second, reduce=False, sums=everyones)
        else:
            constants = ops.constants_of(ctx.call)
            traced = torch.ops.fusereg.batch_norm_backward
            _, _, gw, gb, sums = traced(*inputs, None, None, seed, None, *constants, first, True)
            everyones = _dispatch.all_reduce(sums, ctx.group)
            if need_x or need_residual:
                gx, gr, *_ = traced(*inputs, None, None, seed, everyones, *constants, second, False)
        return (
            gx if need_x else None,
            gw if need_weight else None,
            gb if need_bias else None,
            gr if need_residual else None,
            None,
            None,
            None,
            None,
        )


def synchronized(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    group: Any,
    running: Running,
) -> Tensor:
    """y with the statistics of all processes of the group; the arguments have been checked."""
    return _dropout_ops.applied(
        _Synchronized,
        x,
        weight,
        bias,
        residual,
        call._replace(statistics=GIVEN),
        mask,
        group,
        running,
    )
