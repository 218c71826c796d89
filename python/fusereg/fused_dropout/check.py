"""Rows of the inventory: dropout together with a bias, a residual or an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.inventory import ANY_SHAPE, MATRICES, Inputs, Operation, Shape
from ..core.masks import SEED, P, dropped, mask_like, mask_of_rows
from . import functional

_F: Any = torch.nn.functional


def _two(inputs: Inputs, shape: Shape) -> list[Tensor]:
    return [inputs.normal(*shape), inputs.normal(*shape, seed=21)]


def _with_bias(inputs: Inputs, shape: Shape) -> list[Tensor]:
    x, residual = _two(inputs, shape)
    return [x, inputs.normal(shape[-1], seed=22), residual]


#: Forward mode over reverse mode.
_SEEDED = {"p": P, "seed": SEED}
_ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("dropout(max(x, 0))", torch.relu),
    "gelu": ("dropout(x * Phi(x))", _F.gelu),
    "gelu_tanh": ("the tanh form of it", lambda x: _F.gelu(x, approximate="tanh")),
    "silu": ("dropout(x / (1 + exp(-x)))", _F.silu),
}


def _activated(name: str) -> Operation:
    formula, f = _ACTIVATIONS[name]
    return Operation(
        name="activation_dropout" if name == "relu" else f"activation_dropout, {name}",
        formula=formula,
        function=functional.activation_dropout,
        options={**_SEEDED, "activation": name},
        reference=lambda x: dropped(f(x), mask_like(x)),
        refuses={} if name == "relu" else {"in place": "overwrites x, which its gradient needs"},
    )


OPERATIONS = [
    Operation(
        name="bias_dropout_add",
        formula="residual + dropout(x + bias)",
        function=functional.bias_dropout_add,
        shapes=MATRICES,
        tensors=_with_bias,
        arguments=("x", "bias", "residual"),
        options=_SEEDED,
        reference=lambda x, b, r: r + dropped(x + b, mask_like(x)),
    ),
    Operation(
        name="dropout_add",
        formula="residual + dropout(x)",
        function=functional.dropout_add,
        shapes=ANY_SHAPE,
        tensors=_two,
        arguments=("x", "residual"),
        options=_SEEDED,
        reference=lambda x, r: r + dropped(x, mask_like(x)),
    ),
    Operation(
        name="drop_path_add",
        formula="residual + x for each row kept",
        function=functional.drop_path_add,
        shapes=MATRICES,
        tensors=_two,
        arguments=("x", "residual"),
        options=_SEEDED,
        reference=lambda x, r: r + dropped(x, mask_of_rows(x, 1)),
    ),
    *(_activated(name) for name in _ACTIVATIONS),
]
