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

from . import _C, _dispatch, _params, _random
from ._autograd import DrawnMap, DrawnMapInPlace, applied, differentiated, run, written


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
    plain = _params.plain(x, call.op, "x")
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
_define: Callable[[str], object] = _dispatch.library.define
_implement: Callable[[str, Callable[..., Tensor], str], object] = _dispatch.library.impl
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
    lib=_dispatch.library,
)
torch.library.register_fake(
    "fusereg::dropout_backward",
    lambda grad, seed, p, alpha, row_dims, index_offset, stride: grad.new_empty_strided(
        grad.shape, stride
    ),
    lib=_dispatch.library,
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
    "fusereg::dropout", _dropout_gradient, setup_context=_save_for_dropout, lib=_dispatch.library
)
torch.library.register_autograd(
    "fusereg::dropout_backward",
    _second_gradient,
    setup_context=_save_for_backward_op,
    lib=_dispatch.library,
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


def check_probability(p: object, op: str, name: str = "p") -> None:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"fusereg.{op}: {name} must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"fusereg.{op}: {name} must be within [0, 1], got {p}")


def check_input(x: object, op: str, name: str = "x") -> None:
    where = f"fusereg.{op}: {name}"
    if not isinstance(x, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        raise ValueError(f"{where} must be a dense, strided tensor, got a {kind} one")
    if x.dtype not in _params.SUPPORTED_DTYPES:
        raise ValueError(
            f"{where} has dtype {x.dtype}; wanted float64, float32, float16 or bfloat16"
        )
    if x.device.type != "meta":
        _params.check(x, op, name)


def check_index_offset(index_offset: object, op: str) -> None:
    if isinstance(index_offset, bool) or not isinstance(index_offset, int) or index_offset < 0:
        raise ValueError(
            f"fusereg.{op}: index_offset must be an integer and not negative, got {index_offset!r}"
        )


def check_target(x: Tensor, out: object, op: str) -> Tensor:
    """``out`` for a result like x."""
    if not isinstance(out, Tensor):
        raise TypeError(f"fusereg.{op}: out must be a torch.Tensor, got {type(out).__name__}")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"fusereg.{op}: out must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    _params.check_writable(out, op, "out")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            f"fusereg.{op}: out= supports no gradients, and x or out requires one; "
            "leave out= away, or call under torch.no_grad()"
        )
    if overlap_partly(x, out):
        raise ValueError(f"fusereg.{op}: x and out overlap in memory without being the same")
    return out


def overlap_partly(x: Tensor, out: Tensor) -> bool:
    if x is out or not _dispatch.eager() or x.numel() == 0 or x.device.type == "meta":
        return False

    def span(t: Tensor) -> tuple[int, int]:
        length = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        return t.data_ptr(), t.data_ptr() + length * t.element_size()

    (a, a_end), (b, b_end) = span(x), span(out)
    return a < b_end and b < a_end and not (a == b and x.stride() == out.stride())


def check_in_place(x: Tensor, op: str) -> None:
    _params.check_writable(x, op, "x")
    if not torch.is_grad_enabled():
        return
    whole = x if x._base is None else x._base
    if whole.requires_grad and whole.is_leaf:
        what = "a leaf" if whole is x else "a view of a leaf"
        raise ValueError(
            f"fusereg.{op}: x is {what} that requires a gradient, so it cannot be changed in place"
        )


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
        and x.dtype in _params.SUPPORTED_DTYPES
        and x.layout is torch.strided
        and (x.is_cpu or x.is_cuda)
        and not (inplace or index_offset)
        and out is None
        and seed is None
        and generator is None
        and _dispatch.eager()
    ):
        call = Call(*_random.new_pair(x), p, alpha, row_dims, 0, op)
        return dropped(x, call)

    check_probability(p, op)
    check_input(x, op)
    if out is not None:
        if inplace:
            raise ValueError(f"fusereg.{op}: inplace and out exclude each other")
        check_target(x, out, op)
    if not training or p == 0:
        return x if out is None or out is x else out.copy_(x)
    if inplace:
        check_in_place(x, op)
    if _dispatch.is_dtensor(x):
        from . import _dropout_dtensor

        y = _dropout_dtensor.apply(
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
        not _dispatch.eager()
        or x.device.type == "meta"
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
    ):
        constants = (float(p), alpha, row_dims, index_offset)
        pair = _random.operator_pair(x.device, seed, generator, op)
        return _observed(x, pair, constants, x if inplace else out)

    check_index_offset(index_offset, op)
    numbers = _random.eager_pair(x.device, seed, generator, op)
    call = Call(*numbers, float(p), alpha, row_dims, index_offset, op)
    if out is not None:
        return written(_run(_C.dropout_forward, out, x, call))
    return run(_Dropout, _DropoutInPlace, x, call, inplace)


def _observed(x: Tensor, pair: Tensor, constants: _Constants, target: Tensor | None) -> Tensor:
    """Under a compiler, a mode or a transform, and for subclasses: through operators."""
    if _dispatch.functorch():
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
    check_probability(p, op)
    if isinstance(shape, int):
        shape = (shape,)
    ones = torch.ones(tuple(shape), dtype=torch.float32, device=device)
    return forward(Call(seed, offset, float(p), False, 0, index_offset, op), ones) != 0
