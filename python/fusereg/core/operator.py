"""What the autograd functions of all techniques share.

``DrawnMap`` and ``DrawnMapInPlace`` are those of a linear map that a call draws: dropout of
elements, of blocks, by Gaussian noise. Nothing but the call is kept: backward draws the same map
again. It is its own transpose, so one function is forward, backward, forward mode and every further
derivative.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import dispatch


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or dispatch.forward_mode())


def written(y: Tensor) -> Tensor:
    """y, after a kernel wrote to it: autograd is told."""
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return y


class DrawnCall(Protocol):
    """What draws a map from its (seed, offset) pair.

    ``rest`` is what a second drawing needs besides the call.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """The result, and ``rest``."""

    def forward_(self, x: Tensor) -> Any:
        """Writes the result over x; ``rest``."""

    def backward(self, grad: Tensor, rest: Any) -> Tensor:
        """The map once more, on a gradient or a tangent."""


class DrawnMap(torch.autograd.Function):
    """The eager function. Each technique has a subclass: graphs show its name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: DrawnCall) -> Tensor:
        y, rest = call.forward(x)
        ctx.call = (call, rest)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient(grad, *ctx.call), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        call, rest = ctx.call
        result: Tensor = call.backward(tangent, rest)
        return result


class DrawnMapInPlace(torch.autograd.Function):
    """The same over x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: DrawnCall) -> Tensor:
        ctx.call = (call, call.forward_(x))
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient(grad, *ctx.call), None


class _Again(torch.autograd.Function):
    """Linear in the gradient, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, call: DrawnCall, rest: Any) -> Tensor:
        ctx.call = (call, rest)
        return call.backward(grad, rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gradient(grad, *ctx.call), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        call, rest = ctx.call
        result: Tensor = call.backward(tangent, rest)
        return result


def gradient(grad: Tensor, call: DrawnCall, rest: Any) -> Tensor:
    """``call.backward``, differentiable where that is asked for."""
    if torch.is_grad_enabled():
        return applied(_Again, grad, call, rest)
    return call.backward(grad, rest)


def run(
    function: type[DrawnMap],
    function_in_place: type[DrawnMapInPlace],
    x: Tensor,
    call: DrawnCall,
    inplace: bool,
) -> Tensor:
    """The eager call, differentiable where that is asked for."""
    if not inplace:
        return applied(function, x, call) if differentiated(x) else call.forward(x)[0]
    if dispatch.forward_mode():
        return x.copy_(applied(function, x, call))
    if torch.is_grad_enabled() and x.requires_grad:
        return applied(function_in_place, x, call)
    call.forward_(x)
    return written(x)
