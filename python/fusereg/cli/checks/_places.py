"""Devices that can run a kernel here: the CPU with each instruction set, and each CUDA device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fusereg import _C

from ...core.inventory import Inputs, Operation
from ._judge import CheckResult, run_check
from ._rows import OPERATIONS


@dataclass(frozen=True)
class Place:
    """A device, and on the CPU the instruction set."""

    name: str
    device: torch.device
    isa: str | None = None


def places() -> list[Place]:
    """Return all places of this machine."""
    found = [Place(f"cpu {isa}", torch.device("cpu"), isa) for isa in _C.cpu_isas()]
    if _C.build_info()["cuda"] and torch.version.hip is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.append(Place(f"cuda:{index}", torch.device("cuda", index)))
    return found


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Make the CPU kernels use an instruction set; None changes nothing."""
    before = _C.cpu_isa()
    if name is not None:
        _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def run_checks(operations: Sequence[Operation] | None = None) -> list[CheckResult]:
    """Make one small float32 call of every operation on every place."""
    results = []
    for place in places():
        with instruction_set(place.isa):
            for operation in OPERATIONS if operations is None else operations:
                results.append(run_check(operation, Inputs(place.device), place.name))
    return results
