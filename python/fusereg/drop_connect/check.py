"""Rows of the inventory: layers that drop weights.

Rows of x are unit vectors and images have one pixel that is 1, so that torch's product is exact and
shows the kernel's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.inventory import MATRICES, Inputs, Operation, Shape
from ..core.masks import SEED, P, dropped, mask_like
from . import functional


def _linear(inputs: Inputs, shape: Shape) -> list[Tensor]:
    x = torch.eye(shape[1], device=inputs.device, dtype=inputs.dtype)
    return [x, inputs.normal(*shape), inputs.normal(shape[0], seed=21)]


def _conv2d(inputs: Inputs, shape: Shape) -> list[Tensor]:
    outputs, channels = shape
    x = torch.zeros(channels, channels, 5, 5, device=inputs.device, dtype=inputs.dtype)
    x[range(channels), range(channels), 2, 2] = 1.0
    return [x, inputs.normal(outputs, channels, 3, 3)]


OPERATIONS = [
    Operation(
        name="drop_connect_linear",
        formula="x (keep ? W / (1 - p) : 0)^T + b",
        function=functional.drop_connect_linear,
        shapes={k: v for k, v in MATRICES.items() if k != "empty"},
        tensors=_linear,
        arguments=("x", "weight", "bias"),
        options={"p": P, "seed": SEED},
        reference=lambda x, w, b: torch.nn.functional.linear(x, dropped(w, mask_like(w)), b),
        constants=("x",),
    ),
    Operation(
        name="drop_connect_conv2d",
        formula="conv2d(x, keep ? W / (1 - p) : 0)",
        function=functional.drop_connect_conv2d,
        shapes={"tiny": (2, 1), "small": (9, 5), "large": (61, 43), "one element": (1, 1)},
        tensors=_conv2d,
        arguments=("x", "weight"),
        options={"p": P, "seed": SEED},
        reference=lambda x, w: torch.nn.functional.conv2d(x, dropped(w, mask_like(w))),
        constants=("x",),
    ),
]
