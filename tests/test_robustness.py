"""No argument, however odd, ends the process or goes unnoticed: fusereg._C under binding_fuzz.py.

FUSEREG_FUZZ_CASES and FUSEREG_FUZZ_SEED ask for more cases, and for others.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import binding_fuzz
import fusereg
from conftest import HOST_MODULE, Backend

PROGRAM = Path(binding_fuzz.__file__)
SEED = int(os.environ.get("FUSEREG_FUZZ_SEED", "20240229"))
CASES = 500 if HOST_MODULE else 3000
MOST_DEATHS = 5


@pytest.fixture(params=[Backend("cuda_on_host" if HOST_MODULE else "cpu", torch.device("cpu"))])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each case chooses an instruction set by itself."""
    chosen: Backend = request.param
    return chosen


def fuzz(*options: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs the program, which is to die alone."""
    command = [sys.executable, str(PROGRAM), "--seed", str(SEED), *options]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
    )


@pytest.mark.usefixtures("backend")
def test_no_call_of_the_binding_crashes_or_writes_where_it_should_not(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    progress = tmp_path / "case"
    failures = []
    default = CASES if pytestconfig.getoption("all_cases") else CASES // 4
    cases = os.environ.get("FUSEREG_FUZZ_CASES", default)
    options = ["--cases", str(cases), "--progress", str(progress)]
    done = fuzz(*options)
    while done.returncode != 0 and len(failures) < MOST_DEATHS:
        if done.returncode == 1 and "--- " in done.stdout and done.stdout.endswith("finished\n"):
            failures.append(done.stdout)
            break
        case = progress.read_text(encoding="utf-8").split()[0]
        said = fuzz("--only", case)
        failures.append(
            f"{case} ended the process ({done.returncode}):\n{said.stdout}{said.stderr}"
        )
        done = fuzz(*options, "--after", case)
    assert not failures, "\n\n".join(failures)
    assert done.returncode == 0, done.stderr


@pytest.mark.all_cases("host")
@pytest.mark.usefixtures("backend")
def test_every_kernel_is_reached() -> None:
    """Cases that all fail at the first check would prove nothing."""
    done = fuzz("--cases", "0", "--own-calls")
    ended = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    kernels = {n for n, a in binding_fuzz.signatures().items() if a and a[-1].name == "op"}
    assert len(kernels) > 15
    # 0, or for what gives more than a status its numbers, or nothing.
    well = ("status 0", "status (", "status None")
    reached = {n for n in kernels if any(w in ended.get(n, "") for w in well)}
    if re.search(r"status [1-9]", ended.get("augment_resize_taps", "")):
        reached.add("augment_resize_taps")  # gives a count, at least 1
    assert kernels - reached == set(), done.stderr


def test_batch_norm_is_called_in_every_mode_with_every_layout_and_empty_shape() -> None:
    """In the cases that the test above runs: mask and virtual batches, permuted or empty."""
    own = binding_fuzz.recorded_calls()
    names = [a.name for a in binding_fuzz.signatures()["batch_norm_forward"]]
    reached = set()
    for index in range(200):
        case = binding_fuzz.Case("batch_norm_forward", index, SEED, own["batch_norm_forward"])
        call = dict(zip(names, case.args, strict=False))
        x, group = call.get("x"), call.get("group_samples")
        if type(x) is not torch.Tensor or x.dim() != 4:
            continue
        mode = "mask" if type(call.get("mask")) is torch.Tensor else "all"
        mode = "virtual batches" if type(group) is int and 0 < group < 99 else mode
        empty = "full" if x.numel() else f"no size {list(x.shape).index(0)}"
        order = sorted(range(4), key=lambda d: -x.stride(d))
        reached |= {(mode, empty), (mode, "contiguous" if order == [0, 1, 2, 3] else "permuted")}
    modes = ("all", "mask", "virtual batches")
    assert {(m, "permuted") for m in modes} <= reached
    assert {(m, "full") for m in modes} <= reached
    assert {("all", f"no size {d}") for d in range(4)} <= reached


def test_the_stub_names_every_function_and_argument_that_the_module_has() -> None:
    """What is fuzzed comes from _C.pyi; pybind11's docstrings say what is there."""
    signatures = binding_fuzz.signatures()
    assert set(signatures) == binding_fuzz.exported()
    for name, arguments in signatures.items():
        doc = getattr(fusereg._C, name).__doc__
        inside = doc[doc.index("(") + 1 : doc.rindex(") ->")]
        named = [part.split(":")[0].strip() for part in inside.split(", ") if ":" in part]
        assert [a.name for a in arguments] == [n for n in named if n.isidentifier()], doc
