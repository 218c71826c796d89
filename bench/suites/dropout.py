"""Benchmark of dropout, element by element, against torch's.

The work is ``y = keep ? x / (1 - p) : 0`` with p = 0.1 (16 bits an element; one bit where the
operation's name has p = 0.5), in three modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward out``: into memory that exists already (``out=``; torch has no such argument, so its
  providers do what they do above).
- ``forward+backward``: the result and the gradient of the input.

By contract a forward reads and writes each element once, and so does a backward: 8 bytes each, or 4
in bfloat16. Providers:

- ``eager``: ``torch.nn.functional.dropout``.
- ``torch.compile``: the same, compiled.
- ``clone``: drops nothing; the yardstick for memory that is allocated anew.
- ``fusereg``: ``fusereg.functional.dropout``.

A result above some 32 MB is fresh memory of the operating system at each call, and page faults
are most of the time for all providers: compare 4M with 16M, and ``forward`` with ``forward out``.
The ``host`` rows have 64 elements: what remains is the cost of a call, of the function and of the
layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusereg
from fusereg import functional as F

from ..harness import Case, Options, Workload
from ..harness.layers import (
    BOTH,
    FORWARD,
    OUT,
    Data,
    P,
    Work,
    check_kept,
    is_keep_rate,
    layer_cases,
    providers,
    timed,
    tolerances,
)

# Elements moved for each element of the input.
MOVED = {FORWARD: 2, OUT: 2, BOTH: 4}

LAYER = "nn.Dropout"
HALF = "dropout, p = 0.5"

# A p that is a multiple of 2^-16 is off by 1e-5 of the scale at most.
_TOLERANCE = tolerances(1e-5, 1e-5, 2e-3, 1.6e-2)


def cases(options: Options) -> list[Case]:
    """Return large tensors in each dtype and mode, then a tiny one for the host's share."""
    sizes = {"256K": 1 << 18} if options.quick else {"4M": 1 << 22, "16M": 1 << 24}
    works = [Work("dropout", (elements,), name=name) for name, elements in sizes.items()]
    works += [Work(HALF, (elements,), (FORWARD,), name=name) for name, elements in sizes.items()]
    works += [Work(op, (64,), (FORWARD, BOTH), host=True) for op in ("dropout", LAYER)]
    return layer_cases(options, works, MOVED, _setup)


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    x = Data(dtype, options).uniform(*work.shape)
    out = torch.empty_like(x) if mode == OUT else None
    p = 0.5 if work.op == HALF else P

    def eager(t: Tensor) -> Tensor:
        return nn.functional.dropout(t, p)

    def fused(t: Tensor) -> Tensor:
        return F.dropout(t, p, out=out)

    eager_function, fused_function = (
        (nn.Dropout(P), fusereg.nn.Dropout(P)) if work.op == LAYER else (eager, fused)
    )
    clone = "drops nothing" if mode == FORWARD and work.op != LAYER else ""
    return Workload(
        providers(eager_function, fused_function, timed(mode, x), clone=clone),
        lambda call: check_kept(
            x, call, _TOLERANCE[dtype], lambda kept: 1 - p if is_keep_rate(kept, p) else None
        ),
    )
