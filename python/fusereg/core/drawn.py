"""Operations that a Philox state determines: linear maps that backward draws a second time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import checks, dispatch, distributed, random
from .operator import (
    Kernel,
    Operator,
    in_strides,
    keep,
    keep_state,
    kept,
    strides_of_result,
    through_copy,
)
from .random import Source


class DrawnOperator(Operator):
    """A linear map that (seed, offset) draws: y = m x elementwise, for rows, or plus a constant.

    Nothing is kept for backward but the Philox state: the map is drawn a second time. (Usual calls
    on few elements keep the factors that the kernel draws; see ``_C.drawn_apply``.) It is its own
    transpose, so it is gradient, tangent and every further derivative too. Element i of the memory
    of ``torch.empty_like(x)`` has draw ``index_offset + i``.

    Its kernels are ``<name>_forward`` and ``<name>_backward`` of ``_C``, looked up at each call and
    called with (y, x, seed, offset, *constants, op); they return 0, or something else where x's
    layout is not supported.

    Args:
        name: the operator's name; its backward is ``<name>_backward``.
        constants: the schema's part after ``Tensor x, Tensor seed``; ``float p``, with which 0
            leaves x as it is, comes first and ``index_offset`` last.
        supported: ``supported(x, *constants)``: a new tensor of x's shape whose layout is.
    """

    def __init__(
        self,
        name: str,
        constants: str,
        *,
        supported: Callable[..., Tensor] = lambda x, *_: torch.empty_like(x),
    ) -> None:
        count = constants.count(",") + 1
        names = f"{name}_forward", f"{name}_backward"

        def copied(kernel: Kernel, y: Tensor, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
            return through_copy(kernel, y, x, rest, lambda x: supported(x, *rest[2:]))

        def forward(x: Tensor, seed: Any, *constants: Any, out: Tensor | None = None) -> Tensor:
            y = torch.empty_like(x) if out is None else out
            if constants[0] == 0.0:
                return y.copy_(x)
            if len(constants) == count:
                constants = (*constants, name)
            rest = (*seed, *constants) if type(seed) is tuple else (seed, 0, *constants)
            kernel = getattr(_C, names[0])
            return y if kernel(y, x, *rest) == 0 else copied(kernel, y, x, rest)

        def backward(grad: Tensor, seed: Any, *constants: Any) -> Tensor:
            grad = in_strides(grad, tuple(constants[count]))
            y = torch.empty_like(grad)
            if constants[0] == 0.0:
                return y.copy_(grad)
            op = constants[count + 1 :] or (name,)
            state = seed if type(seed) is tuple else (seed, 0)
            rest = (*state, *constants[:count], *op)
            kernel = getattr(_C, names[1])
            return y if kernel(y, grad, *rest) == 0 else copied(kernel, y, grad, rest)

        def save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
            stride = strides_of_result(args[0]) if y is args[0] else y.stride()
            # One attribute: each costs small tensors a tenth of a microsecond.
            ctx.rest = (*args[1 : count + 2], stride, *args[count + 2 :])
            if type(args[1]) is not tuple:
                keep(ctx, args[1])
                ctx.rest = (None, *ctx.rest[1:])

        def gradient(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor]:
            rest = ctx.rest
            if rest[0] is None:
                rest = (*ctx.saved_tensors, *rest[1:])
            return (self.backward(grad, *rest),)

        def save_linear(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
            _, ctx.state, *ctx.constants = args
            keep_state(ctx)

        def gradient_of_gradient(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor]:
            return (self.backward(grad, *kept(ctx), *ctx.constants),)

        super().__init__(
            f"{name}(Tensor x, Tensor seed, {constants}) -> Tensor",
            forward,
            fake=lambda x, *_: torch.empty_like(x),
            save=save,
            gradient=gradient,
            tangent=lambda *args: gradient(*args)[0],
            row_major=True,
            linear=True,
        )
        # Its ctx.rest is (state, *constants, strides of the result, op).
        self.compile(getattr(_C, f"{name}_functions"))
        #: ``draw_at_once((*constants, op), x)``: y of a usual call, or None.
        self.draw_at_once = functools.partial(
            _C.drawn_at_once, _C.drawn_apply(self._function.forward, self.apply), forward, "x"
        )
        self.backward = Operator(
            f"{name}_backward(Tensor grad, Tensor seed, {constants}, SymInt[] stride) -> Tensor",
            backward,
            fake=lambda grad, seed, *rest: grad.new_empty_strided(grad.shape, rest[-1]),
            save=save_linear,
            gradient=gradient_of_gradient,
            tangent=lambda *args: gradient_of_gradient(*args)[0],
            row_major=True,
            linear=True,
        )

    def draw(
        self,
        x: Tensor,
        constants: tuple[Any, ...],
        source: Source,
        op: str,
        target: Tensor | None = None,
        rows: int = 0,
    ) -> Tensor:
        """Draw the map for x, whose arguments are checked.

        Args:
            x: any tensor.
            constants: those of the schema.
            source: where the Philox state comes from.
            op: the name that errors show.
            target: what is written: x itself to work in place, ``out``, or None for a new tensor.
            rows: how many leading dimensions have a draw of their own; 0: every element.
        """
        checks.check_index_offset(constants[-1], op)
        if distributed.is_dtensor(x):
            *before, first = constants
            y = distributed.drawn(
                x,
                source,
                first,
                rows,
                op,
                lambda local, seed, first: self.draw(
                    local, (*before, first), Source(seed), op, None, rows
                ),
            )
            return y if target is None else target.copy_(y)
        if not dispatch.direct(x):
            y = self.traced(x, random.traced_state(x, source, op), *constants)
            return y if target is None else target.copy_(y)
        args = (x, random.eager_state(x, source, op), *constants, op)
        return self.eager(*args) if target is None else self.to(target, *args)
