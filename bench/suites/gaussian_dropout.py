"""Benchmark of Gaussian dropout against the chain of torch operations that it replaces.

The work is ``y = x * (1 + sqrt(p / (1 - p)) * n)`` with p = 0.1 and normal n, in two modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward+backward``: the result and the gradient of the input.

By contract a forward reads and writes each element once, and so does a backward. Providers:

- ``eager``: ``x * (1 + s * torch.randn_like(x))``, which keeps the noise for backward.
- ``torch.compile``: the same, compiled.
- ``clone``: adds no noise; the yardstick for memory that is allocated anew.
- ``fusereg``: ``fusereg.functional.gaussian_dropout``.

The ``host`` rows have 64 elements: what remains is the cost of a call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusereg import functional as F

from ..harness import Accuracy, Call, Case, Options, Workload, largest
from ..harness.layers import BOTH, FORWARD, P, Work, layer_cases, providers, results, timed

OP = "gaussian_dropout"
STRENGTH = math.sqrt(P / (1 - P))

# Elements moved for each element of the input.
MOVED = {FORWARD: 2, BOTH: 4}


def cases(options: Options) -> list[Case]:
    """Return one size in each dtype and mode, then a tiny one."""
    name, elements = ("256K", 1 << 18) if options.quick else ("4M", 1 << 22)
    works = [Work(OP, (elements,), name=name), Work(OP, (64,), host=True)]
    return layer_cases(options, works, MOVED, _setup)


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    x = torch.ones(work.shape, dtype=dtype, device=options.device)  # the result is 1 + noise

    def eager(t: Tensor) -> Tensor:
        return t * (1 + STRENGTH * torch.randn_like(t))

    def fused(t: Tensor) -> Tensor:
        return F.gaussian_dropout(t, P)

    clone = "adds no noise" if mode == FORWARD else ""
    return Workload(
        providers(eager, fused, timed(mode, x), clone=clone), lambda call: _check(x, call)
    )


def _check(x: Tensor, call: Call) -> Accuracy:
    """Check mean and deviation of the noise, relative to the latter, and that of the gradient."""
    y, *gradients = results(call)
    # By chance once in a billion; beyond, what 16 bits of a number near 1 leave of the noise.
    tolerance = 6 / math.sqrt(x.numel()) + 2 * torch.finfo(x.dtype).eps
    if torch.equal(y, x):
        return Accuracy(0.0, tolerance, "copy")
    if gradients and not torch.equal(gradients[0], y):
        return Accuracy(math.inf, tolerance, "gradient's noise")
    noise = y.double() - 1
    error = largest([noise.mean().abs(), (noise.std() - STRENGTH).abs()]) / STRENGTH
    return Accuracy(error, tolerance, "mean and deviation")
