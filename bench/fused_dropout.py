"""Benchmark of dropout fused with its neighbours, against the unfused chain.

All at p = 0.1, on rows of 1024 elements, forward and forward + backward:

- ``bias_dropout_add``: ``residual + dropout(x + bias)``, with the gradients of all three.
- ``dropout_add``: ``residual + dropout(x)``.
- ``drop_path_add``: the same with one draw a row.
- ``relu``, ``gelu``, ``gelu_tanh``, ``silu``: ``dropout(f(x))``.

By contract a forward reads each operand and writes the result once: 3 elements moved for each
element of x, 2 for an activation. A backward reads the gradient and writes that of x (2), an
activation's also reads what was kept (3). Providers:

- ``eager``: the chain of torch's own operations.
- ``torch.compile``: the same, compiled.
- ``fusereg``: the one operation.

The ``host`` rows have 64 elements: what remains is the cost of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnF

from . import calls
from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .timers import Call

P = 0.1
COLUMNS = 1024
HOST_ELEMENTS = 64

FORWARD = "forward"
BOTH = "forward+backward"

# A p that is a multiple of 2^-16 is off by 1e-5 of the scale at most; eager rounds 16-bit types
# after each operation.
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def _drop_path(x: Tensor) -> Tensor:
    """As the unfused layers of model libraries do it."""
    keep = x.new_empty(x.shape[0], 1).bernoulli_(1 - P).div_(1 - P)
    return x * keep


@dataclass(frozen=True)
class Operation:
    """What is computed of (x, bias, residual), and how many elements that moves."""

    unfused: Callable[[Tensor, Tensor, Tensor], Tensor]
    fused: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    forward: int
    backward: int
    activation: Callable[[Tensor], Tensor] | None = None
    operands: int = 1

    def moved(self, mode: str) -> int:
        return self.forward + (self.backward if mode == BOTH else 0)


def _activation(name: str, f: Callable[[Tensor], Tensor]) -> Operation:
    return Operation(
        lambda x, b, r: nnF.dropout(f(x), P),
        lambda F, x, b, r: F.activation_dropout(x, P, name),
        forward=2,
        backward=3,
        activation=f,
    )


OPERATIONS: dict[str, Operation] = {
    "bias_dropout_add": Operation(
        lambda x, b, r: r + nnF.dropout(x + b, P),
        lambda F, x, b, r: F.bias_dropout_add(x, b, r, P),
        forward=3,
        backward=2,
        operands=3,
    ),
    "dropout_add": Operation(
        lambda x, b, r: r + nnF.dropout(x, P),
        lambda F, x, b, r: F.dropout_add(x, r, P),
        forward=3,
        backward=2,
        operands=2,
    ),
    "drop_path_add": Operation(
        lambda x, b, r: r + _drop_path(x),
        lambda F, x, b, r: F.drop_path_add(x, r, P),
        forward=3,
        backward=2,
        operands=2,
    ),
    "relu": _activation("relu", nnF.relu),
    "gelu": _activation("gelu", nnF.gelu),
    "gelu_tanh": _activation("gelu_tanh", lambda x: nnF.gelu(x, approximate="tanh")),
    "silu": _activation("silu", nnF.silu),
}


def cases(options: Options) -> list[Case]:
    """All operations at one size, the first also at a larger one, then a tiny one."""
    first = next(iter(OPERATIONS))
    size, elements = ("256K", 1 << 18) if options.quick else ("4M", 1 << 22)
    found = [
        _case(op, size, elements, mode, dtype, options)
        for op in OPERATIONS
        for dtype in options.dtypes
        for mode in (FORWARD, BOTH)
    ]
    if not options.quick:
        found += [
            _case(first, "16M", 1 << 24, mode, dtype, options)
            for dtype in options.dtypes
            for mode in (FORWARD, BOTH)
        ]
    host = f"host {HOST_ELEMENTS}"
    dtype = options.dtypes[0]
    return [
        *found,
        *(
            _case(op, host, HOST_ELEMENTS, mode, dtype, options, host=True)
            for op in (first, "relu")
            for mode in (FORWARD, BOTH)
        ),
    ]


def _case(
    op: str,
    name: str,
    elements: int,
    mode: str,
    dtype: torch.dtype,
    options: Options,
    host: bool = False,
) -> Case:
    size = elements * dtype.itemsize
    moved = OPERATIONS[op].moved(mode) * size
    return Case(
        suite="fused_dropout",
        op=op,
        mode=mode,
        shape=name,
        dtype=dtype,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=0 if host else moved,
        # Operands, gradients, results and what the chain keeps; the copy's buffers; the check.
        memory=14 * size + moved + 40 * elements,
        setup=lambda: _setup(op, elements, mode, dtype, options),
        host=host,
    )


def _setup(op: str, elements: int, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    generator = torch.Generator(device=options.device).manual_seed(0)
    columns = min(COLUMNS, elements)

    def make(*shape: int) -> Tensor:
        # Positive, so that what was dropped is seen.
        t = torch.empty(shape, dtype=dtype, device=options.device)
        return t.uniform_(0.5, 1.5, generator=generator)

    shape = (elements // columns, columns)
    tensors = (make(*shape), make(columns), make(*shape))
    providers = _providers(OPERATIONS[op], tensors, mode)
    return Workload(
        calls.affordable(providers, options), lambda call: _check(op, tensors, call, mode)
    )


# -------------------------------------------------------------------------------------- providers


def _providers(
    operation: Operation, tensors: tuple[Tensor, Tensor, Tensor], mode: str
) -> list[Provider]:
    from fusereg import functional

    def fused(x: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return operation.fused(functional, x, b, r)

    def call_of(function: Callable[..., Tensor]) -> Call:
        if mode != BOTH:
            return calls.forward(function, *tensors)
        wanted = {1: [0], 2: [0, 2], 3: [0, 2, 1]}[operation.operands]
        return calls.forward_backward(function, *tensors, wanted=wanted)

    unfused = operation.unfused
    return [
        Provider(EAGER, lambda: call_of(unfused)),
        Provider("torch.compile", lambda: call_of(calls.compiled(unfused)), compiles=True),
        Provider("fusereg", lambda: call_of(fused)),
    ]


# ------------------------------------------------------------------------------------------ checks


def _check(op: str, tensors: tuple[Tensor, Tensor, Tensor], call: Call, mode: str) -> Accuracy:
    """Kept elements are what they should be, about as many as p says; gradients fit the mask."""
    result: Any = call()
    y, *gradients = result if mode == BOTH else (result,)
    x, bias, residual = (t.double() for t in tensors)
    operation = OPERATIONS[op]
    tolerance = _TOLERANCE[tensors[0].dtype]
    if operation.activation is not None:
        kept, term, beside = y != 0, operation.activation(x), torch.zeros_like(x)
    else:
        # 16-bit sums may round back to the residual only where the term is far smaller than it.
        kept, beside = y != tensors[2], residual
        term = x + bias if operation.operands == 3 else x
    exact = beside + torch.where(kept, term / (1 - P), 0.0)
    error = float(((y.double() - exact) / exact.abs().clamp_min(1.0)).abs().max())
    drawn = kept[:, 0] if op == "drop_path_add" else kept
    n = drawn.numel()
    deviation = abs(float(drawn.double().mean()) - (1 - P)) / math.sqrt(P * (1 - P) / n)
    # By chance once in a billion; P itself is 1e-5 off where draws have 16 bits.
    if deviation > 6 + 1e-5 * math.sqrt(n / (P * (1 - P))):
        return Accuracy(math.inf, tolerance, "keep rate")
    if gradients:
        if not torch.equal(gradients[0] != 0, kept):
            return Accuracy(math.inf, tolerance, "gradient's mask")
        if operation.operands == 3:
            count = kept.double().sum(0) / (1 - P)
            off = (gradients[2].double() - count).abs() / count.clamp_min(1.0)
            error = max(error, float(off.max()))
    return Accuracy(error, tolerance, "kept elements")
