"""Benchmark of dropout + residual + layer or RMS normalization against the steps one by one.

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
from collections.abc import Callable
from typing import Any

import torch

from . import calls
from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .timers import Call

P = 0.1
EPS = 1e-5

FORWARD = "forward"
BOTH = "forward+backward"
# Elements moved for each element of x.
MOVED = {FORWARD: 3, BOTH: 8}
OPS = ("dropout+add+LN", "dropout+add+RMS")

# Dropout's p is a multiple of 2^-16, off by 1e-5 of the scale at most; bfloat16 rounds the sum, the
# result and, in the steps one by one, what lies between.
_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}

_Norm = Callable[..., torch.Tensor]


def cases(options: Options) -> list[Case]:
    """The widths of well-known transformers in each dtype and mode, then a tiny one."""
    shapes = [(256, 768)] if options.quick else [(4096, 768), (4096, 1024), (2048, 4096)]
    large = [
        _case(op, shape, mode, dtype, options)
        for shape in shapes
        for dtype in options.dtypes
        for op in OPS
        for mode in MOVED
    ]
    tiny = [_case(op, (4, 16), BOTH, options.dtypes[0], options, host=True) for op in OPS]
    return [*large, *tiny]


def _case(
    op: str,
    shape: tuple[int, int],
    mode: str,
    dtype: torch.dtype,
    options: Options,
    host: bool = False,
) -> Case:
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    name = f"{shape[0]}x{shape[1]}"
    return Case(
        suite="dropout_norm",
        op=op,
        mode=mode,
        shape=f"host {name}" if host else name,
        dtype=dtype,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=0 if host else MOVED[mode] * size,
        # Inputs, gradients and results; what eager keeps between its steps; the check in float64.
        memory=16 * size + 80 * elements,
        setup=lambda: _setup(op == OPS[1], shape, mode, dtype, options),
        host=host,
    )


def _setup(
    rms: bool, shape: tuple[int, int], mode: str, dtype: torch.dtype, options: Options
) -> Workload:
    from fusereg import functional

    generator = torch.Generator(device=options.device).manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        t = torch.randn(sizes, generator=generator, device=options.device)
        return t.to(dtype)

    x, residual = random(*shape), random(*shape)
    weight = torch.ones_like(x[0])
    inputs = [x, residual, weight]
    if not rms:
        inputs.append(torch.zeros_like(weight))
    upstream = torch.randn(shape, generator=generator, device=options.device).to(dtype)

    def eager(x: torch.Tensor, residual: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        s = torch.nn.functional.dropout(x, P) + residual
        norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
        return norm(s, shape[1:], *affine, eps=EPS)

    fused: Any = functional.dropout_add_rms_norm if rms else functional.dropout_add_layer_norm

    def call_of(function: _Norm) -> Call:
        if mode == BOTH:
            return calls.forward_backward(function, *inputs, gradient=upstream)
        return calls.forward(function, *inputs)

    providers = [
        Provider(EAGER, lambda: call_of(eager)),
        Provider("torch.compile", lambda: call_of(calls.compiled(eager)), compiles=True),
        Provider("fusereg", lambda: call_of(lambda *t: fused(*t, p=P, eps=EPS))),
    ]
    check = _check_both if mode == BOTH else _check_forward
    return Workload(
        calls.affordable(providers, options), lambda call: check(rms, inputs, upstream, call)
    )


# ------------------------------------------------------------------------------------------ checks


def _check_forward(
    rms: bool, inputs: list[torch.Tensor], upstream: torch.Tensor, call: Call
) -> Accuracy:
    """The mask is not known, but rows come out with mean 0 and mean square 1."""
    y: Any = call()
    rows = y.double()
    error = float((rows.square().mean(-1) - 1).abs().max())
    if not rms:
        error = max(error, float(rows.mean(-1).abs().max()))
    return Accuracy(error, _TOLERANCE[y.dtype], "mean and variance of rows")


def _check_both(
    rms: bool, inputs: list[torch.Tensor], upstream: torch.Tensor, call: Call
) -> Accuracy:
    """Everything against float64, with the mask that the gradient of x shows."""
    y, *gradients = call()  # type: ignore[misc]
    kept = gradients[0] != 0
    exact = [t.detach().double().requires_grad_() for t in inputs]
    x, residual, *affine = exact
    s = torch.where(kept, x / (1 - P), 0.0) + residual
    norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
    wanted = norm(s, s.shape[-1:], *affine, eps=EPS)
    references = torch.autograd.grad(wanted, exact, upstream.double())
    error = 0.0
    for came, reference in zip((y, *gradients), (wanted, *references), strict=True):
        difference = float((came.detach().double() - reference.detach()).abs().max())
        error = max(error, difference / float(reference.detach().abs().max()))
    n = x.numel()
    deviation = abs(float(kept.double().mean()) - (1 - P)) / math.sqrt(P * (1 - P) / n)
    # By chance once in a billion; a tiny case says nothing about the rate.
    if n > 1000 and deviation > 6 + 1e-5 * math.sqrt(n / (P * (1 - P))):
        return Accuracy(math.inf, _TOLERANCE[y.dtype], "keep rate")
    return Accuracy(error, _TOLERANCE[y.dtype], "result and gradients")
