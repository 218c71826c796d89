"""Runs the checks of one place in a separate process and writes a line of JSON for each result.

A kernel that crashes its process (an instruction that the processor lacks, a bad address) is then a
row in the table of `fusereg verify`, not its end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from fusereg import _C

from ...core.inventory import TOLERANCES, Inputs, Operation
from ._judge import CheckResult, run_check
from ._places import Place
from ._rows import OPERATIONS

Planned = tuple[Operation, torch.dtype, str]


def plan(techniques: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Planned]:
    """Return (operation, dtype, size) in the order in which a place runs them."""
    return [
        (operation, dtype, size)
        for operation in OPERATIONS
        if operation.technique in techniques
        for dtype in dtypes
        for size in ("small", "large")
    ]


def called_twice(operation: Operation, inputs: Inputs, place: Place) -> CheckResult:
    """Return the result of a call; a second one, with one CPU thread, must give the same bits."""
    result = run_check(operation, inputs, place.name)
    if not result.ok:
        return result
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        second = run_check(operation, inputs, place.name)
    finally:
        torch.set_num_threads(threads)
    if second.bits == result.bits:
        return result
    how = "" if place.isa is None else f" with 1 thread instead of {threads}"
    return replace(result, ok=False, message=f"a second call{how} gave other bits")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan from one point on; exit code 0 means only that its end was reached."""
    parser = argparse.ArgumentParser(prog="python -m fusereg.cli.checks._worker")
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--isa")
    parser.add_argument("--techniques", required=True)
    parser.add_argument("--dtypes", required=True)
    parser.add_argument("--skip", type=int, default=0)
    args = parser.parse_args(argv)
    place = Place(args.name, torch.device(args.device), args.isa)
    if args.isa is not None and _C.cpu_isa() != args.isa:
        raise RuntimeError(f"FUSEREG_CPU_ISA={args.isa} was not heeded: this is {_C.cpu_isa()}")
    # Whatever else is printed must not get between the lines of results.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    names = args.dtypes.split(",")
    dtypes = [dtype for dtype in TOLERANCES if str(dtype).removeprefix("torch.") in names]
    for operation, dtype, size in plan(args.techniques.split(","), dtypes)[args.skip :]:
        result = called_twice(operation, Inputs(place.device, dtype, size), place)
        print(json.dumps(asdict(result)), file=results, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
