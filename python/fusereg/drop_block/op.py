"""DropBlock as an operation.

Its scale is made from the number of elements that forward kept, a float64 that is kept for backward
beside the Philox state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..core import checks
from ..core.operator import Operator, keep_state, kept, state_of, through_copy

OP = "drop_block2d"


def _supported(x: Tensor) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def _run(kernel: Any, y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Write into y, whatever the layouts."""
    if x.numel() == 0 or kernel(y, x, *rest, OP) == 0:
        return y
    return through_copy(kernel, y, x, (*rest, OP), _supported)


def _forward(
    x: Tensor, seed: Any, *constants: Any, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    count = torch.empty((), dtype=torch.float64, device=x.device)
    slots = None
    if x.numel() == 0:
        count.zero_()
    elif x.is_cuda or _C.CUDA_ON_HOST:
        slots = torch.empty(_C.DROP_BLOCK_SLOTS, dtype=torch.float64, device=x.device)
    y = torch.empty_like(x) if out is None else out
    return _run(_C.drop_block_forward, y, x, count, slots, *state_of(seed), *constants), count


def _backward(grad: Tensor, count: Tensor, seed: Any, *constants: Any) -> Tensor:
    y = torch.empty_like(grad)
    return _run(_C.drop_block_backward, y, grad, count, *state_of(seed), *constants)


def _save(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.state, *ctx.constants = args
    ctx.mark_non_differentiable(output[1])
    keep_state(ctx, output[1])


def _save_linear(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    _, count, ctx.state, *ctx.constants = args
    keep_state(ctx, count)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor]:
    return (_drop_backward(grad, *kept(ctx), *ctx.constants),)


_CONSTANTS = "Tensor seed, float p, int block_size, SymInt index_offset"
drop = Operator(
    f"drop_block2d(Tensor x, {_CONSTANTS}) -> (Tensor, Tensor)",
    _forward,
    fake=lambda x, *_: (torch.empty_like(x), x.new_empty((), dtype=torch.float64)),
    save=_save,
    gradient=_gradient,
    tangent=lambda ctx, tangent, *_: (_gradient(ctx, tangent)[0], None),
    row_major=True,
    linear=True,
)
_drop_backward = Operator(
    f"drop_block2d_backward(Tensor grad, Tensor kept, {_CONSTANTS}) -> Tensor",
    _backward,
    fake=lambda grad, *_: torch.empty_like(grad),
    save=_save_linear,
    gradient=_gradient,
    tangent=lambda ctx, tangent, *_: _gradient(ctx, tangent)[0],
    row_major=True,
    linear=True,
)


def check_block_size(block_size: object, op: str) -> None:
    """Raise unless ``block_size`` is a positive integer."""
    if not checks.is_integer(block_size):
        raise TypeError(
            f"fusereg.{op}: block_size must be an integer, got {type(block_size).__name__}"
        )
    if block_size < 1:
        raise ValueError(f"fusereg.{op}: block_size must be at least 1, got {block_size}")
