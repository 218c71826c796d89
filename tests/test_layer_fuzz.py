"""No call of a layer ends the process or is wrong: layer_fuzz.py, over layouts, modes and dtypes.

FUSEREG_FUZZ_CASES and FUSEREG_FUZZ_SEED ask for more cases, and for others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layer_fuzz
from conftest import HOST_MODULE, Backend

PROGRAM = Path(layer_fuzz.__file__)
SEED = int(os.environ.get("FUSEREG_FUZZ_SEED", "20240229"))
CASES = int(os.environ.get("FUSEREG_FUZZ_CASES", "60" if HOST_MODULE else "200"))


@pytest.fixture(params=[Backend("cuda_on_host" if HOST_MODULE else "cpu", torch.device("cpu"))])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each case chooses an instruction set by itself."""
    chosen: Backend = request.param
    return chosen


def fuzz(cases: int, progress: Path) -> None:
    """Run the program, which is to die alone."""
    options = ["--seed", str(SEED), "--cases", str(cases), "--progress", str(progress)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
        check=False,
    )
    last = progress.read_text(encoding="utf-8").strip()
    assert done.returncode == 0, f"{done.returncode} at case {last}\n{done.stdout}{done.stderr}"


@pytest.mark.usefixtures("backend")
def test_random_calls_of_the_layers_are_right(tmp_path: Path) -> None:
    fuzz(CASES, tmp_path / "case")


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_ten_thousand_random_calls_of_the_layers_are_right(tmp_path: Path) -> None:
    fuzz(10 * CASES if HOST_MODULE else 10_000, tmp_path / "case")


@pytest.mark.usefixtures("backend")
def test_the_calls_reach_every_layer_mode_and_dtype() -> None:
    cases = [layer_fuzz.case_of(SEED, i) for i in range(700)]
    norms = [c for c in cases if isinstance(c, layer_fuzz.Norm)]
    drops = [c for c in cases if isinstance(c, layer_fuzz.Drop)]
    assert {c.kind for c in drops} == set(layer_fuzz.DROPS)
    for kind in layer_fuzz.NORMS:
        those = [c for c in norms if c.kind == kind]
        assert {c.dtype for c in those} == set(layer_fuzz.DTYPES)
        assert {c.training for c in those} == {True, False}
        assert {c.shape[1] == 0 for c in those} == {True, False}
        assert {c.x.is_contiguous() for c in those} == {True, False}
        if kind != "FrozenBatchNorm":
            assert any(c.mask is not None and not c.mask.is_contiguous() for c in those)
    assert any(c.inplace and c.training for c in norms)
