"""What providers of layers are timed by: a forward pass, forward and backward, a compiled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Options, Provider
from .timers import Call


def compiled(function: Callable[..., Any]) -> Any:
    """By torch.compile, alone: what an earlier case compiled must not make this look short."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """Without autograd."""

    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def forward_backward(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    wanted: Sequence[int] | None = None,
    gradient: Tensor | None = None,
) -> Call:
    """The result, and from its gradient (None: ones) those of the ``wanted`` inputs (None: all)."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs
    ]
    chosen = leaves if wanted is None else [leaves[i] for i in wanted]
    upstream = torch.ones_like(leaves[0]) if gradient is None else gradient

    def call() -> object:
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, chosen, upstream)

    return call


def affordable(providers: Sequence[Provider], options: Options) -> list[Provider]:
    """``--quick`` leaves out what has to be compiled first."""
    return [p for p in providers if not (options.quick and p.compiles)]
