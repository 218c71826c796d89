"""Antialiased resizing as a torch operation.

A resized image is a product with a banded matrix on either side (csrc/augment/resize.h), so the
gradient is the same operation with the transposed matrices: ``transposed`` takes images of the new
size back to the old one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import memory, operator
from .op import Target, compute_dtype, run


class Resampling(NamedTuple):
    """Filter and normalization of the operation."""

    interpolation: int
    transposed: bool
    scale: Sequence[float]
    shift: Sequence[float]

    def linear(self, adjoint: bool = False) -> Resampling:
        """Return the operation on differences of x, which adds nothing, or its adjoint."""
        shift = (0.0,) * len(self.scale)
        return self._replace(shift=shift, transposed=self.transposed != adjoint)


@functools.lru_cache(maxsize=64)
def _band(
    size: int,
    new_size: int,
    interpolation: int,
    transposed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return the first column and the weights of each row of an axis's matrix, on the CPU."""
    arguments = (size, new_size, interpolation, transposed, "resize")
    rows = size if transposed else new_size
    with torch.inference_mode(False):
        first = torch.empty(rows, dtype=torch.int32, device="cpu")
        weights = torch.empty(
            rows, _C.augment_resize_taps(*arguments), dtype=torch.float64, device="cpu"
        )
        _C.augment_resize_band(first, weights, *arguments)
        return first, weights.to(dtype)


def _forward(x: Tensor, *flat: Any, out: Tensor | None = None) -> Tensor:
    target = Target(*flat[:3])
    interpolation, transposed, scale, shift = flat[3:]
    dtype = compute_dtype(x.dtype)
    n, c, *sides = x.shape
    bands: list[Tensor] = []
    for side, new_side in zip(sides, target.size, strict=True):
        ends = (new_side, side) if transposed else (side, new_side)
        axis = (*ends, interpolation, transposed, dtype)
        bands += memory.constants(axis, x.device, functools.partial(_band, *axis), "resize")
    scratch = None
    if x.device.type != "cpu" or _C.CUDA_ON_HOST:
        scratch = x.new_empty(n * c * target.size[0] * sides[1], dtype=dtype)
    y = target.empty(x) if out is None else out
    arguments = (*bands, scratch, scale, shift, "resize")
    return run(_C.augment_resize, y, x, arguments, "resize")


def _save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, *flat = args
    ctx.target, ctx.how = Target(*flat[:3]), Resampling(*flat[3:])
    ctx.like = Target.of(x, x.shape[2:], x.dtype)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    grad = grad.to(compute_dtype(ctx.like.dtype))
    return (resize(grad, *ctx.like, *ctx.how.linear(adjoint=True)),)


def _tangent(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    tangent = tangent.to(compute_dtype(ctx.target.dtype))
    result: Tensor = resize(tangent, *ctx.target, *ctx.how.linear())
    return result


resize = operator.Operator(
    "resize(Tensor x, SymInt[] size, ScalarType dtype, bool channels_last, int interpolation,"
    " bool transposed, float[] scale, float[] shift) -> Tensor",
    _forward,
    fake=lambda x, *flat: Target(*flat[:3]).empty(x),
    save=_save,
    gradient=_gradient,
    tangent=_tangent,
    linear=True,
)
