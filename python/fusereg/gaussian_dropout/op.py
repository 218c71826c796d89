"""Gaussian dropout as torch operations: calls of the kernels, autograd, torch.library, torch.func.

The noise is drawn again in backward from the call's (seed, offset) pair, and nothing else is kept.
The layers are those of ``core.draws``, and so is the order of the draws: memory's, as forward
walked x, or row-major under torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, distributed, draws, random
from ..core.operator import DrawnMap, DrawnMapInPlace, applied, run

OP = "gaussian_dropout"


class Call(NamedTuple):
    """A call's constants, in the order in which the kernels take them after the tensors."""

    seed: int | Tensor
    offset: int
    p: float
    index_offset: int
    op: str = OP

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        y = forward(self, x)
        return y, y.stride()

    def forward_(self, x: Tensor) -> tuple[int, ...]:
        _run(_C.gaussian_dropout_forward, x, x, self)
        return torch.empty_like(x, device="meta").stride()

    def backward(self, grad: Tensor, rest: Sequence[int]) -> Tensor:
        return backward(self, grad, rest)


# --- the kernels, on whatever tensors there are ---------------------------------------------------


def _run(kernel: Callable[..., int], y: Tensor, x: Tensor, call: Call) -> Tensor:
    """Writes into y, whatever the layouts; x's decides on the order of the draws."""
    if kernel(y, x, *call) == 0:
        return y
    plain = checks.plain(x, OP, "x")
    ready = torch.empty_like(plain).copy_(plain)
    if kernel(ready, ready, *call) != 0:
        raise RuntimeError(
            f"fusereg.{OP}: the kernel refused a prepared tensor; please report this"
        )
    return y.copy_(ready)


def forward(call: Call, x: Tensor) -> Tensor:
    return _run(_C.gaussian_dropout_forward, torch.empty_like(x), x, call)


def backward(call: Call, grad: Tensor, strides: Sequence[int]) -> Tensor:
    """The gradient of x, walked in the order in which forward walked x (its result's strides)."""
    grad = draws.laid_out(grad, strides)
    return _run(_C.gaussian_dropout_backward, torch.empty_like(grad), grad, call)


# --- eager autograd -------------------------------------------------------------------------------


class _GaussianDropout(DrawnMap):
    pass


class _GaussianDropoutInPlace(DrawnMapInPlace):
    pass


# --- torch.library --------------------------------------------------------------------------------

#: Untyped in torch.
_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Tensor], str], object] = dispatch.library.impl
_define("gaussian_dropout(Tensor x, Tensor seed, float p, SymInt index_offset) -> Tensor")
_define(
    "gaussian_dropout_backward(Tensor grad, Tensor seed, float p, SymInt index_offset,"
    " SymInt[] stride) -> Tensor"
)


def _op_forward(x: Tensor, seed: Tensor, p: float, index_offset: int) -> Tensor:
    return forward(Call(seed, 0, p, index_offset), x)


def _op_backward(
    grad: Tensor, seed: Tensor, p: float, index_offset: int, stride: Sequence[int]
) -> Tensor:
    return backward(Call(seed, 0, p, index_offset), grad, tuple(stride))


for _key in ("CPU", "CUDA"):
    _implement("gaussian_dropout", _op_forward, _key)
    _implement("gaussian_dropout_backward", _op_backward, _key)

torch.library.register_fake(
    "fusereg::gaussian_dropout", lambda x, *_: torch.empty_like(x), lib=dispatch.library
)
torch.library.register_fake(
    "fusereg::gaussian_dropout_backward",
    lambda grad, seed, p, index_offset, stride: grad.new_empty_strided(grad.shape, stride),
    lib=dispatch.library,
)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *ctx.constants = inputs
    ctx.constants.append(output.stride())
    ctx.save_for_backward(seed)


def _save_for_second_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *ctx.constants = inputs
    ctx.save_for_backward(seed)


def _op_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    gradient = torch.ops.fusereg.gaussian_dropout_backward(grad, seed, *ctx.constants)
    return gradient, None, None, None


def _second_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_op_gradient(ctx, grad), None


torch.library.register_autograd(
    "fusereg::gaussian_dropout",
    _op_gradient,
    setup_context=_save_for_gradient,
    lib=dispatch.library,
)
torch.library.register_autograd(
    "fusereg::gaussian_dropout_backward",
    _second_gradient,
    setup_context=_save_for_second_gradient,
    lib=dispatch.library,
)


# --- torch.func -----------------------------------------------------------------------------------


class _GaussianDropoutTransform(torch.autograd.Function):
    """Forward, and the linear map that backward is: one and the same, for a given pair."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float, index_offset: int) -> Tensor:
        # A sample of a batch may lie in any way, its gradient in another: row-major is for both.
        result: Tensor = torch.ops.fusereg.gaussian_dropout(x.contiguous(), seed, p, index_offset)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, seed, *ctx.constants = inputs
        ctx.save_for_backward(seed)
        ctx.save_for_forward(seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        return applied(_GaussianDropoutTransform, grad, seed, *ctx.constants), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (seed,) = ctx.saved_tensors
        return applied(_GaussianDropoutTransform, tangent, seed, *ctx.constants)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, seed: Tensor, p: float, index_offset: int
    ) -> tuple[Tensor, int]:
        # One call a sample: its draws start at index_offset, as they would alone.
        def sample(t: Tensor, dim: int | None, i: int) -> Tensor:
            return t if dim is None else t.select(dim, i)

        results = [
            applied(
                _GaussianDropoutTransform,
                sample(x, in_dims[0], i),
                sample(seed, in_dims[1], i),
                p,
                index_offset,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0


# --- the entry ------------------------------------------------------------------------------------


def check_probability(p: object, op: str, name: str = "p") -> None:
    checks.check_probability(p, op, name)
    if p == 1:
        raise ValueError(f"fusereg.{op}: p must be below 1, where the noise would be infinite")


def gaussian_dropout(
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
) -> Tensor:
    check_probability(p, OP)
    checks.check_input(x, OP)
    if not training or p == 0:
        return x
    if inplace:
        checks.check_in_place(x, OP)
    if distributed.is_dtensor(x):
        y = distributed.apply(
            x,
            seed,
            generator,
            index_offset,
            0,
            OP,
            lambda local, pair, first: gaussian_dropout(local, p, True, False, pair, None, first),
        )
        return x.copy_(y) if inplace else y
    if (
        not dispatch.eager()
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
    ):
        pair = random.operator_pair(x.device, seed, generator, OP)
        if dispatch.functorch():
            y = applied(_GaussianDropoutTransform, x, pair, float(p), index_offset)
        else:
            y = torch.ops.fusereg.gaussian_dropout(x, pair, float(p), index_offset)
        return x.copy_(y) if inplace else y

    checks.check_index_offset(index_offset, OP)
    numbers = random.eager_pair(x.device, seed, generator, OP)
    call = Call(*numbers, float(p), index_offset)
    return run(_GaussianDropout, _GaussianDropoutInPlace, x, call, inplace)
