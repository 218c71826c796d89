"""Antialiased resizing as torch operations: calls of the kernels, autograd, torch.library.

A resized image is a product with a banded matrix on either side (csrc/augment/resize.h), so the
gradient is the same operation with the transposed matrices: ``transposed`` takes images of the new
size back to the old one. The layers are those of ``core.draws``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, operator
from ..core.operator import applied
from . import op as _augment_ops
from .op import Target, compute_dtype, is_channels_last


class Resampling(NamedTuple):
    """All but the images."""

    interpolation: int
    transposed: bool
    scale: Sequence[float]
    shift: Sequence[float]

    def linear(self) -> Resampling:
        """Without what is added: the map on differences of x."""
        return self._replace(shift=[0.0] * len(self.scale))

    def adjoint(self) -> Resampling:
        return self.linear()._replace(transposed=not self.transposed)


# --- the kernels, on whatever tensors there are ---------------------------------------------------


@functools.lru_cache(maxsize=64)
def _band(
    size: int,
    new_size: int,
    interpolation: int,
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The first column and the weights of each row of an axis's matrix."""
    arguments = (size, new_size, interpolation, transposed, "resize")
    rows = size if transposed else new_size
    with torch.inference_mode(False):
        first = torch.empty(rows, dtype=torch.int32)
        weights = torch.empty(rows, _C.augment_resize_taps(*arguments), dtype=torch.float64)
        _C.augment_resize_band(first, weights, *arguments)
        # Converted here: a copy from the host is waited for, so that every stream may read it.
        return first.to(device), weights.to(dtype).to(device)


def forward(
    x: Tensor, target: Target, how: Resampling, op: str, out: Tensor | None = None
) -> Tensor:
    y = target.empty(x) if out is None else out
    dtype = compute_dtype(x)

    def band(side: int, new_side: int) -> tuple[Tensor, Tensor]:
        sides = (new_side, side) if how.transposed else (side, new_side)
        return _band(*sides, how.interpolation, how.transposed, dtype, x.device)

    rows, columns = band(x.shape[2], target.size[0]), band(x.shape[3], target.size[1])
    scratch = None
    if x.device.type != "cpu" or _C.CUDA_ON_HOST:
        scratch = x.new_empty(x.shape[0] * x.shape[1] * target.size[0] * x.shape[3], dtype=dtype)
    arguments = (*rows, *columns, scratch, how.scale, how.shift, op)
    return _augment_ops.written_by(_C.augment_resize, y, x, arguments, op)


def _like(x: Tensor) -> Target:
    return Target((int(x.shape[2]), int(x.shape[3])), x.dtype, is_channels_last(x))


def _again(x: Tensor, target: Target, how: Resampling) -> Tensor:
    """Of a gradient, in the dtype of the arithmetic; differentiable where that is asked for."""
    x = x.to(torch.float64 if target.dtype is torch.float64 else torch.float32)
    if operator.differentiated(x):
        return applied(_Resize, x, target, how)
    return forward(x, target, how, "resize")


# --- eager autograd -------------------------------------------------------------------------------


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Target, how: Resampling) -> Tensor:
        ctx.like, ctx.target, ctx.how = _like(x), target, how
        return forward(x, target, how, "resize")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _again(grad, ctx.like, ctx.how.adjoint()), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _again(tangent, ctx.target, ctx.how.linear())


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Tensor], str], object] = dispatch.library.impl
_define(
    "resize(Tensor x, SymInt[] size, ScalarType dtype, bool channels_last, int interpolation,"
    " bool transposed, float[] scale, float[] shift) -> Tensor"
)


def _as_target(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Target:
    return Target((size[0], size[1]), dtype, channels_last)


def _op(
    x: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool, *how: Any
) -> Tensor:
    return forward(x, _as_target(size, dtype, channels_last), Resampling(*how), "resize")


for _key in ("CPU", "CUDA"):
    _implement("resize", _op, _key)

torch.library.register_fake(
    "fusereg::resize",
    lambda x, size, dtype, channels_last, *_: _as_target(size, dtype, channels_last).empty(x),
    lib=dispatch.library,
)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, _, *how = inputs
    ctx.how = Resampling(*how)
    ctx.like = Target((x.shape[2], x.shape[3]), x.dtype, is_channels_last(x))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    compute = torch.float64 if ctx.like.dtype is torch.float64 else torch.float32
    result = torch.ops.fusereg.resize(grad.to(compute), *ctx.like, *ctx.how.adjoint())
    return result, *[None] * 7


torch.library.register_autograd(
    "fusereg::resize", _gradient, setup_context=_save_for_gradient, lib=dispatch.library
)


# --- torch.func -----------------------------------------------------------------------------------


class _ResizeTransform(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, target: Target, how: Resampling) -> Tensor:
        result: Tensor = torch.ops.fusereg.resize(x, *target, *how)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.target, ctx.how = inputs
        ctx.like = Target((x.shape[2], x.shape[3]), x.dtype, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad = grad.to(torch.float64 if ctx.like.dtype is torch.float64 else torch.float32)
        return applied(_ResizeTransform, grad, ctx.like, ctx.how.adjoint()), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return applied(_ResizeTransform, tangent, ctx.target, ctx.how.linear())

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, target: Target, how: Resampling
    ) -> tuple[Tensor, int]:
        # The batches that are mapped over are batches of images.
        x = x.movedim(in_dims[0], 0)
        y = applied(_ResizeTransform, x.flatten(0, 1), target, how)
        return y.unflatten(0, (info.batch_size, x.shape[1])), 0


# --- the entry ------------------------------------------------------------------------------------


def apply(
    x: Tensor, target: Target, how: Resampling, op: str, out: Tensor | None = None
) -> Tensor:
    """Return the images resized, normalized and converted."""
    if out is not None:
        checks.check_target(x, out, op, (*x.shape[:2], *target.size), target.dtype)
    if (
        not dispatch.eager()
        or x.device.type == "meta"
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
    ):
        if dispatch.functorch():
            y = applied(_ResizeTransform, x, target, how)
        else:
            y = torch.ops.fusereg.resize(x, *target, *how)
        return y if out is None else out.copy_(y)
    if out is not None:
        return operator.written(forward(x, target, how, op, out))
    if target.dtype is not torch.uint8 and operator.differentiated(x):
        return applied(_Resize, x, target, how)
    return forward(x, target, how, op)
