"""Augmentation as torch operations: calls of the kernels, autograd, torch.library, torch.func.

``apply`` is the entry. Its arguments are those of the kernels (csrc/augment/augment.h): a record of
28 numbers for each sample, and numbers for each channel. Backward is the transpose of the warp,
worked out again from the records; with ``color`` it also needs x, because of the clamp. The layers
are those of ``core.draws``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, operator
from ..core.operator import applied

DTYPES = (torch.uint8, *checks.SUPPORTED_DTYPES)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
FILL_MODES = ("constant", "border", "reflect", "symmetric", "wrap")


class Options(NamedTuple):
    """What concerns all samples, in the order in which the kernels take it."""

    interpolation: int
    antialias: bool
    fill_mode: int
    color: bool
    fill: Sequence[float]
    scale: Sequence[float]
    shift: Sequence[float]
    erase: Sequence[float]

    def linear(self) -> Options:
        """Without what forward adds: the map on differences of x."""
        zeros = [0.0] * len(self.scale)
        return self._replace(fill=zeros, shift=zeros, erase=zeros)


class Target(NamedTuple):
    """What the result is."""

    size: tuple[int, int]
    dtype: torch.dtype
    channels_last: bool

    @staticmethod
    def of(
        x: Tensor,
        size: tuple[int, int],
        dtype: torch.dtype,
        memory_format: torch.memory_format | None = None,
    ) -> Target:
        """Return the target of x; ``memory_format`` None stands for that of x."""
        if memory_format in (None, torch.preserve_format):
            channels_last = is_channels_last(x)
        else:
            channels_last = memory_format is torch.channels_last
        return Target((int(size[0]), int(size[1])), dtype, channels_last)

    def empty(self, x: Tensor) -> Tensor:
        (n, c), (h, w) = x.shape[:2], self.size
        if self.channels_last:
            return x.new_empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), dtype=self.dtype)
        return x.new_empty((n, c, h, w), dtype=self.dtype)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous():
        return False
    if dispatch.functorch():
        # vmap cannot be asked for any other memory format.
        _, c, h, w = x.shape
        return x.stride() == (c * h * w, 1, w * c, c)
    return x.is_contiguous(memory_format=torch.channels_last)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


# --- the kernels, on whatever tensors there are ---------------------------------------------------


def ready(x: Tensor) -> Tensor:
    """A plain tensor, contiguous in one of the two formats."""
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    x = x.detach().resolve_neg()
    return x if is_channels_last(x) else x.contiguous()


def forward(
    x: Tensor,
    records: Tensor,
    keys: Tensor | None,
    target: Target,
    options: Options,
    op: str,
    out: Tensor | None = None,
) -> Tensor:
    y = target.empty(x) if out is None else out
    arguments = (records, keys, *options, keys is not None, op)
    return written_by(_C.augment_forward, y, x, arguments, op)


def written_by(
    kernel: Callable[..., int], y: Tensor, x: Tensor, arguments: Sequence[Any], op: str
) -> Tensor:
    """y, after the kernel wrote to it, whatever the layouts."""
    if kernel(y, x, *arguments) == 0:
        return y
    plain = ready(x)
    into = y if y.is_contiguous() or is_channels_last(y) else torch.empty_like(y).contiguous()
    if type(into) is not Tensor:
        into = into.as_subclass(Tensor)
    if kernel(into, plain, *arguments) != 0:
        raise RuntimeError(
            f"fusereg.{op}: the kernel refused a prepared tensor; please report this"
        )
    return y if into is y or into.data_ptr() == y.data_ptr() else y.copy_(into)


def backward(
    grad: Tensor,
    x: Tensor | None,
    records: Tensor,
    like: Target,
    options: Options,
    op: str,
) -> Tensor:
    """The gradient of x, which is of ``like``'s size, dtype and layout."""
    compute = torch.float64 if like.dtype is torch.float64 else torch.float32
    grad = ready(grad.to(compute))
    grad_x = like._replace(dtype=compute).empty(grad)
    plain = None if x is None else ready(x)
    if _C.augment_backward(grad_x, grad, plain, records, *options, op) != 0:
        raise RuntimeError(
            f"fusereg.{op}: the kernel refused a prepared tensor; please report this"
        )
    return grad_x.to(like.dtype)


