"""What can run a kernel here: the CPU with each instruction set, and each CUDA device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fusereg import _C
from fusereg.cli.checks._base import CHECKS, CheckResult, Inputs, KernelCheck, run_check


@dataclass(frozen=True)
class Place:
    """A device, and on the CPU the instruction set."""

    name: str
    device: torch.device
    isa: str | None = None


def places() -> list[Place]:
    """All of this machine's."""
    found = [Place(f"cpu {isa}", torch.device("cpu"), isa) for isa in _C.cpu_isas()]
    if _C.build_info()["cuda"] and torch.version.hip is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.append(Place(f"cuda:{index}", torch.device("cuda", index)))
    return found


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """The CPU's kernels use it within; None leaves it as it is."""
    before = _C.cpu_isa()
    if name is not None:
        _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def run_checks(checks: Sequence[KernelCheck] | None = None) -> list[CheckResult]:
    """One small float32 call of every kernel on every place."""
    results = []
    for place in places():
        with instruction_set(place.isa):
            for check in CHECKS if checks is None else checks:
                results.append(run_check(check, Inputs(place.device), place.name))
    return results
