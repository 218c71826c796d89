"""bench/gpu.sh and bench/gpu.py where there is no GPU: each part's command, limits, results.

The commands that the script calls are replaced by ones that write down their arguments.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

from fusereg.bench.harness import Case, Provider, Workload

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no bench/ beside these tests")

#: Stands for python, nvcc and NVIDIA's tools. FAILS and HANGS are parts of a command line.
COMMAND = """#!/usr/bin/env bash
line="$(basename "$0") $*"
echo "$line" >> "$CALLS"
echo "called: $line"
if [ -n "${FAILS:-}" ] && [[ "$line" == *"$FAILS"* ]]; then exit 3; fi
if [ -n "${HANGS:-}" ] && [[ "$line" == *"$HANGS"* ]]; then exec sleep 60; fi
while [ "$#" -gt 0 ]; do
  case "$1" in
    --json | --markdown) echo '{}' > "$2" ;;
  esac
  shift
done
"""

PARTS = {
    "build": ["versions", "package"],
    "check": ["versions", "package", "info", "operations", "surroundings", "suite", "memcheck"],
    "measure": ["versions", "package", "times", "compiled", "counters", "table"],
}


class Run:
    """The script's runs in one folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        commands = folder / "commands"
        commands.mkdir()
        for name in ("python", "nvcc", "nvidia-smi", "ncu", "compute-sanitizer"):
            (commands / name).write_text(COMMAND)
            (commands / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHON": str(commands / "python"),
            "BUILD": str(folder / "built"),
            "CALLS": str(folder / "calls"),
        }

    def __call__(self, stage: str, **environment: str) -> tuple[int, dict[str, str]]:
        """Return the exit status, and the result of each part."""
        (self.folder / "calls").write_text("")
        done = subprocess.run(
            [str(SCRIPT), stage, str(self.out)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = (self.out / f"{stage}.txt").read_text().splitlines()
        return done.returncode, {line.split()[0]: line.split()[1] for line in lines}

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def call(self, text: str) -> str:
        (found,) = (line for line in self.calls() if text in line)
        return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_stages_run_their_parts_and_leave_few_files(run: Run) -> None:
    for stage, parts in PARTS.items():
        status, results = run(stage)
        assert status == 0
        assert list(results)[:2] == parts[:2]
        assert set(results) == set(parts)
        assert set(results.values()) - {"skipped"} == {"ok"}
        with tarfile.open(run.out / f"{stage}.tar.gz") as archive:
            logs = {Path(name).stem for name in archive.getnames() if name.endswith(".log")}
        assert logs == {name for name, result in results.items() if result == "ok"}
    assert sorted(path.name for path in run.out.iterdir()) == [
        "build.tar.gz", "build.txt", "check.tar.gz", "check.txt", "measure.json", "measure.md",
        "measure.tar.gz", "measure.txt",
    ]  # fmt: skip


def test_every_operation_is_compared_in_float32_and_bfloat16(run: Run) -> None:
    run("check")
    # On the first GPU: a machine may have eight, which would take eight times as long.
    assert "--device cuda:0 --dtype float32,bfloat16" in run.call("fusereg verify")
    for text in ("test_cuda_surroundings.py --", "not slow", "-x -m sanitizer"):
        assert any("--only-backend cuda" in line for line in run.calls() if text in line + " --")


def test_it_is_built_once_and_again_after_a_change(run: Run) -> None:
    run("build")
    assert "CMAKE_CUDA_ARCHITECTURES=native" in run.call("pip install")
    assert run("check")[1]["package"] == "skipped"
    os.utime(run.folder / "built" / ".installed", (0, 0))
    assert run("check")[1]["package"] == "ok"


def test_a_wheel_is_installed_instead_of_a_build(run: Run) -> None:
    wheel = run.folder / "fusereg-1-any.whl"
    wheel.touch()
    assert run("build", WHEEL=str(wheel))[1]["package"] == "ok"
    line = run.call("pip install")
    assert line.endswith(str(wheel))
    assert "build-dir" not in line


def test_a_part_that_fails_does_not_stop_the_others(run: Run) -> None:
    status, results = run("check", FAILS="fusereg verify")
    assert status == 1
    assert {name for name, result in results.items() if result == "FAILED"} == {"operations"}
    assert set(results) == set(PARTS["check"])
    assert run("measure", FAILS="ncu --metrics")[1]["table"] == "ok"


def test_a_part_has_a_time_limit(run: Run) -> None:
    run("build")
    status, results = run("check", HANGS="-x -m sanitizer", LIMIT="8")
    assert status == 1
    assert results["memcheck"] == "FAILED"
    assert results["suite"] == "ok"
    assert "took longer than" in (run.out / "check.txt").read_text()


def test_a_stage_ends_in_its_time_whatever_hangs(run: Run) -> None:
    run("build")
    status, results = run("check", HANGS="no:cacheprovider", LIMIT="8")  # they would take a minute
    hung = {"surroundings", "suite", "memcheck"}
    assert status == len(hung)
    assert {name for name, result in results.items() if result == "FAILED"} == hung
    assert set(results) == set(PARTS["check"])


def test_nothing_runs_without_a_build(run: Run) -> None:
    status, results = run("check", FAILS="pip install")
    assert status == 1
    assert set(results) == {"versions", "package", "others"}
    assert (run.out / "check.tar.gz").exists()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for arguments in ([], ["check"], ["measure", str(tmp_path), "more"], ["all", str(tmp_path)]):
        done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True)
        assert done.returncode == 64
        assert "usage: bench/gpu.sh" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- gpu.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_chosen_cases_are_cases_of_the_benchmarks(gpu: types.ModuleType) -> None:
    ids = gpu.chosen_ids()
    assert len(set(ids)) == len(ids) >= 40
    assert [case.id for case in gpu.cases(torch.device("cpu"), ids)] == ids
    assert 12 <= len(gpu.chosen_ids("counted")) <= 14
    assert set(gpu.chosen_ids("compiled")) <= set(ids)
    with pytest.raises(ValueError, match="no case dropout/none"):
        gpu.cases(torch.device("cpu"), ["dropout/none"])


@pytest.mark.parametrize(("compiled", "kept"), [(False, {"fusereg"}), (True, {"fusereg", "slow"})])
def test_providers_that_compile_are_measured_apart(
    compiled: bool, kept: set[str], gpu: types.ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def setup() -> Workload:
        providers = [
            Provider("fusereg", lambda: lambda: None),
            Provider("slow", lambda: lambda: None, compiles=True),
        ]
        return Workload(providers)

    case = Case("op", "mode", "1", torch.float32, torch.device("cpu"), 1, 1, 8, 0, setup, suite="s")
    monkeypatch.setattr(gpu, "cases", lambda device, ids: [case])
    target = tmp_path / "times.json"
    assert gpu.times(torch.device("cpu"), compiled, target) == 0
    providers = {row["provider"] for row in json.loads(target.read_text())["rows"]}
    assert providers == {"copy", *kept}


def test_only_some_cases_are_measured(
    gpu: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gpu, "cases", lambda device, ids: asked.extend(ids) or [])
    monkeypatch.setenv("CASES", "^gaussian.*bfloat16")
    assert gpu.times(torch.device("cpu"), False, tmp_path / "times.json") == 0
    assert asked == ["gaussian_dropout/gaussian_dropout/forward/4m/bfloat16"]


def test_the_table_has_predicted_and_measured(gpu: types.ModuleType, tmp_path: Path) -> None:
    case = gpu.chosen_ids("counted")[0]
    suite, op, mode, shape, dtype = case.split("/")
    common = {"suite": suite, "op": op, "mode": mode, "shape": shape, "dtype": dtype}
    rows = [
        {**common, "provider": "copy", "bytes": 3_000_000, "gb_per_s": 3000.0, "p50_us": 1.0},
        {**common, "provider": "fusereg", "bytes": 3_000_000, "percent_of_copy": 71.4,
         "vs_eager": 3.21, "p50_us": 1.4},
    ]  # fmt: skip
    document = {"machine": {"gpu": {"name": "GPU 9000"}}, "interrupted": False, "rows": rows}
    (tmp_path / "no-compile.json").write_text(json.dumps(document))
    names = ["ID", "Kernel Name", "NVTX", *gpu.METRICS.values()]
    kernel = "void fusereg::dropout::<unnamed>::x_kernel<fusereg::BFloat16, (bool)1>(Args)"
    values = ["0", kernel, f"{case}:none", "1,250", *["4"] * (len(gpu.METRICS) - 1)]
    quoted = [",".join(f'"{cell}"' for cell in line) for line in (names, [""] * 3, values)]
    (tmp_path / "counters.csv").write_text("==PROF== Connected\n" + "\n".join(quoted) + "\n")

    arguments = ["--json", str(tmp_path / "m.json"), "--markdown", str(tmp_path / "m.md")]
    assert gpu.main(["table", str(tmp_path), *arguments]) == 0
    text = (tmp_path / "m.md").read_text()
    assert "GPU 9000" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {case} |"))
    assert "| 71 | 80 | 1.4 | 3.21 | – |" in line
    assert "`dropout::x_kernel<BFloat16, (bool)1>`" in text
    assert json.loads((tmp_path / "m.json").read_text())["counters"][case][0]["us"] == 1.25
