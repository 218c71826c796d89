"""Runs the checks of a place in worker processes, and continues after one that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

import torch

from ...core.inventory import TOLERANCES
from ._judge import CheckResult, dtype_name
from ._places import Place
from ._worker import Planned, plan

#: A call takes milliseconds; starting Python and torch from a cold disk takes the longest.
SECONDS_A_RESULT = 120.0
#: After so many processes that died, what is left counts as failed.
MAX_DEATHS = 3


def worker_command() -> list[str]:
    """Return the command that starts a worker, without its arguments."""
    return [sys.executable, "-m", "fusereg.cli.checks._worker"]


def verify_place(
    place: Place,
    techniques: Sequence[str],
    dtypes: Sequence[torch.dtype],
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Return the result of each planned call on this place, in order."""
    todo = plan(techniques, dtypes)
    results: list[CheckResult] = []

    def add(result: CheckResult) -> None:
        results.append(result)
        on_result(result)

    deaths = 0
    while len(results) < len(todo):
        end = _run_worker(place, techniques, dtypes, len(results), add)
        if len(results) >= len(todo):
            break
        deaths += 1
        add(_lost(todo[len(results)], place, f"its process {end}"))
        if deaths == MAX_DEATHS:
            for planned in todo[len(results) :]:
                add(_lost(planned, place, f"not run: {MAX_DEATHS} processes have died before it"))
    return results


def _lost(planned: Planned, place: Place, message: str) -> CheckResult:
    operation, dtype, size = planned
    return CheckResult(
        technique=operation.technique,
        kernel=operation.name,
        formula=operation.formula,
        backend=place.name,
        device=str(place.device),
        dtype=dtype_name(dtype),
        large=size == "large",
        ok=False,
        error=None,
        tolerance=TOLERANCES[dtype],
        message=message,
    )


def _run_worker(
    place: Place,
    techniques: Sequence[str],
    dtypes: Sequence[torch.dtype],
    skip: int,
    add: Callable[[CheckResult], None],
) -> str:
    """Run one worker until it ends; return how it ended."""
    command = [*worker_command(), "--name", place.name, "--device", str(place.device)]
    command += ["--techniques", ",".join(techniques), "--skip", str(skip)]
    command += ["--dtypes", ",".join(dtype_name(dtype) for dtype in dtypes)]
    environment = dict(os.environ)
    # Threads that spin while they wait make a busy machine much slower.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if place.isa is not None:
        command += ["--isa", place.isa]
        environment["FUSEREG_CPU_ISA"] = place.isa
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, text=True, encoding="utf-8",
        ) as worker,
    ):  # fmt: skip
        try:
            hung = _read(worker, add)
        except BaseException:
            worker.kill()
            raise
        status = worker.wait()
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    if hung:
        return f"gave nothing for {SECONDS_A_RESULT:.0f} s and was ended{last}"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}{last}"
    return f"ended with exit status {status}{last}"


def _read(worker: subprocess.Popen[str], add: Callable[[CheckResult], None]) -> bool:
    """Pass on the worker's results; return whether it had to be killed because none came."""
    assert worker.stdout is not None
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        worker.kill()

    while True:
        watchdog = threading.Timer(SECONDS_A_RESULT, kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            line = worker.stdout.readline()
        finally:
            watchdog.cancel()
        if not line.endswith("\n"):  # the end, perhaps within a line
            return killed.is_set()
        add(CheckResult(**json.loads(line)))
