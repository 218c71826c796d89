"""Dropout as torch operations: calls of the kernels, autograd, torch.library, torch.func.

All kinds are one form, y = keep ? a * x + b : c, whose mask is drawn again in backward from the
call's (seed, offset) pair; ``row_dims`` > 0 means one draw for each index of that many leading
dimensions.
Element i of the memory of ``torch.empty_like(x)`` has draw ``index_offset + i``.

``forward``, ``backward``
    prepare what a kernel cannot take as it is and call it; no autograd.
``_Dropout``, ``_DropoutInPlace``
    the eager autograd functions. They keep the pair and nothing else.
``torch.ops.fusereg.dropout``, ``torch.ops.fusereg.dropout_backward``
    the same as pure functions of (x, pair, p), for torch.compile, export, fake tensors.
``_DropoutTransform``
    the same for torch.func. There the order of the draws is always row-major.
``dropout``
    the entry: picks between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C
from . import checks, dispatch, distributed, random
from .operator import DrawnMap, DrawnMapInPlace, applied, differentiated, run, written


class Call(NamedTuple):
    """A call's constants, in the order in which the kernels take them after the tensors."""

    seed: int | Tensor
    offset: int
    p: float
    alpha: bool
    row_dims: int
    index_offset: int
    op: str

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        y = forward(self, x)
        return y, y.stride()

    def forward_(self, x: Tensor) -> tuple[int, ...]:
        _run(_C.dropout_forward, x, x, self)
        return torch.empty_like(x, device="meta").stride()

    def backward(self, grad: Tensor, rest: Sequence[int]) -> Tensor:
        return backward(self, grad, rest)


# --- the kernels, on whatever tensors there are ---------------------------------------------------


def _run(kernel: Callable[..., int], y: Tensor, x: Tensor, call: Call) -> Tensor:
    """Writes into y, whatever the layouts; x's decides on the order of the draws."""
    if call.p and kernel(y, x, *call) == 0:
        return y
    return _run_prepared(kernel, y, x, call)


def _run_prepared(kernel: Callable[..., int], y: Tensor, x: Tensor, call: Call) -> Tensor:
    """The same for what a kernel does not take as it is."""
    if call.p == 0.0:
        return y.copy_(x)
    plain = checks.plain(x, call.op, "x")
    ready = torch.empty_like(plain)
    if call.row_dims and not _rows_fit(ready):
        ready = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
    ready.copy_(plain)
    if kernel(ready, ready, *call) != 0:
        raise RuntimeError(
            f"fusereg.{call.op}: the kernel refused a prepared tensor; please report this"
        )
    return y.copy_(ready)


def _rows_fit(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def forward(call: Call, x: Tensor) -> Tensor:
    return _run(_C.dropout_forward, torch.empty_like(x), x, call)


def backward(call: Call, grad: Tensor, strides: Sequence[int]) -> Tensor:
    """The gradient of x, walked in the order in which forward walked x (its result's strides)."""
    grad = laid_out(grad, strides)
    return _run(_C.dropout_backward, torch.empty_like(grad), grad, call)


def laid_out(t: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor itself if it lies in memory as these strides say, else a copy that does."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


# --- eager autograd -------------------------------------------------------------------------------


class _Dropout(DrawnMap):
    pass


class _DropoutInPlace(DrawnMapInPlace):
    pass


def dropped(x: Tensor, call: Call) -> Tensor:
    """forward(), differentiable where that is asked for."""
    return _apply(x, call) if differentiated(x) else forward(call, x)


#: _Dropout.apply without its question for functorch, which the gate has answered: 1.2 us less.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Dropout).apply


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Tensor], str], object] = dispatch.library.impl
_define(
    "dropout(Tensor x, Tensor seed, float p, bool alpha, int row_dims, SymInt index_offset)"
    " -> Tensor"
)
_define(
    "dropout_backward(Tensor grad, Tensor seed, float p, bool alpha, int row_dims,"
    " SymInt index_offset, SymInt[] stride) -> Tensor"
)


def _op_dropout(
    x: Tensor, seed: Tensor, p: float, alpha: bool, row_dims: int, index_offset: int
) -> Tensor:
    return forward(Call(seed, 0, p, alpha, row_dims, index_offset, "dropout"), x)


def _op_dropout_backward(
    grad: Tensor,
    seed: Tensor,
    p: float,
    alpha: bool,
    row_dims: int,
    index_offset: int,
    stride: Sequence[int],
) -> Tensor:
    call = Call(seed, 0, p, alpha, row_dims, index_offset, "dropout")
    return backward(call, grad, tuple(stride))


for _key in ("CPU", "CUDA"):
    _implement("dropout", _op_dropout, _key)
    _implement("dropout_backward", _op_dropout_backward, _key)

torch.library.register_fake(
    "fusereg::dropout",
    lambda x, seed, p, alpha, row_dims, index_offset: torch.empty_like(x),
    lib=dispatch.library,
)
torch.library.register_fake(
    "fusereg::dropout_backward",
    lambda grad, seed, p, alpha, row_dims, index_offset, stride: grad.new_empty_strided(
        grad.shape, stride
    ),
    lib=dispatch.library,
)


def _save_for_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *ctx.call = inputs
    ctx.stride = output.stride()
    ctx.save_for_backward(seed)


