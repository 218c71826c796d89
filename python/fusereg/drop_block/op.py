"""DropBlock as torch operations: calls of the kernels, autograd, torch.library, torch.func.

The mask is drawn again in backward from the call's (seed, offset) pair. Kept for it are that pair
and ``kept``, one float64 that holds the number of elements that forward kept, for the scale is made
from it. The layers are those of ``core.draws``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, distributed, random
from ..core.operator import DrawnMap, DrawnMapInPlace, run

OP = "drop_block2d"


class Call(NamedTuple):
    """A call's constants, in the order in which the kernels take them after the tensors."""

    seed: int | Tensor
    offset: int
    p: float
    block_size: int
    index_offset: int
    op: str = OP

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return forward(self, x)

    def forward_(self, x: Tensor) -> Tensor:
        return forward(self, x, x)[1]

    def backward(self, grad: Tensor, rest: Tensor) -> Tensor:
        return backward(self, grad, rest)


# --- the kernels, on whatever tensors there are ---------------------------------------------------


def _run(
    kernel: Callable[..., int], y: Tensor, x: Tensor, numbers: Sequence[Any], call: Call
) -> Tensor:
    """Writes into y, whatever the layouts."""
    if x.numel() == 0 or kernel(y, x, *numbers, *call) == 0:
        return y
    plain = checks.plain(x, OP, "x")
    channels_last = plain.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ready = plain.clone(memory_format=layout)
    if kernel(ready, ready, *numbers, *call) != 0:
        raise RuntimeError(
            f"fusereg.{OP}: the kernel refused a prepared tensor; please report this"
        )
    return y.copy_(ready)


