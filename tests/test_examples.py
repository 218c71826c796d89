"""Every program in examples/ runs, on a few real digits, and ends with what its text promises."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
#: What a program needs beside the package, and what it says at its end.
PROGRAMS = {
    "plain": ((), r"restored: accuracy 0\.\d+, \d+% of the weights are 0"),
    "lightning_digits": (("lightning",), r"restored: accuracy 0\.\d+, loss \d"),
    "trainer_digits": (("transformers", "accelerate"), r"restored: accuracy 0\.\d+, \d+% of the"),
    "ignite_digits": (("ignite",), r"restored: accuracy 0\.\d+"),
    "accelerate_digits": (("accelerate",), r"restored: accuracy 0\.\d+; 4 optimizer steps"),
}
ON_TWO = {
    "ddp": "restored on all ranks; the same bits on each: True",
    "fsdp2": r"restored on all ranks; \d+% of the weights are 0",
}
# Run by its own test, with a stand-in: torchtitan is not installed here.
ELSEWHERE = {"torchtitan_optimizers"}


def last_line(command: list[str]) -> str:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    done = subprocess.run(
        command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "plain")) for name in PROGRAMS],
)
def test_it_runs(name: str) -> None:
    needs, wanted = PROGRAMS[name]
    for package in ("mlxtend", *needs):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    start = "import other_libraries, runpy, sys; sys.argv = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    path = str(EXAMPLES / f"{name}.py")
    said = last_line([sys.executable, "-c", start, path, "--quick", "--epochs", "2"])
    assert re.fullmatch(wanted + ".*", said), said


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_it_runs_on_two_processes(name: str) -> None:
    pytest.importorskip("mlxtend")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = str(EXAMPLES / f"{name}.py")
    said = last_line([*torchrun, "--nproc-per-node", "2", path, "--quick", "--epochs", "2"])
    assert re.fullmatch(ON_TWO[name], said), said


def test_all_are_run_and_all_are_listed() -> None:
    present = {path.stem for path in EXAMPLES.glob("*.py")}
    assert present == {*PROGRAMS, *ON_TWO, *ELSEWHERE}
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {name for name in present if f"`{name}.py`" not in text} == set()
