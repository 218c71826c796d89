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
- ``clone``: drops nothing, but the yardstick for memory that is allocated anew.
- ``fusereg``: ``fusereg.functional.drop_block2d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as torch_functional

from . import calls
from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .timers import Call

P = 0.1
BLOCK = 7

FORWARD = "forward"
BOTH = "forward+backward"

# Elements moved for each element of the input.
MOVED = {FORWARD: 2, BOTH: 4}

# One multiplication, by a scale that the chain rounds to the dtype as well.
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def cases(options: Options) -> list[Case]:
    """Both layouts in each dtype and mode."""
    batch = 2 if options.quick else 32
    layouts = {
        f"{batch}x64x56x56": ((batch, 64, 56, 56), torch.contiguous_format),
        f"{batch}x128x28x28 nhwc": ((batch, 128, 28, 28), torch.channels_last),
    }
    return [
        _case(name, shape, layout, mode, dtype, options)
        for name, (shape, layout) in layouts.items()
        for dtype in options.dtypes
        for mode in MOVED
    ]


def _case(
    name: str,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    mode: str,
    dtype: torch.dtype,
    options: Options,
) -> Case:
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    return Case(
        suite="drop_block",
        op="drop_block2d",
        mode=mode,
        shape=name,
        dtype=dtype,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=MOVED[mode] * size,
        # Input, gradient, result, the chain's masks (two padded) and products; the check.
        memory=(10 + MOVED[mode]) * size + 24 * elements,
        setup=lambda: _setup(shape, layout, mode, dtype, options),
        host=False,
    )


def _setup(
    shape: tuple[int, ...],
    layout: torch.memory_format,
    mode: str,
    dtype: torch.dtype,
    options: Options,
) -> Workload:
    generator = torch.Generator(device=options.device).manual_seed(0)
    x = torch.empty(shape, dtype=dtype, device=options.device, memory_format=layout)
    x.uniform_(0.5, 1.5, generator=generator)  # no zeros, so that what was dropped is seen
    providers = _providers(x, calls.forward if mode == FORWARD else calls.forward_backward)
    return Workload(calls.affordable(providers, options), lambda call: _check(x, call, mode))


# -------------------------------------------------------------------------------------- providers


def _chain(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    gamma = P * (h * w) / (BLOCK**2 * (h - BLOCK + 1) * (w - BLOCK + 1))
    corners = torch.empty(
        (n, c, h - BLOCK + 1, w - BLOCK + 1), dtype=x.dtype, device=x.device
    ).bernoulli_(gamma)
    padded = torch_functional.pad(corners, [BLOCK // 2] * 4)
    kept = 1 - torch_functional.max_pool2d(padded, BLOCK, 1, BLOCK // 2)
    return x * kept * (kept.numel() / kept.sum(dtype=torch.float32)).to(x.dtype)


def _providers(x: torch.Tensor, timed: Callable[..., Call]) -> list[Provider]:
    from fusereg import functional

    def fused(t: torch.Tensor) -> torch.Tensor:
        return functional.drop_block2d(t, P, BLOCK)

    found = [
        Provider(EAGER, lambda: timed(_chain, x)),
        Provider("torch.compile", lambda: timed(calls.compiled(_chain), x), compiles=True),
        Provider("fusereg", lambda: timed(fused, x)),
    ]
    if timed is calls.forward:
        note = "a yardstick: drops nothing"
        found.insert(2, Provider("clone", lambda: timed(torch.clone, x), note=note))
    return found


# ------------------------------------------------------------------------------------------ checks


def _check(x: torch.Tensor, call: Call, mode: str) -> Accuracy:
    """Kept elements are scaled by their count, about 1 - p, and the gradient has the mask."""
    result: Any = call()
    y, gradient = result if mode == BOTH else (result, None)
    tolerance = _TOLERANCE[x.dtype]
    if torch.equal(y, x):
        return Accuracy(0.0, tolerance, "copy")
    kept = y != 0
    share = float(kept.double().mean())
    exact = x[kept].double() / share
    error = float(((y[kept].double() - exact) / exact).abs().max())
    if not 1 - 2 * P < share < 1 - P / 2:
        return Accuracy(math.inf, tolerance, "share of kept elements")
    if gradient is not None and not torch.equal(gradient != 0, kept):
        return Accuracy(math.inf, tolerance, "gradient's mask")
    return Accuracy(error, tolerance, "kept elements")