def _dropout_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    gradient = torch.ops.fusereg.dropout_backward(grad, seed, *ctx.call, ctx.stride)
    return gradient, None, None, None, None, None


def _save_for_backward_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *ctx.call = inputs
    ctx.save_for_backward(seed)


def _second_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    gradient = torch.ops.fusereg.dropout_backward(grad, seed, *ctx.call)
    return gradient, None, None, None, None, None, None


torch.library.register_autograd(
    "fusereg::dropout", _dropout_gradient, setup_context=_save_for_dropout, lib=dispatch.library
)
torch.library.register_autograd(
    "fusereg::dropout_backward",
    _second_gradient,
    setup_context=_save_for_backward_op,
    lib=dispatch.library,
)


# --- torch.func -----------------------------------------------------------------------------------


#: (p, alpha, row_dims, index_offset), as the operators take them after the pair.
_Constants: TypeAlias = tuple[float, bool, int, int]


class _DropoutTransform(torch.autograd.Function):
    """Forward, or (``gradient``) the linear map that backward is."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor, constants: _Constants, gradient: bool) -> Tensor:
        # A sample of a batch may lie in any way, its gradient in another: row-major is for both.
        x = x.contiguous()
        if gradient:
            result: Tensor = torch.ops.fusereg.dropout_backward(x, seed, *constants, x.stride())
        else:
            result = torch.ops.fusereg.dropout(x, seed, *constants)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, seed, ctx.constants, _ = inputs
        ctx.save_for_backward(seed)
        ctx.save_for_forward(seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        return applied(_DropoutTransform, grad, seed, ctx.constants, True), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (seed,) = ctx.saved_tensors
        return applied(_DropoutTransform, tangent, seed, ctx.constants, True)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        seed: Tensor,
        constants: _Constants,
        gradient: bool,
    ) -> tuple[Tensor, int]:
        # One call a sample: its draws start at index_offset, as they would alone.
        def sample(t: Tensor, dim: int | None, i: int) -> Tensor:
            return t if dim is None else t.select(dim, i)

        results = [
            applied(
                _DropoutTransform,
                sample(x, in_dims[0], i),
                sample(seed, in_dims[1], i),
                constants,
                gradient,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0


# --- the entry ------------------------------------------------------------------------------------


def dropout(
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    out: Tensor | None,
    alpha: bool,
    row_dims: int,
    op: str,
) -> Tensor:
    """Every kind of dropout with given arguments; the public functions say what they mean."""
    if (
        # What training loops call, with as few questions as possible.
        training
        and type(p) is float
        and 0.0 < p <= 1.0
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.dtype in checks.SUPPORTED_DTYPES
        and x.layout is torch.strided
        and (x.is_cpu or x.is_cuda)
        and not (inplace or index_offset)
        and out is None
        and seed is None
        and generator is None
        and dispatch.eager()
    ):
        call = Call(*random.new_pair(x), p, alpha, row_dims, 0, op)
        return dropped(x, call)

    checks.check_probability(p, op)
    checks.check_input(x, op)
    if out is not None:
        if inplace:
            raise ValueError(f"fusereg.{op}: inplace and out exclude each other")
        checks.check_target(x, out, op)
    if not training or p == 0:
        return x if out is None or out is x else out.copy_(x)
    if inplace:
        checks.check_in_place(x, op)
    if distributed.is_dtensor(x):
        y = distributed.apply(
            x,
            seed,
            generator,
            index_offset,
            row_dims,
            op,
            lambda local, pair, first: dropout(
                local, p, True, False, pair, None, first, None, alpha, row_dims, op
            ),
        )
        target = x if inplace else out
        return y if target is None else target.copy_(y)
    if (
        not dispatch.eager()
        or x.device.type == "meta"
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
    ):
        constants = (float(p), alpha, row_dims, index_offset)
        pair = random.operator_pair(x.device, seed, generator, op)
        return _observed(x, pair, constants, x if inplace else out)

    checks.check_index_offset(index_offset, op)
    numbers = random.eager_pair(x.device, seed, generator, op)
    call = Call(*numbers, float(p), alpha, row_dims, index_offset, op)
    if out is not None:
        return written(_run(_C.dropout_forward, out, x, call))
    return run(_Dropout, _DropoutInPlace, x, call, inplace)


def _observed(x: Tensor, pair: Tensor, constants: _Constants, target: Tensor | None) -> Tensor:
    """Under a compiler, a mode or a transform, and for subclasses: through operators."""
    if dispatch.functorch():
        y = applied(_DropoutTransform, x, pair, constants, False)
    else:
        y = torch.ops.fusereg.dropout(x, pair, *constants)
    return y if target is None else target.copy_(y)


def mask(
    shape: Sequence[int],
    p: float,
    seed: int,
    offset: int,
    index_offset: int,
    device: torch.device | str | None,
) -> Tensor:
    """What dropout keeps of a contiguous tensor of this shape."""
    op = "dropout_mask"
    checks.check_probability(p, op)
    if isinstance(shape, int):
        shape = (shape,)
    ones = torch.ones(tuple(shape), dtype=torch.float32, device=device)
    return forward(Call(seed, offset, float(p), False, 0, index_offset, op), ones) != 0
