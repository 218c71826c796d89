"""The pass over a batch as a torch operation: warp, color, normalization, erasing, mixing.

The arguments are those of the kernels (csrc/augment/augment.h): a record of 30 numbers for each
sample, and numbers for each channel. The gradient is the transpose of the warp, computed from the
records; with ``color`` it also needs x, because of the clamp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, operator
from .arguments import (
    FILL_MODES,
    INTERPOLATIONS,
    for_channels,
    interpolation_name,
    one_of,
    per_channel,
)

#: A number for each channel.
Channels: TypeAlias = Sequence[float]
DTYPES = (torch.uint8, *checks.SUPPORTED_DTYPES)


class Options(NamedTuple):
    """The settings that all samples share, in the order of the kernels' arguments."""

    interpolation: int
    antialias: bool
    fill_mode: int
    color: bool
    fill: Channels
    scale: Channels
    shift: Channels
    erase: Channels

    @staticmethod
    def of(
        channels: int,
        op: str,
        sampling: tuple[object, bool, object, object],
        affine: tuple[Channels, Channels] | None = None,
        erase: Channels | None = None,
    ) -> Options:
        """Check interpolation, antialias, fill mode and fill, and return all options.

        ``affine`` is scale and shift; without them, values stay as they are.
        """
        interpolation, antialias, fill_mode, fill = sampling
        zeros = (0.0,) * channels
        scale, shift = affine or ((1.0,) * channels, zeros)
        return Options(
            INTERPOLATIONS[interpolation_name(interpolation, op)],
            antialias,
            FILL_MODES[one_of(fill_mode, op, "fill_mode", list(FILL_MODES))],
            False,
            for_channels(per_channel(fill, op, "fill"), channels, op, "fill"),
            scale,
            shift,
            erase or zeros,
        )

    def linear(self, op: str) -> Options:
        """Return the settings of the pass's derivative, which adds nothing."""
        if self.color:
            raise NotImplementedError(
                f"fusereg.{op}: with brightness, contrast or saturation there are first "
                "derivatives in reverse mode alone; leave these out where second derivatives or "
                "forward mode are needed"
            )
        zeros = (0.0,) * len(self.scale)
        return self._replace(fill=zeros, shift=zeros, erase=zeros)


class Target(NamedTuple):
    """Size, dtype and layout of a result."""

    size: Sequence[int]
    dtype: torch.dtype
    channels_last: bool

    @staticmethod
    def of(
        x: Tensor,
        size: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format | None = None,
    ) -> Target:
        """Return the target for images x; ``memory_format`` None stands for theirs."""
        if memory_format is None:
            return Target(tuple(size), dtype, is_channels_last(x))
        return Target(tuple(size), dtype, memory_format is torch.channels_last)

    def empty(self, x: Tensor) -> Tensor:
        """Return an empty result for images x."""
        (n, c), (h, w) = x.shape[:2], self.size
        if self.channels_last:
            return x.new_empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), dtype=self.dtype)
        return x.new_empty((n, c, h, w), dtype=self.dtype)


class Pass(NamedTuple):
    """The arguments of the kernel beside images; ``records`` and ``keys`` are on their device."""

    records: Tensor
    keys: Tensor | None
    target: Target
    options: Options

    @property
    def arguments(self) -> tuple[object, ...]:
        """The arguments of the compiled functions, in their order."""
        return self.records, self.keys, *self.options, self.keys is not None


def is_channels_last(x: Tensor) -> bool:
    """Return whether images are channels_last, and not contiguous as well."""
    if x.is_contiguous():
        return False
    if dispatch.functorch():
        # vmap cannot be asked for any other memory format.
        _, c, h, w = x.shape
        return x.stride() == (c * h * w, 1, w * c, c)
    return x.is_contiguous(memory_format=torch.channels_last)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for images of this dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def run(
    kernel: Callable[..., int], y: Tensor, x: Tensor, arguments: Sequence[Any], op: str
) -> Tensor:
    """Write the kernel's result into y, through copies where a layout is not supported."""
    if kernel(y, x, *arguments) == 0:
        return y
    result = y if y.is_contiguous() or is_channels_last(y) else torch.empty_like(y).contiguous()
    if type(result) is not Tensor:
        result = result.as_subclass(Tensor)
    if kernel(result, _supported(x), *arguments) != 0:
        raise operator.refused(op)
    return y if result is y or result.data_ptr() == y.data_ptr() else y.copy_(result)


