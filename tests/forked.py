"""Runs a program in a copy of this process.

It has imported torch already, which takes a new interpreter some seconds. What a test claims of
imports, or of the environment at the start, needs a new interpreter all the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TESTS = str(Path(__file__).parent)
#: How to start processes: CUDA is not usable in a copy, nor are the threads of every system.
START_METHOD = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"


def run(program: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run Python code and return its exit status and output, as ``subprocess.run`` does."""
    program = textwrap.dedent(program)
    if START_METHOD != "fork":
        if "FUSEREG_TEST_STANDIN_MODULE" in os.environ:
            # The first puts the device in place.
            program = f"import sys; sys.path.insert(0, {_TESTS!r})\nimport conftest\n" + program
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout
        )
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = context.Process(target=_child, args=(program, stdout.fileno(), stderr.fileno()))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        stdout.seek(0)
        stderr.seek(0)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(program, process.exitcode, stdout.read(), stderr.read())


def _child(program: str, stdout: int, stderr: int) -> None:
    torch.set_num_threads(1)  # the threads of the copied process are not copied
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell does "&"
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    status: object = 0
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # At once: the end of the copied process is not for its copy.
    os._exit(status if isinstance(status, int) else int(status is not None))


def elsewhere(work: Callable[[], Any], kill: bool = False) -> str:
    """Return what the function returns or raises in a forked process, which then ends."""
    get, put = multiprocessing.get_context("fork").Pipe(duplex=False)

    def run() -> None:
        try:
            put.send(str(work()))
        except Exception as error:
            put.send(f"{type(error).__name__}: {error}")
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    found: str = get.recv()
    process.join()
    return found
