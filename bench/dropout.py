"""Benchmark of dropout, element by element, against torch's.

The work is ``y = keep ? x / (1 - p) : 0`` with p = 0.1, in three modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward out``: into memory that is there already (``out=``; torch has no such argument, so its
  providers do what they do above).
- ``forward+backward``: the result and the gradient of the input.

By contract a forward reads and writes each element once, and so does a backward: 8 bytes each, or 4
in bfloat16. Providers:

- ``eager``: ``torch.nn.functional.dropout``.
- ``torch.compile``: the same, compiled.
- ``clone``: no dropout at all, but the yardstick for memory that is allocated anew.
- ``fusereg``: ``fusereg.functional.dropout``.

A result above some 32 MB is fresh memory of the operating system at each call, and page faults
are most of the time on all sides: compare 4M with 16M, and ``forward`` with ``forward out``. The
``host`` rows have 64 elements: what remains is the cost of a call.
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

FORWARD = "forward"
OUT = "forward out"
BOTH = "forward+backward"

# Elements moved for each element of the input.
MOVED = {FORWARD: 2, OUT: 2, BOTH: 4}
CLONE = "clone"

HOST_ELEMENTS = 64

# A p that is a multiple of 2^-16 is off by 1e-5 of the scale at most.
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def cases(options: Options) -> list[Case]:
    """Large tensors in each dtype and mode, then a tiny one for the host's share."""
    sizes = {"256K": 1 << 18} if options.quick else {"4M": 1 << 22, "16M": 1 << 24}
    large = [
        _case(name, elements, mode, dtype, options)
        for name, elements in sizes.items()
        for dtype in options.dtypes
        for mode in MOVED
    ]
    host = f"host {HOST_ELEMENTS}"
    return [
        *large,
        *(
            _case(host, HOST_ELEMENTS, mode, options.dtypes[0], options, host=True)
            for mode in (FORWARD, BOTH)
        ),
    ]


def _case(
    name: str,
    elements: int,
    mode: str,
    dtype: torch.dtype,
    options: Options,
    host: bool = False,
) -> Case:
    size = elements * dtype.itemsize
    moved = MOVED[mode] * size
    return Case(
        suite="dropout",
        op="dropout",
        mode=mode,
        shape=name,
        dtype=dtype,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=0 if host else moved,
        # Input, gradient, result, torch's mask and its product; the copy's buffers; the check.
        memory=6 * size + moved + 24 * elements,
        setup=lambda: _setup(elements, mode, dtype, options),
        host=host,
    )


def _setup(elements: int, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    generator = torch.Generator(device=options.device).manual_seed(0)
    x = torch.empty(elements, dtype=dtype, device=options.device)
    x.uniform_(0.5, 1.5, generator=generator)  # no zeros, so that what was dropped is seen
    makers: dict[str, Callable[[torch.Tensor], list[Provider]]] = {
        FORWARD: _forward_providers,
        OUT: _out_providers,
        BOTH: _both_providers,
    }
    providers = makers[mode](x)
    return Workload(calls.affordable(providers, options), lambda call: _check(x, call, mode))


# -------------------------------------------------------------------------------------- providers


def _eager(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, P)


def _forward_providers(x: torch.Tensor) -> list[Provider]:
    from fusereg import functional

    return [
        Provider(EAGER, lambda: calls.forward(_eager, x)),
        Provider("torch.compile", lambda: calls.forward(calls.compiled(_eager), x), compiles=True),
        Provider(CLONE, lambda: calls.forward(torch.clone, x), note="a yardstick: drops nothing"),
        Provider("fusereg", lambda: calls.forward(lambda t: functional.dropout(t, P), x)),
    ]


def _out_providers(x: torch.Tensor) -> list[Provider]:
    from fusereg import functional

    def own() -> Call:
        out = torch.zeros_like(x)
        return calls.forward(lambda t: functional.dropout(t, P, out=out), x)

    eager, compiled, *_ = _forward_providers(x)
    return [eager, compiled, Provider("fusereg", own)]


def _both_providers(x: torch.Tensor) -> list[Provider]:
    from fusereg import functional

    def both(function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        return calls.forward_backward(function, x)

    return [
        Provider(EAGER, lambda: both(_eager)),
        Provider("torch.compile", lambda: both(calls.compiled(_eager)), compiles=True),
        Provider("fusereg", lambda: both(lambda t: functional.dropout(t, P))),
    ]


# ------------------------------------------------------------------------------------------ checks


def _check(x: torch.Tensor, call: Call, mode: str) -> Accuracy:
    """Kept elements are x / (1 - p), about as many as p says; the gradient has the same mask."""
    result: Any = call()
    y, gradient = result if mode == BOTH else (result, None)
    tolerance = _TOLERANCE[x.dtype]
    if torch.equal(y, x):
        return Accuracy(0.0, tolerance, "copy")
    kept = y != 0
    exact = x[kept].double() / (1 - P)
    error = float(((y[kept].double() - exact) / exact).abs().max())
    n = x.numel()
    deviation = abs(float(kept.double().mean()) - (1 - P)) / math.sqrt(P * (1 - P) / n)
    # By chance once in a billion; P itself is 1e-5 off where draws have 16 bits.
    if deviation > 6 + 1e-5 * math.sqrt(n / (P * (1 - P))):
        return Accuracy(math.inf, tolerance, "keep rate")
    if gradient is not None and not torch.equal(gradient != 0, kept):
        return Accuracy(math.inf, tolerance, "gradient's mask")
    return Accuracy(error, tolerance, "kept elements")