def _supported(x: Tensor) -> Tensor:
    """Return images as a Tensor in a layout that the kernels support."""
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    x = x.detach().resolve_neg()
    return x if is_channels_last(x) else x.contiguous()


# --- the operators --------------------------------------------------------------------------------

_CONSTANTS = (
    "SymInt[] size, ScalarType dtype, bool channels_last, int interpolation, bool antialias,"
    " int fill_mode, bool color, float[] fill, float[] scale, float[] shift, float[] erase"
)


def _constants(flat: Sequence[Any]) -> tuple[Target, Options, str]:
    """Return the constants of a call, and the name that errors show."""
    return Target(*flat[:3]), Options(*flat[3:11]), flat[11] if len(flat) > 11 else "augment"


def _forward(
    x: Tensor, records: Tensor, keys: Tensor | None, *flat: Any, out: Tensor | None = None
) -> Tensor:
    y = Target(*flat[:3]).empty(x) if out is None else out
    op = flat[11] if len(flat) > 11 else "augment"
    return run(_C.augment_forward, y, x, (records, keys, *flat[3:11], keys is not None, op), op)


def _save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, records, _, *flat = args
    ctx.target, ctx.options, ctx.op = _constants(flat)
    ctx.like = Target.of(x, x.shape[2:], x.dtype)
    operator.keep(ctx, x if ctx.options.color else None, records)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    x, records = ctx.saved_tensors
    return (augment_backward(grad, x, records, *ctx.like, *ctx.options, ctx.op),)


