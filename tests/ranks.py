"""Checks that run on several gloo processes, each of them a test of its own.

A module registers its checks with :func:`on`, and ends with ``test_ranks = collect(__name__)``.
One program each of 2, 3 and 4 processes runs all checks for that number of processes, because
starting processes costs more than the checks.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forked import START_METHOD

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no torch.distributed with gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None

LIMIT = 180.0  # seconds for one program, which takes some ten on two cores
TIMEOUT = timedelta(seconds=60)  # for a collective in which other ranks do not take part
PATIENCE = timedelta(seconds=40)  # for the other ranks to end a check


@dataclass(frozen=True)
class Ranks:
    """What a check is given."""

    rank: int
    world: int
    mesh: DeviceMesh  # one dimension, over all ranks


Check = Callable[[Ranks], None]
#: The checks of each module, by the number of processes.
CHECKS: dict[str, dict[int, dict[str, Check]]] = {}


def on(*worlds: int) -> Callable[[Check], Check]:
    """Register a check for these numbers of processes."""

    def register(check: Check) -> Check:
        checks = CHECKS.setdefault(check.__module__, {})
        for world in worlds:
            checks.setdefault(world, {})[check.__name__] = check
        return check

    return register


def collect(module: str, slow: bool = True) -> Callable[[int, str], None]:
    """Return a module's test, with a case for each of its checks and for each program's end."""
    cases = [
        (world, name) for world, checks in CHECKS[module].items() for name in (*checks, "the end")
    ]

    @pytest.mark.parametrize(("world", "name"), cases)
    def test_ranks(world: int, name: str) -> None:
        if not can_run(name):
            pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
        said = failures(results(world, module), name)
        if said:
            pytest.fail(said, pytrace=False)

    return pytest.mark.slow(test_ranks) if slow else test_ranks


def can_run(name: str) -> bool:
    """Return whether this torch has what a check needs, by the check's name."""
    return fully_shard is not None or "fsdp" not in name


def program(rank: int, world: int, folder: str, module: str) -> None:
    """Run the checks that a module registers, on one process, and write the results."""
    importlib.import_module(module)
    torch.set_num_threads(1)
    results: dict[str, str] = {}
    stack = (Path(folder) / f"rank{rank}.stack").open("w")
    faulthandler.dump_traceback_later(LIMIT - 5, file=stack)
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        ranks = Ranks(rank, world, init_device_mesh("cpu", (world,)))
        for name, check in CHECKS[module][world].items():
            if can_run(name):
                torch.manual_seed(20240229)
                try:
                    check(ranks)
                    results[name] = "ok"
                except BaseException:
                    results[name] = traceback.format_exc()
                # A rank that failed takes part in no collective before the others have come as far.
                store.set(f"{name} {rank}", "done")
                store.wait([f"{name} {r}" for r in range(world)], PATIENCE)
        dist.barrier()
        dist.destroy_process_group()
        results["the end"] = "ok"
    except BaseException:
        results["the end"] = traceback.format_exc()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    # At once: after a failure, a regular end could wait for ranks that do not answer any more.
    os._exit(0)


def run(world: int, folder: Path, module: str) -> list[dict[str, str]]:
    """Run the program and return each rank's results; ranks that hang are ended at the limit."""
    processes = mp.start_processes(
        program, (world, str(folder), module), world, join=False, start_method=START_METHOD
    ).processes
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    found = []
    for rank, process in enumerate(processes):
        try:
            found.append(json.loads((folder / f"rank{rank}.json").read_text()))
        except OSError:
            stack = folder / f"rank{rank}.stack"
            hung = stack.read_text() if stack.exists() else ""
            found.append({"its process": f"exit code {process.exitcode}\n{hung}"})
    return found


@functools.cache
def results(world: int, module: str) -> list[dict[str, str]]:
    """Return what run() returns; each program runs once."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        # Loopback only: the tests must not depend on what the host's name resolves to.
        patch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        return run(world, Path(folder), module)


def failures(results: list[dict[str, str]], name: str) -> str:
    """Describe what went wrong on which rank in this check; empty if nothing did."""
    said = []
    for rank, result in enumerate(results):
        if name not in result:
            other = "\n".join(f"{n}: {r}" for n, r in result.items() if r != "ok")
            said.append(f"rank {rank} did not come to {name}, but this failed:\n{other}")
        elif result[name] != "ok":
            said.append(f"rank {rank}: {result[name]}")
    return "\n".join(said)
