"""Every public operation, with what only the tests need: layouts, and the surroundings of a call.

The rows themselves are in the package, python/fusereg/*/check.py, where `fusereg verify` reads them
too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusereg
from fusereg.cli.checks import OPERATIONS
from fusereg.core.inventory import Inputs, Operation, as_tuple

CPU = torch.device("cpu")
#: The operations that are functions of tensors with a reference, to which the contract applies.
FUNCTIONS = [operation for operation in OPERATIONS if operation.reference is not None]
#: Those that return their result.
PURE = [operation for operation in FUNCTIONS if not operation.written]
IN_PLACE = [operation for operation in FUNCTIONS if operation.takes("inplace")]
DRAWN = [operation for operation in FUNCTIONS if operation.options.get("seed") is not None]
#: One of each kind of operator.
KINDS = [
    operation
    for operation in FUNCTIONS
    if operation.name
    in (
        "dropout",
        "drop_block2d",
        "gaussian_dropout",
        "bias_dropout_add",
        "activation_dropout, gelu",
        "dropout_add_layer_norm",
        "batch_norm, running statistics",
        "elastic_net_penalty",
        "augment.warp_affine",
        "augment.resize",
    )
]


def named(operations: list[Operation], slow_variants: bool = False) -> pytest.MarkDecorator:
    """Return the decorator that runs a test for each of these operations, under its name.

    With ``slow_variants``, all but one variant of each function are marked slow.
    """
    rows = [
        pytest.param(
            operation,
            id=operation.name,
            marks=[pytest.mark.slow]
            if slow_variants and "," in operation.name and operation not in KINDS
            else [],
        )
        for operation in operations
    ]
    return pytest.mark.parametrize("operation", rows)


def by_name(name: str) -> Operation:
    """Return the operation of this name."""
    return next(operation for operation in OPERATIONS if operation.name == name)


def sample(
    operation: Operation,
    size: str = "tiny",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Return the tensors of a call."""
    return operation.sample(Inputs(device, dtype, size))


def saved_by(call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a call's result, and what autograd keeps for it."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call(), kept


def public_functions() -> dict[str, Callable[..., Any]]:
    """Return every public function that computes something of tensors, by its name in fusereg."""
    found = {name: getattr(fusereg.functional, name) for name in fusereg.functional.__all__}
    for prefix in ("augment", "prox", "optim"):
        module = getattr(fusereg, prefix)
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            optimizer = isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
            if inspect.isfunction(value) or optimizer:
                found[f"{prefix}.{name}"] = value
    found |= {name: getattr(fusereg, name) for name in ("add_penalty_grad_", "sparsity")}
    return {name: f for name, f in found.items() if not name.rpartition(".")[2].startswith("_")}


# --- layouts --------------------------------------------------------------------------------------


def _permuted(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _misaligned(t: Tensor) -> Tensor:
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def _with_gaps(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": _permuted,
    "misaligned": _misaligned,
    "with gaps": _with_gaps,
    "expanded": _expanded,
    "channels_last": _channels_last,
}


def laid_out(operation: Operation, layout: str, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors in a layout: those that are as large as the first, or all of a list."""
    change = LAYOUTS[layout]
    first = tensors[0].dim()
    return [
        change(t) if t.is_floating_point() and (operation.as_list or t.dim() == first) else t
        for t in tensors
    ]


# --- surroundings ---------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Passes every call on, and keeps those of operators of fusereg.

    While it is active, operations take the way through torch.library.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Any, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fusereg":
            kept = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
            self.calls.setdefault(func, []).append(kept)
        return func(*args, **(kwargs or {}))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differentiated(
    operation: Operation, tensors: list[Tensor], call: Callable[..., Any] | None = None
) -> list[Tensor]:
    """Return results, written tensors and gradients of a call.

    The incoming gradients are the results' cosines.
    """
    leaves = [t.requires_grad_() for t in operation.differentiable(tensors)]
    results = as_tuple((call or operation)(*tensors))
    found = [*results, *operation.select(tensors, operation.written)]
    outputs = [y for y in results if y.requires_grad]
    if leaves and outputs:
        found += torch.autograd.grad(outputs, leaves, [y.detach().cos() for y in outputs])
    return [t.detach() for t in found]