def _tangent(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    _, records = ctx.saved_tensors
    result: Tensor = augment(
        tangent, records, None, *ctx.target, *ctx.options.linear(ctx.op), ctx.op
    )
    return result


def _backward(grad: Tensor, x: Tensor | None, records: Tensor, *flat: Any) -> Tensor:
    """Return the gradient of x, which has the target's size, dtype and layout."""
    target, options, op = _constants(flat)
    dtype = compute_dtype(target.dtype)
    grad = _supported(grad.to(dtype))
    grad_x = target._replace(dtype=dtype).empty(grad)
    x = None if x is None else _supported(x)
    if _C.augment_backward(grad_x, grad, x, records, *options, op) != 0:
        raise operator.refused(op)
    return grad_x.to(target.dtype)


def _save_backward(ctx: Any, args: tuple[Any, ...], grad_x: Tensor) -> None:
    grad, x, records, *flat = args
    ctx.target, ctx.options, ctx.op = _constants(flat)
    ctx.like = Target.of(grad, grad.shape[2:], grad.dtype)
    operator.keep(ctx, x, records)


def _second_gradient(ctx: Any, second: Tensor) -> tuple[Tensor]:
    """Return the gradient of the gradient: the pass itself, on differences of x."""
    _, records = ctx.saved_tensors
    return (augment(second, records, None, *ctx.like, *ctx.options.linear(ctx.op), ctx.op),)


def _tangent_of_gradient(ctx: Any, tangent: Tensor, x_tangent: Tensor | None, *_: None) -> Tensor:
    x, records = ctx.saved_tensors
    if x_tangent is not None:
        ctx.options.linear(ctx.op)
    result: Tensor = augment_backward(tangent, x, records, *ctx.target, *ctx.options, ctx.op)
    return result


augment = operator.Operator(
    f"augment(Tensor x, Tensor records, Tensor? keys, {_CONSTANTS}) -> Tensor",
    _forward,
    fake=lambda x, records, keys, *flat: Target(*flat[:3]).empty(x),
    save=_save,
    gradient=_gradient,
    tangent=_tangent,
    linear=True,
)
augment_backward = operator.Operator(
    f"augment_backward(Tensor grad, Tensor? x, Tensor records, {_CONSTANTS}) -> Tensor",
    _backward,
    fake=lambda grad, x, records, *flat: Target(*flat[:3]).empty(grad),
    save=_save_backward,
    gradient=_second_gradient,
    tangent=_tangent_of_gradient,
    linear=True,
)


# --- the entry ------------------------------------------------------------------------------------


def check_images(x: object, op: str, name: str = "x") -> Tensor:
    """Check images [N, C, H, W] of a dtype that the kernels read."""
    where = f"fusereg.{op}: {name}"
    if not isinstance(x, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        raise ValueError(f"{where} must be a dense, strided tensor")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{where} has dtype {x.dtype}; wanted uint8, float64, float32, float16 or bfloat16"
        )
    if x.dim() != 4:
        remedy = f"; {name}[None] is a batch of one image (C, H, W)" if x.dim() == 3 else ""
        raise ValueError(f"{where} must have 4 dimensions (N, C, H, W), got {x.dim()}{remedy}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{where} must have channels and pixels, got shape {tuple(x.shape)}")
    if x.shape[1] > _C.AUGMENT_MAX_CHANNELS:
        raise ValueError(
            f"{where} must have at most {_C.AUGMENT_MAX_CHANNELS} channels, got {x.shape[1]}"
        )
    if x.dtype is not torch.uint8 and x.device.type != "meta":
        checks.check(x, op, name)
    return x


def check_dtype(dtype: object, op: str) -> None:
    """Check that the kernels write results of this dtype."""
    if dtype not in DTYPES:
        raise ValueError(
            f"fusereg.{op}: out_dtype must be uint8, float16, bfloat16, float32 or float64, "
            f"got {dtype}"
        )


def apply(
    x: Tensor,
    records: Tensor,
    keys: Tensor | None,
    target: Target,
    options: Options,
    op: str,
    out: Tensor | None = None,
) -> Tensor:
    """Return the result of the pass; with ``keys``, erased boxes are filled with noise."""
    return call(augment, x, (records, keys, *target, *options, op), target, op, out)


def one_call(images: Sequence[Tensor]) -> bool:
    """Return whether images [C, H, W] of several sizes can be done by one call of the kernel."""
    first = images[0]
    return all(
        type(x) is Tensor
        and x.dim() == 3
        and x.is_cpu
        and x.numel() > 0
        and (x.dtype, x.shape[0]) == (first.dtype, first.shape[0])
        and not (x.requires_grad and torch.is_grad_enabled())
        for x in images
    ) and dispatch.direct(first)


def apply_several(
    like: Tensor,
    images: Sequence[Tensor],
    records: Tensor,
    keys: Tensor | None,
    target: Target,
    options: Options,
    op: str,
) -> Tensor:
    """Return the result of the pass for images [1, C, H, W] of several sizes.

    ``like`` has the shape, dtype and device of a batch of them.
    """
    y = target.empty(like)
    arguments = (records, keys, *options, keys is not None, op)
    if _C.augment_forward_list(y, images, *arguments) != 0:
        images = [x.detach().resolve_neg().contiguous() for x in images]
        if _C.augment_forward_list(y, images, *arguments) != 0:
            raise operator.refused(op)
    return y


def call(
    operation: operator.Operator,
    x: Tensor,
    arguments: Sequence[Any],
    target: Target,
    op: str,
    out: Tensor | None,
) -> Tensor:
    """Call an operator on checked images, with the rest of its arguments."""
    if out is not None:
        checks.check_target(x, out, op, (*x.shape[:2], *target.size), target.dtype)
    result: Tensor
    if not dispatch.direct(x):
        result = operation.traced(x, *arguments)
        return result if out is None else out.copy_(result)
    if out is not None:
        return operation.into(out, x, *arguments)
    # uint8 has no gradient.
    compute = operation.kernel if target.dtype is torch.uint8 else operation.eager
    result = compute(x, *arguments)
    return result
