"""Rows of the inventory: DropBlock, which drops squares of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.inventory import IMAGES, Operation
from ..core.masks import SEED, P, mask
from . import functional


def _reference(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    side = min(3, h, w)
    rows, columns = h - side + 1, w - side + 1
    gamma = min(1.0, P / side**2 * (h * w) / (rows * columns))
    corners = ~mask((n, c, rows, columns), gamma)
    padded = torch.nn.functional.pad(corners.float(), (side - 1,) * 4)
    kept = torch.nn.functional.max_pool2d(padded, side, 1) == 0
    return torch.where(kept, x * kept.numel() / kept.sum().clamp_min(1), 0.0)


OPERATIONS = [
    Operation(
        name="drop_block2d",
        formula="dropped ? 0 : x * numel / kept",
        function=functional.drop_block2d,
        shapes={**IMAGES, "tiny": (2, 2, 4, 5), "small": (3, 8, 9, 7)},
        options={"p": P, "block_size": 3, "seed": SEED},
        reference=_reference,
    )
]
