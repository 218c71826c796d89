"""Layers under DropConnect: dropout of their weight, which backward draws again.

Kept for backward are the input and the weight that is there anyway, never the dropped weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks, dispatch, draws, operator, random
from ..core.draws import Kind
from ..core.operator import strides_of_result
from ..core.random import Source, State

#: The arguments of dropout's operation after the weight: state, p, alpha, rows, index_offset, name.
Draw: TypeAlias = tuple[State, float, bool, int, int, str]


def _mask_gradient(grad: Tensor, weight: Tensor, draw: Draw) -> Tensor:
    *constants, op = draw
    result: Tensor = draws.mask.backward(grad, *constants, strides_of_result(weight), op)
    return result


class _Linear(torch.autograd.Function):
    """Compute x @ dropout(weight).T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Draw) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return F.linear(x, draws.mask.kernel(weight, *call), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = grad @ draws.mask.eager(weight, *ctx.call)
        if needs_weight:
            rows = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            grad_weight = _mask_gradient(rows, weight, ctx.call)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias, None


class Geometry(NamedTuple):
    """The geometry of a convolution whose padding is the same on both sides."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class _Conv2d(torch.autograd.Function):
    """Compute the convolution of x with dropout(weight), plus bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Draw, geometry: Geometry
    ) -> Tensor:
        ctx.call = (call, geometry, None if bias is None else bias.shape)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, draws.mask.kernel(weight, *call), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call, geometry, bias_shape = ctx.call
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            draws.mask.eager(weight, *call),
            bias_shape,
            *geometry[:3],
            False,
            (0, 0),
            geometry.groups,
            ctx.needs_input_grad[:3],
        )
        if grad_weight is not None:
            grad_weight = _mask_gradient(grad_weight, weight, call)
        return grad_x, grad_weight, grad_bias, None, None


# --- the calls ------------------------------------------------------------------------------------


def check(x: Tensor, weight: Tensor, p: float, dims: int, op: str) -> float:
    """Return p as a float; raise unless the weight has this number of dimensions."""
    checks.check_strided(x, op)
    p = checks.check_probability(p, op)
    checks.check_input(weight, op, "weight")
    if weight.dim() != dims:
        raise ValueError(f"fusereg.{op}: weight must have {dims} dimensions, got {weight.dim()}")
    return p


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, p: float, source: Source, op: str
) -> tuple[Tensor, Tensor, Tensor | None, Draw | None]:
    """Return the operands and the draw; None and the dropped weight where calls are traced."""
    given = [t for t in (x, weight, bias) if t is not None]
    if not dispatch.direct(*given) or dispatch.forward_mode():
        return x, draws.dropout(weight, p, True, False, *source, 0, Kind(op)), bias, None
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        # Backward runs outside of autocast: the casts are made, and differentiated, out here.
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor) -> Tensor:
            wide = t.dtype is torch.float64  # which autocast leaves alone
            return t if wide or not t.is_floating_point() else t.to(dtype)

        x, weight, bias = cast(x), cast(weight), None if bias is None else cast(bias)
    return x, weight, bias, (random.eager_state(weight, source, op), p, False, 0, 0, op)


def _applied(function: type[torch.autograd.Function], x: Tensor, *args: Any) -> Tensor:
    """Apply an autograd function to tensors whose dtypes are decided."""
    with torch.autocast(x.device.type, enabled=False):
        return operator.applied(function, x, *args)


linear = partial(_applied, _Linear)
conv2d = partial(_applied, _Conv2d)


def sides(
    padding: str | int | Sequence[int], dilation: Sequence[int], kernel: Sequence[int], op: str
) -> tuple[int, int, int, int]:
    """Return the padding at the top, bottom, left and right; "same" has an odd one at the end."""
    if padding == "same":
        height, width = (d * (n - 1) for d, n in zip(dilation, kernel, strict=True))
        return height // 2, (height + 1) // 2, width // 2, (width + 1) // 2
    height, width = (0, 0) if padding == "valid" else pair(padding, op, "padding")
    return height, height, width, width


def pair(value: object, op: str, name: str) -> tuple[int, int]:
    """Return one number or two as two."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (1, 2):
        raise ValueError(f"fusereg.{op}: {name} must be one number or two, got {value!r}")
    return value[0], value[-1]
