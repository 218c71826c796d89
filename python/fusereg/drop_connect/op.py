"""Layers under DropConnect: dropout of their weight, which backward draws again.

Kept for backward are the input and the weight that is there anyway, never the dropped weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks, dispatch, draws, random
from ..core.draws import Kind
from ..core.operator import strides_of_result
from ..core.random import Source, State

#: The arguments of dropout's operation after the weight: state, p, alpha, rows, index_offset, name.
_Draw: TypeAlias = tuple[State, float, bool, int, int, str]


def _mask_gradient(grad: Tensor, weight: Tensor, draw: _Draw) -> Tensor:
    *constants, op = draw
    result: Tensor = draws.mask.backward(grad, *constants, strides_of_result(weight), op)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Draw) -> Tensor:
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


class _Geometry(NamedTuple):
    """The geometry of a convolution whose padding is the same on both sides."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Draw, geometry: _Geometry
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


# --- the entries ----------------------------------------------------------------------------------

#: The tensors that the function takes, made ready, and this call's constants; or nothing for them.
_Ready: TypeAlias = tuple[Tensor, Tensor, Tensor | None, _Draw | None]


def _prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    source: Source,
    op: str,
) -> _Ready:
    """Return the operands and the draw; None and the dropped weight where calls are traced."""
    given = [t for t in (x, weight, bias) if t is not None]
    if not dispatch.direct(*given) or dispatch.forward_mode():
        dropped = draws.dropout(weight, p, True, False, *source, 0, Kind(op))
        return x, dropped, bias, None
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        # Backward runs outside of autocast: the casts are made, and differentiated, out here.
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    state = random.eager_state(weight, source, op)
    return x, weight, bias, (state, float(p), False, 0, 0, op)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    training: bool,
    source: Source,
    op: str,
) -> Tensor:
    """Compute x @ dropout(weight).T + bias."""
    checks.check_strided(x, op)
    _check(weight, p, 2, op)
    if not training or p == 0:
        return F.linear(x, weight, bias)
    x, weight, bias, call = _prepared(x, weight, bias, p, source, op)
    if call is None:
        return F.linear(x, weight, bias)
    with torch.autocast(weight.device.type, enabled=False):
        result: Tensor = _Linear.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
        return result


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    p: float,
    training: bool,
    source: Source,
    op: str,
) -> Tensor:
    """Compute the convolution of x with dropout(weight), plus bias."""
    checks.check_strided(x, op)
    _check(weight, p, 4, op)
    if not training or p == 0:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    x, weight, bias, call = _prepared(x, weight, bias, p, source, op)
    if call is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    stride, dilation = _pair(stride, op, "stride"), _pair(dilation, op, "dilation")
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"fusereg.{op}: padding='same' needs stride 1, got {stride}")
    top, bottom, left, right = sides(padding, dilation, weight.shape[2:], op)
    if (top, left) != (bottom, right):
        x = F.pad(x, (0, right - left, 0, bottom - top))
    geometry = _Geometry(stride, (top, left), dilation, groups)
    single = isinstance(x, Tensor) and x.dim() == 3
    with torch.autocast(weight.device.type, enabled=False):
        batch = x.unsqueeze(0) if single else x
        y: Tensor = _Conv2d.apply(batch, weight, bias, call, geometry)  # type: ignore[no-untyped-call]
    return y.squeeze(0) if single else y


def _check(weight: Tensor, p: float, dims: int, op: str) -> None:
    checks.check_probability(p, op)
    checks.check_input(weight, op, "weight")
    if weight.dim() != dims:
        raise ValueError(f"fusereg.{op}: weight must have {dims} dimensions, got {weight.dim()}")


def sides(
    padding: str | int | Sequence[int], dilation: Sequence[int], kernel: Sequence[int], op: str
) -> tuple[int, int, int, int]:
    """Return the padding at the top, bottom, left and right; "same" has an odd one at the end."""
    if padding == "same":
        height, width = (d * (n - 1) for d, n in zip(dilation, kernel, strict=True))
        return height // 2, (height + 1) // 2, width // 2, (width + 1) // 2
    height, width = (0, 0) if padding == "valid" else _pair(padding, op, "padding")
    return height, height, width, width


def _pair(value: object, op: str, name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (1, 2):
        raise ValueError(f"fusereg.{op}: {name} must be one number or two, got {value!r}")
    return value[0], value[-1]
