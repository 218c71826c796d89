"""In-place activated batch normalization (Rota Bulo, Porzi, Kontschieder 2018).

Forward writes y over x. Backward has y alone: it inverts the activation and the affine map, which
gives z and x - mean, and goes on as always. z - bias has lost digits where the weight is small
against the bias, and all of them where it is 0 (many networks start with zeros in the last weight
of a block). So x is kept of such channels, and of no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch, memory, operator
from . import kernels
from . import op as ops
from .kernels import FIXED, Call, Gradients, Inputs

#: How many times larger than the weight a bias may be: the error of (x - mean) / std is about this
#: times y's rounding.
_LARGEST_RATIO = {
    torch.float64: 32.0,
    torch.float32: 32.0,
    torch.float16: 8.0,
    torch.bfloat16: 4.0,
}


def lost_channels(call: Call) -> Tensor | None:
    """Return the indices of the channels whose x y does not determine; None if there are none.

    On CUDA the host waits for this answer.
    """
    x, weight, bias = call.inputs.x, call.inputs.weight, call.inputs.bias
    if weight is None and bias is None:
        return None
    if memory.capturing(x.device):
        raise RuntimeError(
            f"fusereg.{call.op}: inplace=True asks the device for the weights, which cannot be "
            "done while a CUDA graph is captured; use inplace=False there"
        )
    info = torch.finfo(x.dtype)
    # Below this, y of a negative z is among the numbers that have fewer digits.
    smallest = max(info.tiny, 512.0 * info.tiny * info.eps / min(call.constants.slope, 1.0))
    with torch.no_grad():
        size = torch.ones((), device=x.device) if weight is None else weight.abs()
        lost = size < smallest
        if bias is not None:
            lost = lost | (size * _LARGEST_RATIO[x.dtype] < bias.abs())
        found = lost.nonzero().flatten()
    return found if found.numel() else None


class _Last(torch.autograd.Function):
    """The identity, on a gradient that has none itself: asking for it is an error."""

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
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
    ) -> Tensor:
        mask, mean, var = call.inputs.mask, call.inputs.running_mean, call.inputs.running_var
        lost = lost_channels(call)
        kept = None if lost is None else x.index_select(1, lost)
        kernels.forward(call, out=x)
        if call.constants.statistics != FIXED:
            mean = var = None
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, mask, weight, bias, call.moments, mean, var, lost, kept)
        ctx.constants, ctx.op = call.constants, call.op
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _InPlace._gradients(ctx, grad)
        if torch.is_grad_enabled():
            # Something that requires a gradient, so that these do.
            source = ctx.saved_tensors[0]
            found = [None if g is None else _last(g, source, ctx.op) for g in found]
        return *found, None

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """Return those of x, weight and bias."""
        *inputs, lost, kept = ctx.saved_tensors
        y, mask, weight, bias, moments, mean, var = inputs
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        wanted = (of_x, False, of_weight, of_bias)

        def gradients(x: Tensor, grad: Tensor, *others: Tensor | None, from_y: bool) -> Gradients:
            weight, bias, moments, mean, var = others
            given = Inputs(x, None, mask, weight, bias, moments, mean, var)
            call = Call(given, ctx.constants, ctx.op, moments=moments)
            return kernels.backward(call, grad, wanted, from_y=from_y)

        g = gradients(y, grad, weight, bias, moments, mean, var, from_y=True)
        if lost is not None:
            if moments is not None:  # of all groups, one after the other
                moments = moments.view(3, -1, y.shape[1]).index_select(2, lost).flatten(1)
            vectors = [None if t is None else t[lost] for t in (weight, bias, mean, var)]
            vectors.insert(2, moments)
            part = gradients(kept, grad.index_select(1, lost), *vectors, from_y=False)
            for whole, piece, dim in (
                (g.x, part.x, 1),
                (g.weight, part.weight, 0),
                (g.bias, part.bias, 0),
            ):
                if whole is not None and piece is not None:
                    whole.index_copy_(dim, lost, piece)
        return [g.x, g.weight, g.bias]


#: _InPlace.apply without its question for functorch, which the gate has answered.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _InPlace).apply


def normalize(call: Call) -> Tensor:
    """Write y into x, and return x; the arguments have been checked.

    Compilers, modes and transforms see a batch norm and a copy: what is kept is then their choice.
    """
    x, weight, bias = call.inputs.x, call.inputs.weight, call.inputs.bias
    derivatives = operator.differentiated(x, weight, bias)
    if call.direct and not dispatch.forward_mode():
        return _apply(x, weight, bias, call) if derivatives else ops.normalize(call, x)
    if derivatives:
        call.inputs = call.inputs._replace(x=x.clone())
    return x.copy_(ops.normalize(call))
