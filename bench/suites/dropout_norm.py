"""Benchmark of dropout + residual + layer or RMS normalization against the unfused steps.

The work is ``y = norm(residual + dropout(x, p=0.1)) * weight + bias`` over the last dimension, in
two modes: ``forward`` (nothing kept for backward) and ``forward+backward`` (the result and the
gradients of x, residual, weight and bias). By contract a forward reads x and residual and writes y,
three elements each; with a backward it writes the sum as well, and backward reads the gradient and
the sum and writes two gradients, eight in all. Providers:

- ``eager``: ``F.dropout``, an addition, ``F.layer_norm`` or ``F.rms_norm``.
- ``torch.compile``: the same, compiled.
- ``fusereg``: ``fusereg.functional.dropout_add_layer_norm`` and ``dropout_add_rms_norm``.

Weight and bias have x's dtype. The ``host`` rows have 4 rows of 16 elements: what remains is the
cost of a call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_F

from fusereg import functional as F

from ..harness import Accuracy, Call, Case, Options, Workload
from ..harness.layers import (
    BOTH,
    FORWARD,
    Data,
    P,
    Work,
    is_keep_rate,
    layer_cases,
    providers,
    relative_error,
    results,
    timed,
    tolerances,
)

EPS = 1e-5

# Elements moved for each element of x.
MOVED = {FORWARD: 3, BOTH: 8}
RMS = "dropout+add+RMS"
OPS = ("dropout+add+LN", RMS)

# Dropout's p is a multiple of 2^-16, off by 1e-5 of the scale at most; bfloat16 rounds the sum, the
# result and, in the unfused steps, what lies between.
_TOLERANCE = tolerances(1e-4, 1e-4, 1e-2, 6e-2)


def cases(options: Options) -> list[Case]:
    """Return the widths of well-known transformers in each dtype and mode, then a tiny one."""
    shapes = [(256, 768)] if options.quick else [(4096, 768), (4096, 1024), (2048, 4096)]
    works = [Work(op, shape) for shape in shapes for op in OPS]
    works += [Work(op, (4, 16), (BOTH,), host=True) for op in OPS]
    return layer_cases(options, works, MOVED, _setup)


def _norm(op: str, s: Tensor, *affine: Tensor) -> Tensor:
    norm: Any = torch_F.rms_norm if op == RMS else torch_F.layer_norm
    y: Tensor = norm(s, s.shape[-1:], *affine, eps=EPS)
    return y


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    op, data = work.op, Data(dtype, options)
    x, residual, upstream = (data.normal(*work.shape) for _ in range(3))
    weight = torch.ones_like(x[0])
    inputs = [x, residual, weight] + ([] if op == RMS else [torch.zeros_like(weight)])
    function: Any = F.dropout_add_rms_norm if op == RMS else F.dropout_add_layer_norm

    def eager(x: Tensor, residual: Tensor, *affine: Tensor) -> Tensor:
        return _norm(op, torch_F.dropout(x, P) + residual, *affine)

    def fused(*tensors: Tensor) -> Tensor:
        y: Tensor = function(*tensors, p=P, eps=EPS)
        return y

    return Workload(
        providers(eager, fused, timed(mode, *inputs, gradient=upstream)),
        lambda call: _check(op, inputs, upstream, call),
    )


def _check(op: str, inputs: list[Tensor], upstream: Tensor, call: Call) -> Accuracy:
    """Check everything against float64, with the mask that the gradient of x shows."""
    y, *gradients = results(call)
    tolerance = _TOLERANCE[y.dtype]
    if not gradients:  # the mask is not known, but rows have mean 0 and mean square 1
        rows = y.double()
        error = float((rows.square().mean(-1) - 1).abs().max())
        if op != RMS:
            error = max(error, float(rows.mean(-1).abs().max()))
        return Accuracy(error, tolerance, "mean and variance of rows")
    kept = gradients[0] != 0
    if not is_keep_rate(kept):
        return Accuracy(math.inf, tolerance, "keep rate")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    x, residual, *affine = exact
    wanted = _norm(op, torch.where(kept, x / (1 - P), 0.0) + residual, *affine)
    references = torch.autograd.grad(wanted, exact, upstream.double())
    error = relative_error((y, *gradients), (wanted.detach(), *references))
    return Accuracy(error, tolerance, "result and gradients")