def _like(x: Tensor) -> Target:
    return Target((int(x.shape[2]), int(x.shape[3])), x.dtype, is_channels_last(x))


# --- eager autograd -------------------------------------------------------------------------------


class Call(NamedTuple):
    """All but x and the records."""

    keys: Tensor | None
    target: Target
    options: Options
    op: str


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, records: Tensor, call: Call) -> Tensor:
        color = call.options.color
        ctx.save_for_backward(x if color else None, records)
        ctx.save_for_forward(x if color else None, records)
        ctx.call, ctx.like = call, _like(x)
        return forward(x, records, *call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, records = ctx.saved_tensors
        return _gradient(grad, x, records, ctx.like, ctx.call), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        _, records = ctx.saved_tensors
        return _linear(tangent, records, ctx.call)


class _AugmentBackward(torch.autograd.Function):
    """Linear in the gradient; what it is the transpose of is its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor | None, records: Tensor, like: Target, call: Call
    ) -> Tensor:
        ctx.save_for_backward(records)
        ctx.save_for_forward(records)
        ctx.like, ctx.call, ctx.dtype = like, call, grad.dtype
        ctx.x = x if call.options.color else None
        return backward(grad, x, records, like, call.options, call.op)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Any, ...]:
        (records,) = ctx.saved_tensors
        return _linear(second, records, ctx.call).to(ctx.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (records,) = ctx.saved_tensors
        return backward(tangent, ctx.x, records, ctx.like, ctx.call.options, ctx.call.op)


def _gradient(grad: Tensor, x: Tensor | None, records: Tensor, like: Target, call: Call) -> Tensor:
    """backward(), differentiable where that is asked for."""
    if torch.is_grad_enabled():
        return applied(_AugmentBackward, grad, x, records, like, call)
    return backward(grad, x, records, like, call.options, call.op)


def _linear(x: Tensor, records: Tensor, call: Call) -> Tensor:
    """The map on differences of x, differentiable where that is asked for."""
    _check_linear(call.options, call.op)
    rest = call._replace(keys=None, options=call.options.linear())
    if operator.differentiated(x):
        return applied(_Augment, x, records, rest)
    return forward(x, records, *rest)


def _check_linear(options: Options, op: str) -> None:
    if options.color:
        raise NotImplementedError(
            f"fusereg.{op}: with brightness, contrast or saturation there are first derivatives "
            "in reverse mode alone; leave these out where second derivatives or forward mode are "
            "needed"
        )


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Tensor], str], object] = dispatch.library.impl
_OPTIONS = (
    "int interpolation, bool antialias, int fill_mode, bool color, float[] fill, float[] scale,"
    " float[] shift, float[] erase"
)
_define(
    "augment(Tensor x, Tensor records, Tensor? keys, SymInt[] size, ScalarType dtype,"
    f" bool channels_last, {_OPTIONS}) -> Tensor"
)
_define(
    "augment_backward(Tensor grad, Tensor? x, Tensor records, SymInt[] size, ScalarType dtype,"
    f" bool channels_last, {_OPTIONS}) -> Tensor"
)


def _as_target(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Target:
    return Target((size[0], size[1]), dtype, channels_last)


def _op_forward(
    x: Tensor,
    records: Tensor,
    keys: Tensor | None,
    size: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    *options: Any,
) -> Tensor:
    target = _as_target(size, dtype, channels_last)
    return forward(x, records, keys, target, Options(*options), "augment")


def _op_backward(
    grad: Tensor,
    x: Tensor | None,
    records: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    *options: Any,
) -> Tensor:
    like = _as_target(size, dtype, channels_last)
    return backward(grad, x, records, like, Options(*options), "augment")


for _key in ("CPU", "CUDA"):
    _implement("augment", _op_forward, _key)
    _implement("augment_backward", _op_backward, _key)

torch.library.register_fake(
    "fusereg::augment",
    lambda x, records, keys, size, dtype, channels_last, *_: _as_target(
        size, dtype, channels_last
    ).empty(x),
    lib=dispatch.library,
)
torch.library.register_fake(
    "fusereg::augment_backward",
    lambda grad, x, records, size, dtype, channels_last, *_: _as_target(
        size, dtype, channels_last
    ).empty(grad),
    lib=dispatch.library,
)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, records, _, _, _, _, *ctx.options = inputs
    ctx.save_for_backward(x if ctx.options[3] else None, records)
    ctx.like = ((x.shape[2], x.shape[3]), x.dtype, is_channels_last(x))


def _op_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, records = ctx.saved_tensors
    gradient = torch.ops.fusereg.augment_backward(grad, x, records, *ctx.like, *ctx.options)
    return gradient, *[None] * 13


def _save_for_second_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, _, records, _, _, _, *options = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(records)
    ctx.like = ((grad.shape[2], grad.shape[3]), grad.dtype, is_channels_last(grad))


def _second_gradient(ctx: Any, second: Tensor) -> tuple[Any, ...]:
    _check_linear(ctx.options, "augment")
    (records,) = ctx.saved_tensors
    options = ctx.options.linear()
    result = torch.ops.fusereg.augment(second, records, None, *ctx.like, *options)
    return result, *[None] * 13


torch.library.register_autograd(
    "fusereg::augment", _op_gradient, setup_context=_save_for_gradient, lib=dispatch.library
)
torch.library.register_autograd(
    "fusereg::augment_backward",
    _second_gradient,
    setup_context=_save_for_second_gradient,
    lib=dispatch.library,
)


# --- torch.func -----------------------------------------------------------------------------------


class _AugmentTransform(torch.autograd.Function):
    """Forward, or (``gradient``) its transpose, whose ``other`` is x; forward's are the keys."""

    @staticmethod
    def forward(
        x: Tensor,
        other: Tensor | None,
        records: Tensor,
        target: Target,
        options: Options,
        gradient: bool,
    ) -> Tensor:
        if gradient:
            result: Tensor = torch.ops.fusereg.augment_backward(
                x, other, records, *target, *options
            )
        else:
            result = torch.ops.fusereg.augment(x, records, other, *target, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, other, records, _, ctx.options, ctx.gradient = inputs
        kept = (x if not ctx.gradient else other) if ctx.options.color else None
        ctx.like = Target((x.shape[2], x.shape[3]), x.dtype, False)
        ctx.target = inputs[3]
        ctx.save_for_backward(kept, records)
        ctx.save_for_forward(kept, records)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, records = ctx.saved_tensors
        options = ctx.options
        if ctx.gradient:
            _check_linear(options, "augment")
            options = options.linear()
        result = applied(_AugmentTransform, grad, x, records, ctx.like, options, not ctx.gradient)
        return result, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        x, records = ctx.saved_tensors
        if not ctx.gradient:
            _check_linear(ctx.options, "augment")
        return applied(
            _AugmentTransform,
            tangent,
            x if ctx.gradient else None,
            records,
            ctx.target,
            ctx.options.linear(),
            ctx.gradient,
        )

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        other: Tensor | None,
        records: Tensor,
        target: Target,
        options: Options,
        gradient: bool,
    ) -> tuple[Tensor, int]:
        # One call for each of the batches that are mapped over.
        def part(t: Tensor | None, dim: int | None, i: int) -> Tensor | None:
            return t if t is None or dim is None else t.select(dim, i)

        results = [
            applied(
                _AugmentTransform,
                part(x, in_dims[0], i),
                part(other, in_dims[1], i),
                part(records, in_dims[2], i),
                target,
                options,
                gradient,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0


# --- the entry ------------------------------------------------------------------------------------


def check_images(x: object, op: str, name: str = "x") -> Tensor:
    """[N, C, H, W] of a dtype that the kernels read."""
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
        raise ValueError(f"{where} must have 4 dimensions (N, C, H, W), got {x.dim()}")
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
    if out is not None:
        checks.check_target(x, out, op, (*x.shape[:2], *target.size), target.dtype)
    if (
        not dispatch.eager()
        or x.device.type == "meta"
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
    ):
        if dispatch.functorch():
            y = applied(_AugmentTransform, x, keys, records, target, options, False)
        else:
            y = torch.ops.fusereg.augment(x, records, keys, *target, *options)
        return y if out is None else out.copy_(y)
    if out is not None:
        return operator.written(forward(x, records, keys, target, options, op, out))
    if target.dtype is not torch.uint8 and operator.differentiated(x):
        return applied(_Augment, x, records, Call(keys, target, options, op))
    return forward(x, records, keys, target, options, op)
