"""Layers under DropConnect: dropout of their weight, which backward draws again.

Kept for backward are the input and the weight that is there anyway, never the dropped weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks, dispatch, draws, operator, random
from ..core.draws import Call


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return F.linear(x, draws.forward(call, weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = grad @ draws.dropped(weight, ctx.call)
        if needs_weight:
            rows = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            strides = torch.empty_like(weight, device="meta").stride()
            grad_weight = operator.gradient(rows, ctx.call, strides)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias, None


class _Geometry(NamedTuple):
    """How a convolution walks over its input, zeros on both sides of it alike."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, geometry: _Geometry
    ) -> Tensor:
        ctx.call = (call, geometry, None if bias is None else bias.shape)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, draws.forward(call, weight), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call, geometry, bias_shape = ctx.call
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            draws.dropped(weight, call),
            bias_shape,
            *geometry[:3],
            False,
            (0, 0),
            geometry.groups,
            ctx.needs_input_grad[:3],
        )
        if grad_weight is not None:
            strides = torch.empty_like(weight, device="meta").stride()
            grad_weight = operator.gradient(grad_weight, call, strides)
        return grad_x, grad_weight, grad_bias, None, None


# --- the entries ----------------------------------------------------------------------------------

#: The tensors that the function takes, made ready, and this call's constants; or nothing for them.
_Ready: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Call | None]


def _prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    op: str,
) -> _Ready:
    """Without a call where nobody may write the weight out here: it comes back dropped."""
    plain = all(
        t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in (x, weight, bias)
    )
    if not (plain and dispatch.eager()) or dispatch.forward_mode() or weight.is_meta:
        dropped = draws.dropout(weight, p, True, False, seed, generator, 0, None, False, 0, op)
        return x, dropped, bias, None
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        # Backward runs outside of autocast: the casts are made, and differentiated, out here.
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    numbers = random.eager_pair(weight.device, seed, generator, op)
    return x, weight, bias, Call(*numbers, float(p), False, 0, 0, op)


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
    _check(weight, p, 2, op)
    if not training or p == 0:
        return F.linear(x, weight, bias)
    x, weight, bias, call = _prepared(x, weight, bias, p, seed, generator, op)
    if call is None:
        return F.linear(x, weight, bias)
    with torch.autocast(weight.device.type, enabled=False):
        return operator.applied(_Linear, x, weight, bias, call)


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
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    op: str,
) -> Tensor:
    """The convolution of x with dropout(weight), plus bias."""
    _check(weight, p, 4, op)
    if not training or p == 0:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    x, weight, bias, call = _prepared(x, weight, bias, p, seed, generator, op)
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
        y = operator.applied(_Conv2d, batch, weight, bias, call, geometry)
    return y.squeeze(0) if single else y


def _check(weight: Tensor, p: float, dims: int, op: str) -> None:
    checks.check_probability(p, op)
    checks.check_input(weight, op, "weight")
    if weight.dim() != dims:
        raise ValueError(f"fusereg.{op}: weight must have {dims} dimensions, got {weight.dim()}")


def sides(
    padding: str | int | Sequence[int], dilation: Sequence[int], kernel: Sequence[int], op: str
) -> tuple[int, int, int, int]:
    """What is put around an image: top, bottom, left, right. "same" puts more at the end if odd."""
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
