"""DropBlock: squares of a feature map are dropped."""

from __future__ import annotations

import torch

from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, kernel_check
from fusereg.cli.checks._masks import SEED, P, mask, result_and_gradients


@kernel_check("drop_block2d", "dropped ? 0 : x * numel / kept")
def _drop_block2d(inputs: Inputs) -> Pairs:
    n, c, h, w = (5, 29, 21, 37) if inputs.large else (3, 8, 9, 7)
    x = inputs.normal(n, c, h, w)
    gamma = P / 9 * (h * w) / ((h - 2) * (w - 2))
    corners = ~mask((n, c, h - 2, w - 2), gamma)
    padded = torch.nn.functional.pad(corners.float(), (2, 2, 2, 2))
    kept = torch.nn.functional.max_pool2d(padded, 3, 1) == 0
    return result_and_gradients(
        lambda t: functional.drop_block2d(t, P, 3, seed=SEED),
        lambda t: torch.where(kept, t * kept.numel() / kept.sum(), 0.0),
        [x],
    )
