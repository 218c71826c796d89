"""Benchmark of dropout fused with its neighbors, against the unfused chain.

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

import torch
from torch import Tensor
from torch.nn import functional as torch_F

from fusereg import functional as F

from ..harness import Accuracy, Call, Case, Options, Workload, largest
from ..harness.layers import (
    BOTH,
    FORWARD,
    Data,
    Function,
    P,
    Work,
    is_keep_rate,
    layer_cases,
    providers,
    results,
    timed,
    tolerances,
)

COLUMNS = 1024

# A p that is a multiple of 2^-16 is off by 1e-5 of the scale at most; eager rounds 16-bit types
# after each operation.
_TOLERANCE = tolerances(1e-5, 1e-5, 4e-3, 3e-2)


def _drop_path(x: Tensor) -> Tensor:
    """Apply stochastic depth as the unfused layers of model libraries do."""
    keep = x.new_empty(x.shape[0], 1).bernoulli_(1 - P).div_(1 - P)
    return x * keep


@dataclass(frozen=True)
class Operation:
    """A function of (x, bias, residual), unfused and fused.

    Attributes:
        forward, backward: Elements moved for each element of x.
        wanted: The operands that have gradients, by their places in (x, bias, residual).
        activation: What is applied before dropout, if anything.
    """

    unfused: Function
    fused: Function
    forward: int = 3
    backward: int = 2
    wanted: tuple[int, ...] = (0, 2)
    activation: Callable[[Tensor], Tensor] | None = None


def _activation(name: str, f: Callable[[Tensor], Tensor]) -> Operation:
    return Operation(
        lambda x, b, r: torch_F.dropout(f(x), P),
        lambda x, b, r: F.activation_dropout(x, P, name),
        forward=2,
        backward=3,
        wanted=(0,),
        activation=f,
    )


OPERATIONS: dict[str, Operation] = {
    "bias_dropout_add": Operation(
        lambda x, b, r: r + torch_F.dropout(x + b, P),
        lambda x, b, r: F.bias_dropout_add(x, b, r, P),
        wanted=(0, 2, 1),
    ),
    "dropout_add": Operation(
        lambda x, b, r: r + torch_F.dropout(x, P), lambda x, b, r: F.dropout_add(x, r, P)
    ),
    "drop_path_add": Operation(
        lambda x, b, r: r + _drop_path(x), lambda x, b, r: F.drop_path_add(x, r, P)
    ),
    "relu": _activation("relu", torch_F.relu),
    "gelu": _activation("gelu", torch_F.gelu),
    "gelu_tanh": _activation("gelu_tanh", lambda x: torch_F.gelu(x, approximate="tanh")),
    "silu": _activation("silu", torch_F.silu),
}


def cases(options: Options) -> list[Case]:
    """Return all operations at one size, the first also at a larger one, then a tiny one."""
    first = next(iter(OPERATIONS))
    name, elements = ("256K", 1 << 18) if options.quick else ("4M", 1 << 22)
    modes = (FORWARD, BOTH)
    works = [Work(op, (elements,), modes, name) for op in OPERATIONS]
    if not options.quick:
        works.append(Work(first, (1 << 24,), modes, "16M"))
    works += [Work(op, (64,), modes, host=True) for op in (first, "relu")]
    return layer_cases(options, works, _moved, _setup)


def _moved(op: str, mode: str) -> int:
    operation = OPERATIONS[op]
    return operation.forward + (operation.backward if mode == BOTH else 0)


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    op, (elements,) = work.op, work.shape
    columns = min(COLUMNS, elements)
    rows = elements // columns
    data = Data(dtype, options)
    tensors = (data.uniform(rows, columns), data.uniform(columns), data.uniform(rows, columns))
    operation = OPERATIONS[op]
    make = timed(mode, *tensors, wanted=operation.wanted)
    return Workload(
        providers(operation.unfused, operation.fused, make), lambda call: _check(op, tensors, call)
    )


def _check(op: str, tensors: tuple[Tensor, Tensor, Tensor], call: Call) -> Accuracy:
    """Check the kept elements, their number, and the gradients against the mask."""
    y, *gradients = results(call)
    x, bias, residual = (t.double() for t in tensors)
    operation = OPERATIONS[op]
    tolerance = _TOLERANCE[y.dtype]
    if operation.activation is not None:
        kept, term, beside = y != 0, operation.activation(x), torch.zeros_like(x)
    else:
        # 16-bit sums may round back to the residual only where the term is far smaller than it.
        kept, beside = y != tensors[2], residual
        term = x + bias if 1 in operation.wanted else x
    exact = beside + torch.where(kept, term / (1 - P), 0.0)
    error = float(((y.double() - exact) / exact.abs().clamp_min(1.0)).abs().max())
    if not is_keep_rate(kept[:, 0] if op == "drop_path_add" else kept):
        return Accuracy(math.inf, tolerance, "keep rate")
    if gradients and not torch.equal(gradients[0] != 0, kept):
        return Accuracy(math.inf, tolerance, "gradient's mask")
    if len(gradients) == 3:
        count = kept.double().sum(0) / (1 - P)
        off = (gradients[2].double() - count).abs() / count.clamp_min(1.0)
        error = largest([error, off.max()])
    return Accuracy(error, tolerance, "kept elements")
