"""In-place activated batch normalization (Rota Bulo, Porzi, Kontschieder 2018).

Forward writes y over x. Backward has y alone, takes the activation and the affine map back, z from
y and x - mean from z, and goes on as always. z - bias has lost digits where the weight is small
against the bias, and everything where it is 0 (as networks begin that set the last weight of a
block to zero). So of such channels, and of no others, x is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch
from . import kernels
from . import op as ops
from .kernels import FIXED, Call, Running

#: Activations that can be taken back: none, leaky ReLU.
INVERTIBLE = (0, 2)

#: How many times larger than the weight a bias may be: the error of (x - mean) / std is about this
#: times y's rounding.
_LARGEST_RATIO = {
    torch.float64: 32.0,
    torch.float32: 32.0,
    torch.float16: 8.0,
    torch.bfloat16: 4.0,
}


def lost_channels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
) -> Tensor | None:
    """The channels whose x cannot be told from y, as indices; None if there are none.

    On CUDA the host waits for this answer.
    """
    if weight is None and bias is None:
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"fusereg.{call.op}: inplace=True asks the device for the weights, which cannot be "
            "done while a CUDA graph is captured; use inplace=False there"
        )
    info = torch.finfo(x.dtype)
    # Below this, y of a negative z is among the numbers that have fewer digits.
    smallest = max(info.tiny, 512.0 * info.tiny * info.eps / min(call.slope, 1.0))
    with torch.no_grad():
        size = torch.ones((), device=x.device) if weight is None else weight.abs()
        lost = size < smallest
        if bias is not None:
            lost = lost | (size * _LARGEST_RATIO[x.dtype] < bias.abs())
        found = lost.nonzero().flatten()
    return found if found.numel() else None


class _Last(torch.autograd.Function):
    """A gradient that has no gradient: says so to whoever asks for one."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, _: Tensor, op: str) -> Tensor:
        ctx.op = op
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"fusereg.{ctx.op}: inplace=True keeps the result alone and has no second derivative; "
            "use inplace=False where one is needed (gradient penalties, Hessians)"
        )


_last: Callable[..., Tensor] = _Last.apply


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: Call,
        mask: Tensor | None,
        running: Running,
    ) -> Tensor:
        lost = lost_channels(x, weight, bias, call)
        kept = None if lost is None else x.index_select(1, lost)
        moments = kernels.forward(call, x, None, mask, weight, bias, None, running, out=x).moments
        fixed: tuple[Tensor | None, ...] = ()
        if call.statistics == FIXED:
            fixed = running[:2]
        else:
            ops.mark_written(running)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, mask, moments, lost, kept, *fixed)
        ctx.call = call
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _InPlace._gradients(ctx, grad)
        if torch.is_grad_enabled():
            # Something that requires a gradient, so that these do.
            source = ctx.saved_tensors[0]
            found = [None if g is None else _last(g, source, ctx.call.op) for g in found]
        return *found, None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """Of x, weight and bias."""
        y, weight, bias, mask, moments, lost, kept, *fixed = ctx.saved_tensors
        need = ctx.needs_input_grad
        wanted = (need[0], False, need[1], need[2])
        running = Running(*fixed)
        g = kernels.backward(
            ctx.call, grad, y, None, mask, None, moments, weight, bias, running, wanted,
            from_y=True,
        )  # fmt: skip
        if lost is not None:
            part = kernels.backward(
                ctx.call,
                grad.index_select(1, lost),
                kept,
                None,
                mask,
                None,
                None if moments is None else _of_channels(moments, lost, y.shape[1]),
                None if weight is None else weight[lost],
                None if bias is None else bias[lost],
                Running(*(t[lost] for t in fixed)),
                wanted,
            )
            for whole, piece, dim in (
                (g.x, part.x, 1),
                (g.weight, part.weight, 0),
                (g.bias, part.bias, 0),
            ):
                if whole is not None and piece is not None:
                    whole.index_copy_(dim, lost, piece)
        return [g.x, g.weight, g.bias]


def _of_channels(moments: Tensor, channels: Tensor, count: int) -> Tensor:
    """Of all groups, one after the other."""
    return moments.view(3, -1, count).index_select(2, channels).flatten(1)


#: _InPlace.apply without its question for functorch, which the gate has answered.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _InPlace).apply


def normalize(
    call: Call,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
) -> Tensor:
    """x, with y written into it; the arguments have been checked.

    Compilers, modes and transforms see a batch norm and a copy: what is kept is then theirs to say.
    """
    grads = torch.is_grad_enabled() and ops.any_requires_grad(x, weight, bias)
    if dispatch.eager() and ops.plain_types(x, weight, bias) and not dispatch.forward_mode():
        if grads:
            return _apply(x, weight, bias, call, mask, running)
        return ops.normalize(call, x, None, mask, weight, bias, None, running, x)
    given = x.clone() if grads else x
    return x.copy_(ops.normalize(call, given, None, mask, weight, bias, None, running))