def forward(call: Call, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The result, in y if given, and how many elements were kept."""
    kept = torch.empty((), dtype=torch.float64, device=x.device)
    slots = None
    if x.numel() == 0:
        kept.zero_()
    elif x.is_cuda or _C.CUDA_ON_HOST:
        slots = torch.empty(_C.DROP_BLOCK_SLOTS, dtype=torch.float64, device=x.device)
    y = torch.empty_like(x) if y is None else y
    return _run(_C.drop_block_forward, y, x, (kept, slots), call), kept


def backward(call: Call, grad: Tensor, kept: Tensor) -> Tensor:
    """The gradient of x: the same map on the gradient."""
    return _run(_C.drop_block_backward, torch.empty_like(grad), grad, (kept,), call)


# --- eager autograd -------------------------------------------------------------------------------


class _DropBlock(DrawnMap):
    pass


class _DropBlockInPlace(DrawnMapInPlace):
    pass


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Any], str], object] = dispatch.library.impl
_define(
    "drop_block2d(Tensor x, Tensor seed, float p, int block_size, SymInt index_offset)"
    " -> (Tensor, Tensor)"
)
_define(
    "drop_block2d_backward(Tensor grad, Tensor kept, Tensor seed, float p, int block_size,"
    " SymInt index_offset) -> Tensor"
)


def _op_forward(
    x: Tensor, seed: Tensor, p: float, block_size: int, index_offset: int
) -> tuple[Tensor, Tensor]:
    return forward(Call(seed, 0, p, block_size, index_offset), x)


def _op_backward(
    grad: Tensor, kept: Tensor, seed: Tensor, p: float, block_size: int, index_offset: int
) -> Tensor:
    return backward(Call(seed, 0, p, block_size, index_offset), grad, kept)


for _key in ("CPU", "CUDA"):
    _implement("drop_block2d", _op_forward, _key)
    _implement("drop_block2d_backward", _op_backward, _key)

torch.library.register_fake(
    "fusereg::drop_block2d",
    lambda x, *_: (torch.empty_like(x), x.new_empty((), dtype=torch.float64)),
    lib=dispatch.library,
)
torch.library.register_fake(
    "fusereg::drop_block2d_backward",
    lambda grad, *_: torch.empty_like(grad),
    lib=dispatch.library,
)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, seed, *ctx.constants = inputs
    ctx.save_for_backward(output[1], seed)


def _op_gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    gradient = torch.ops.fusereg.drop_block2d_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return gradient, None, None, None, None


def _save_for_second_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, kept, seed, *ctx.constants = inputs
    ctx.save_for_backward(kept, seed)


def _second_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = torch.ops.fusereg.drop_block2d_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return gradient, None, None, None, None, None


torch.library.register_autograd(
    "fusereg::drop_block2d", _op_gradient, setup_context=_save_for_gradient, lib=dispatch.library
)
torch.library.register_autograd(
    "fusereg::drop_block2d_backward",
    _second_gradient,
    setup_context=_save_for_second_gradient,
    lib=dispatch.library,
)


# --- torch.func -----------------------------------------------------------------------------------


class _DropBlockTransform(torch.autograd.Function):
    """Forward and the number of kept elements, or with that number the linear map of backward."""

    @staticmethod
    def forward(
        x: Tensor, kept: Tensor | None, seed: Tensor, constants: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()  # a sample of a batch may lie in any way
        if kept is None:
            result: tuple[Tensor, Tensor] = torch.ops.fusereg.drop_block2d(x, seed, *constants)
            return result
        y = torch.ops.fusereg.drop_block2d_backward(x, kept, seed, *constants)
        return y, kept.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, seed, ctx.constants = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], seed)
        ctx.save_for_forward(output[1], seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        kept, seed = ctx.saved_tensors
        return _transformed(grad, kept, seed, ctx.constants)[0], None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        kept, seed = ctx.saved_tensors
        return _transformed(tangent, kept, seed, ctx.constants)[0], None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        kept: Tensor | None,
        seed: Tensor,
        constants: tuple[Any, ...],
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        # One call a sample, drawn and counted as it would be alone.
        def sample(t: Any, dim: int | None, i: int) -> Any:
            return t if dim is None else t.select(dim, i)

        results = [
            _transformed(
                sample(x, in_dims[0], i),
                sample(kept, in_dims[1], i),
                sample(seed, in_dims[2], i),
                constants,
            )
            for i in range(info.batch_size)
        ]
        first, second = zip(*results, strict=True)
        return (torch.stack(first), torch.stack(second)), (0, 0)


def _transformed(
    x: Tensor, kept: Tensor | None, seed: Tensor, constants: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _DropBlockTransform.apply(  # type: ignore[no-untyped-call]
        x, kept, seed, constants
    )
    return result


# --- the entry ------------------------------------------------------------------------------------


def drop_block2d(
    x: Tensor,
    p: float,
    block_size: int,
    training: bool,
    inplace: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
) -> Tensor:
    checks.check_probability(p, OP)
    checks.check_input(x, OP)
    if x.dim() != 4:
        raise ValueError(f"fusereg.{OP}: x must have 4 dimensions (N, C, H, W), got {x.dim()}")
    check_block_size(block_size, OP)
    if not training or p == 0:
        return x
    if distributed.is_dtensor(x):
        raise ValueError(
            f"fusereg.{OP}: x is a DTensor, and its scale would need a count over all ranks; "
            "call it on x.to_local(), which is scaled by its own count"
        )
    if inplace:
        checks.check_in_place(x, OP)
    if (
        not dispatch.eager()
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
    ):
        pair = random.operator_pair(x.device, seed, generator, OP)
        constants = (float(p), block_size, index_offset)
        if dispatch.functorch():
            y = _transformed(x, None, pair, constants)[0]
        else:
            y = torch.ops.fusereg.drop_block2d(x, pair, *constants)[0]
        return x.copy_(y) if inplace else y

    checks.check_index_offset(index_offset, OP)
    numbers = random.eager_pair(x.device, seed, generator, OP)
    call = Call(*numbers, float(p), block_size, index_offset)
    return run(_DropBlock, _DropBlockInPlace, x, call, inplace)


def check_block_size(block_size: object, op: str) -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(
            f"fusereg.{op}: block_size must be an integer, got {type(block_size).__name__}"
        )
    if block_size < 1:
        raise ValueError(f"fusereg.{op}: block_size must be at least 1, got {block_size}")
