"""The checks of one place in a process of its own, a line of JSON for each result.

A kernel that takes its process down (an instruction that the processor lacks, a bad address) is
then a line of the table of `fusereg verify`, not its end.
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
from fusereg.cli import checks
from fusereg.cli.checks._base import TOLERANCES, CheckResult, Inputs, KernelCheck, run_check
from fusereg.cli.checks._places import Place

Planned = tuple[KernelCheck, torch.dtype, bool]


def plan(techniques: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Planned]:
    """(kernel, dtype, large) in the order in which a place runs them."""
    return [
        (check, dtype, large)
        for check in checks.CHECKS
        if check.technique in techniques
        for dtype in dtypes
        for large in (False, True)
    ]


def called_twice(check: KernelCheck, inputs: Inputs, place: Place) -> CheckResult:
    """The result of a call; it fails too if a second one, with one CPU thread, has other bits."""
    result = run_check(check, inputs, place.name)
    if not result.ok:
        return result
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = run_check(check, inputs, place.name)
    finally:
        torch.set_num_threads(threads)
    if again.bits == result.bits:
        return result
    how = "" if place.isa is None else f" with 1 thread instead of {threads}"
    return replace(result, ok=False, message=f"a second call{how} gave other bits")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the plan from one point on; the exit code says only that it came to its end."""
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
    # What anybody else prints must not come between the lines of results.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    names = args.dtypes.split(",")
    dtypes = [dtype for dtype in TOLERANCES if str(dtype).removeprefix("torch.") in names]
    for check, dtype, large in plan(args.techniques.split(","), dtypes)[args.skip :]:
        result = called_twice(check, Inputs(place.device, dtype, large), place)
        print(json.dumps(asdict(result)), file=results, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
