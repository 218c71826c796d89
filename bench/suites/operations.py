"""Benchmark of a call of each operation of the inventory, on small tensors.

Tensors have some thousand elements, as in ``fusereg verify``, so the host takes most of the time.
Nothing else is measured beside fusereg (each technique's own suite does that): the times are made
to be compared with those of another version, by ``fusereg bench --compare``. Two modes:

- ``forward``: the call, without autograd.
- ``forward+backward``: the results, and the gradients of all arguments that have one.
"""

from __future__ import annotations

import functools

import torch

from fusereg.cli.checks import OPERATIONS, Inputs, Operation, worst
from fusereg.core.inventory import as_tuple

from ..harness import Accuracy, Case, Options, Provider, Workload
from ..harness.layers import BOTH, FORWARD

PROVIDERS = ("fusereg",)


def cases(options: Options) -> list[Case]:
    """Return a case for each operation that is a function of tensors, in each mode that it has."""
    inputs = Inputs(options.device, options.dtypes[0])
    found = []
    for operation in OPERATIONS:
        if operation.reference is None:
            continue
        tensors = operation.sample(inputs)
        elements = sum(t.numel() for t in tensors)
        found += [
            Case(
                op=operation.name,
                mode=mode,
                shape="host small",
                dtype=inputs.dtype,
                device=inputs.device,
                tensors=1,
                elements=elements,
                bytes_moved=0,
                memory=200 * elements,
                setup=functools.partial(_setup, operation, mode, inputs),
                host=True,
            )
            for mode in ((FORWARD, BOTH) if operation.differentiable(tensors) else (FORWARD,))
        ]
    return found


def _setup(operation: Operation, mode: str, inputs: Inputs) -> Workload:
    tensors = operation.sample(inputs)
    leaves = operation.differentiable(tensors)

    def forward() -> object:
        with torch.no_grad():
            return operation(*tensors)

    def forward_backward() -> object:
        results = [y for y in as_tuple(operation(*tensors)) if y.requires_grad]
        return torch.autograd.grad(results, leaves, gradients)

    if mode == BOTH:
        for leaf in leaves:
            leaf.requires_grad_()
        results = [y for y in as_tuple(operation(*tensors)) if y.requires_grad]
        gradients = [torch.ones_like(y) for y in results]
    call = forward_backward if mode == BOTH else forward
    return Workload(
        [Provider("fusereg", lambda: call)],
        lambda _: Accuracy(*worst(operation.check(inputs)), what="result or gradient"),
    )
