"""Benchmark of Gaussian dropout against the chain of torch operations that it replaces.

The work is ``y = x * (1 + sqrt(p / (1 - p)) * n)`` with p = 0.1 and normal n, in two modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward+backward``: the result and the gradient of the input.

By contract a forward reads and writes each element once, and so does a backward. Providers:

- ``eager``: ``x * (1 + s * torch.randn_like(x))``, which keeps the noise for backward.
- ``torch.compile``: the same, compiled.
- ``clone``: no noise at all, but the yardstick for memory that is allocated anew.
- ``fusereg``: ``fusereg.functional.gaussian_dropout``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import calls
from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .timers import Call

P = 0.1
STRENGTH = math.sqrt(P / (1 - P))

FORWARD = "forward"
BOTH = "forward+backward"

# Elements moved for each element of the input.
MOVED = {FORWARD: 2, BOTH: 4}


def cases(options: Options) -> list[Case]:
    """One size in each dtype and mode."""
    sizes = {"256K": 1 << 18} if options.quick else {"4M": 1 << 22}
    return [
        _case(name, elements, mode, dtype, options)
        for name, elements in sizes.items()
        for dtype in options.dtypes
        for mode in MOVED
    ]


def _case(name: str, elements: int, mode: str, dtype: torch.dtype, options: Options) -> Case:
    size = elements * dtype.itemsize
    return Case(
        suite="gaussian_dropout",
        op="gaussian_dropout",
        mode=mode,
        shape=name,
        dtype=dtype,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=MOVED[mode] * size,
        # Input, gradient, result, the chain's noise and its products; the check.
        memory=(8 + MOVED[mode]) * size + 40 * elements,
        setup=lambda: _setup(elements, mode, dtype, options),
        host=False,
    )


def _setup(elements: int, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    x = torch.ones(elements, dtype=dtype, device=options.device)  # the noise is seen as it is
    providers = _providers(x, calls.forward if mode == FORWARD else calls.forward_backward)
    return Workload(calls.affordable(providers, options), lambda call: _check(x, call, mode))


# -------------------------------------------------------------------------------------- providers


def _chain(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + STRENGTH * torch.randn_like(x))


def _providers(x: torch.Tensor, timed: Callable[..., Call]) -> list[Provider]:
    from fusereg import functional

    def fused(t: torch.Tensor) -> torch.Tensor:
        return functional.gaussian_dropout(t, P)

    found = [
        Provider(EAGER, lambda: timed(_chain, x)),
        Provider("torch.compile", lambda: timed(calls.compiled(_chain), x), compiles=True),
        Provider("fusereg", lambda: timed(fused, x)),
    ]
    if timed is calls.forward:
        note = "a yardstick: adds no noise"
        found.insert(2, Provider("clone", lambda: timed(torch.clone, x), note=note))
    return found


# ------------------------------------------------------------------------------------------ checks


def _check(x: torch.Tensor, call: Call, mode: str) -> Accuracy:
    """Mean and deviation of the noise, in units of the latter; the gradient has the same noise."""
    result: Any = call()
    y, gradient = result if mode == BOTH else (result, None)
    # By chance once in a billion; beyond, what 16 bits of a number near 1 leave of the noise.
    tolerance = 6 / math.sqrt(x.numel()) + 2 * torch.finfo(x.dtype).eps
    if torch.equal(y, x):
        return Accuracy(0.0, tolerance, "copy")
    noise = y.double() - 1
    error = max(abs(float(noise.mean())), abs(float(noise.std()) - STRENGTH)) / STRENGTH
    if gradient is not None and not torch.equal(gradient, y):
        return Accuracy(math.inf, tolerance, "gradient's noise")
    return Accuracy(error, tolerance, "mean and deviation")
