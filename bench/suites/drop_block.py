"""Benchmark of DropBlock against the chain of torch operations that it replaces.

The work is ``drop_block2d(x, p=0.1, block_size=7)`` on a batch of 64 channels of 56 x 56, the first
stage of a ResNet at 224, and 28 x 28 channels_last. In two modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward+backward``: the result and the gradient of the input.

By contract a forward reads and writes each element once, and so does a backward; the corners are
drawn, not stored. Providers:

- ``eager``: Bernoulli corners, padded, max-pooled, inverted, multiplied, scaled by their count: the
  chain of torchvision's ``drop_block2d``, written here so that it need not be installed.
- ``torch.compile``: the same, compiled.
- ``clone``: drops nothing; the yardstick for memory that is allocated anew.
- ``fusereg``: ``fusereg.functional.drop_block2d``.

The ``host`` rows have one map of 8 x 8: what remains is the cost of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as torch_F

from fusereg import functional as F

from ..harness import Case, Options, Workload
from ..harness.layers import (
    BOTH,
    FORWARD,
    Data,
    P,
    Work,
    check_kept,
    layer_cases,
    providers,
    timed,
    tolerances,
)

OP, BLOCK = "drop_block2d", 7

# Elements moved for each element of the input.
MOVED = {FORWARD: 2, BOTH: 4}

# One multiplication, by a scale that the chain rounds to the dtype as well.
_TOLERANCE = tolerances(1e-5, 1e-5, 2e-3, 1.6e-2)


def cases(options: Options) -> list[Case]:
    """Return both layouts in each dtype and mode, then a tiny one."""
    batch = 2 if options.quick else 32
    last, name = torch.channels_last, f"{batch}x128x28x28 nhwc"
    works = [
        Work(OP, (batch, 64, 56, 56)),
        Work(OP, (batch, 128, 28, 28), name=name, layout=last),
        Work(OP, (1, 1, 8, 8), host=True),
    ]
    return layer_cases(options, works, MOVED, _setup)


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    x = Data(dtype, options).uniform(*work.shape, layout=work.layout)

    def fused(t: Tensor) -> Tensor:
        return F.drop_block2d(t, P, BLOCK)

    clone = "drops nothing" if mode == FORWARD else ""
    found = providers(_chain, fused, timed(mode, x), clone=clone)
    if x.numel() < 1000:  # where chance may drop everything
        return Workload(found)
    return Workload(found, lambda call: check_kept(x, call, _TOLERANCE[dtype], _divisor))


def _chain(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    gamma = P * (h * w) / (BLOCK**2 * (h - BLOCK + 1) * (w - BLOCK + 1))
    corners = torch.empty(
        (n, c, h - BLOCK + 1, w - BLOCK + 1), dtype=x.dtype, device=x.device
    ).bernoulli_(gamma)
    padded = torch_F.pad(corners, [BLOCK // 2] * 4)
    kept = 1 - torch_F.max_pool2d(padded, BLOCK, 1, BLOCK // 2)
    return x * kept * (kept.numel() / kept.sum(dtype=torch.float32)).to(x.dtype)


def _divisor(kept: Tensor) -> float | None:
    """Return the share of kept elements, by which they are divided, if it is about 1 - P."""
    share = float(kept.double().mean())
    return share if 1 - 2 * P < share < 1 - P / 2 else None
