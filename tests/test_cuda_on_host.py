"""The shim that runs CUDA kernels on the processor: right ones pass, planted faults are caught."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_on_host"
FAULTS = SHIM / "selftest" / "planted_faults.cu"
SOURCES = (SHIM / "selftest" / "selftest.cu", FAULTS)
# Those of the module that the suite runs.
(_flags,) = re.findall(r"set\(sanitizers ([^)]*)\)", (SHIM / "CMakeLists.txt").read_text())
SANITIZERS = _flags.split()
SCHEDULES = ("forward", "reverse", "random:1", "random:2", "random:3")

RIGHT = (
    "block_reduction",
    "extremes",
    "shuffles",
    "ballots",
    "half_warp",
    "atomics",
    "reverse",
    "rounds",
    "lockstep",
    "two_stages",
    "cooperative_ring",
    "clusters",
    "early_exit",
    "coordinates",
    "large_arguments",
    "vectors",
    "nothing",
    "counts_launches",
    "asks_once",
    "recovers",
)

# Kernels whose result depends on the order of threads or blocks, because something is missing.
ORDER_DEPENDENT = (
    "missing_barrier",
    "missing_second_barrier",
    "missing_syncwarp",
    "highest_block_is_last",
    "uninitialized_shared",
)

# Command: what the sanitizer's report must say, beside the line on which the fault was planted.
SANITIZER_FAULTS = {
    "global_over_read": r"heap-buffer-overflow[\s\S]*READ of size 4",
    "shared_over_read": r"heap-buffer-overflow[\s\S]*READ of size 4",
    "dynamic_over_write": r"heap-buffer-overflow[\s\S]*WRITE of size 4",
    "tail_read": r"heap-buffer-overflow[\s\S]*READ of size 16",
    "tail_write": r"heap-buffer-overflow[\s\S]*WRITE of size 4",
    "stale_shared": r"heap-use-after-free",
    "index_overflow": r"signed integer overflow: 65536 \* 32768",
    "parameter_over_read": r"heap-buffer-overflow|out of bounds",
    "stack_overflow": r"stack-overflow",
}

# Command: what the error must say; {place} stands for the planted line.
REPORTED_FAULTS = {
    "divergent_barrier": r"divergent barrier: reached __syncthreads .*{place}",
    "deadlock": r"deadlock: 48 threads wait forever\n"
    r"  block \(0, 0, 0\): 16 of 64 threads exited; 45 in __syncthreads .*"
    r"1 in warp shuffle at {place} with mask 0x00000003",
    "dead_lane": r"warp shuffle at {place}.*0xffffffff",
    "short_warp": r"names lanes that the block does not have \(it has 0x0000ffff\)",
    "unnamed_lane": r"{place}: the mask 0x00000002 does not name the calling lane 0",
    "unnamed_source": r"the mask 0x00000003 does not name lane 7",
    "divergent_warp": r"(?=.*divergent warp)(?=.*__syncthreads).*shuffle at {place}",
    "cooperative_too_large": r"too_large: .*CooperativeLaunchTooLarge.*max_resident_blocks",
    "not_cooperative": r"livelock: polls at .*unless the launch is cooperative",
    "cluster_exit": r"cluster_map: block \([01], 0, 0\) has exited",
    "misaligned": r"misaligned address: a 16-byte load",
    "block_too_large": r"block_too_large: launch: a block must have 1 to 1024 threads, got \(1025,",
    "shared_too_large": r"shared_too_large: CUDA error cudaErrorInvalidValue",
    "cluster_does_not_divide": r"must be a multiple of the cluster",
}


def planted_line(command: str) -> int:
    """The line that says it plants this fault; 0 where the fault has no single line."""
    for number, line in enumerate(FAULTS.read_text().splitlines(), start=1):
        if re.search(rf"// PLANTED {command}$", line):
            return number
    return 0


def build(out: Path, *flags: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    command = [
        *compiler.split(),
        *("-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror"),
        *("-ffp-contract=off", "-fno-omit-frame-pointer"),
        "-fno-sanitize-recover=all",
        *flags,
        "-DFUSEREG_CUDA_ON_HOST",
        f"-I{ROOT / 'csrc'}",
        f"-I{SHIM}",
        *(str(path) for path in sorted(SHIM.glob("*.cpp"))),
        str(ROOT / "csrc" / "core" / "cuda_info.cpp"),
        "-xc++",
        *(str(path) for path in SOURCES),
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "libasan" in done.stderr or "libubsan" in done.stderr:
        pytest.skip(f"{compiler} comes without the sanitizers' libraries")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, which is built once for all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    program = folder / "selftest"
    with (folder / "selftest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            build(folder / "selftest.new", *SANITIZERS).rename(program)
    return program


def run(
    program: Path, command: str, schedule: str | None = None, **variables: str
) -> tuple[int, str]:
    """Exit status, and all that was written. An ASan report exits with 99."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "UBSAN_OPTIONS")}
    environment.pop("FUSEREG_HOST_SCHEDULE", None)
    environment["ASAN_OPTIONS"] = "exitcode=99:detect_leaks=0"
    environment.update(variables)
    done = subprocess.run(
        [str(program), command, *([schedule] if schedule else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.all_cases
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("command", RIGHT)
def test_right_kernels_are_right_in_any_order(selftest: Path, command: str, schedule: str) -> None:
    status, output = run(selftest, command, schedule)
    assert (status, output) == (0, "RIGHT\n")


@pytest.mark.parametrize("command", ["orders", "devices"])
def test_the_model(selftest: Path, command: str) -> None:
    status, output = run(selftest, command)
    assert (status, output) == (0, "RIGHT\n")


@pytest.mark.parametrize("command", ORDER_DEPENDENT)
def test_what_is_missing_shows_in_some_order(selftest: Path, command: str) -> None:
    outcomes = [run(selftest, command, schedule) for schedule in SCHEDULES]
    assert any(status == 1 and "MISMATCH" in output for status, output in outcomes), outcomes
    # A race is a wrong result, never a crash.
    assert all(status in (0, 1) for status, _ in outcomes), outcomes


@pytest.mark.parametrize("schedule", ["forward", "random:1"])
@pytest.mark.parametrize("command", SANITIZER_FAULTS)
def test_the_sanitizers_name_the_planted_line(selftest: Path, command: str, schedule: str) -> None:
    status, output = run(selftest, command, schedule)
    assert status != 0, output
    assert not re.search("^(RIGHT|MISMATCH|FAULT)", output, re.MULTILINE), output
    assert re.search(SANITIZER_FAULTS[command], output), output
    line = planted_line(command)
    assert line > 0
    assert re.search(rf"planted_faults\.cu:{line}\b", output), output


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random:1"])
@pytest.mark.parametrize("command", REPORTED_FAULTS)
def test_faults_are_reported_and_do_not_hang(selftest: Path, command: str, schedule: str) -> None:
    status, output = run(selftest, command, schedule)
    assert status == 2, output
    assert output.startswith(f"FAULT: {command.replace('cooperative_too', 'too').split('_')[0]}")
    place = rf"planted_faults\.cu:{planted_line(command)}\b"
    pattern = REPORTED_FAULTS[command].replace("{place}", place)
    assert re.search(pattern, output), output


def test_faults_leak_nothing(selftest: Path) -> None:
    status, output = run(selftest, "recovers", ASAN_OPTIONS="exitcode=99:detect_leaks=1")
    if "LeakSanitizer has encountered a fatal error" in output:
        pytest.skip("LeakSanitizer cannot run here (it needs ptrace)")
    assert (status, output) == (0, "RIGHT\n")


def test_the_schedule_comes_from_the_environment(selftest: Path) -> None:
    status, _ = run(selftest, "highest_block_is_last", FUSEREG_HOST_SCHEDULE="forward")
    assert status == 0
    status, output = run(selftest, "highest_block_is_last", FUSEREG_HOST_SCHEDULE="reverse")
    assert status == 1, output
    status, output = run(selftest, "reverse", FUSEREG_HOST_SCHEDULE="sideways")
    assert status == 2, output
    assert "FUSEREG_HOST_SCHEDULE must be forward, reverse, random" in output


@pytest.mark.slow
def test_the_portable_context_switch(tmp_path: Path) -> None:
    """Processors other than x86-64 switch with ucontext: the same results."""
    program = build(tmp_path / "selftest", "-DFUSEREG_HOST_UCONTEXT", *SANITIZERS)
    for command in ("block_reduction", "atomics", "cooperative_ring", "clusters", "recovers"):
        status, output = run(program, command, "random:1")
        assert status == 0, output
        assert output.startswith("RIGHT\n"), output  # ASan warns of swapcontext after it
    assert run(program, "deadlock")[0] == 2


def test_plain_shared_memory_is_refused(tmp_path: Path) -> None:
    """A static would silently serve all blocks: the error says how to declare it."""
    source = tmp_path / "plain.cu"
    source.write_text(
        '#include "core/cuda.cuh"\n'
        "__global__ void kernel(float* out) { __shared__ float tile[4]; *out = tile[0]; }\n"
    )
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    flags = ["-std=c++17", "-fsyntax-only", "-DFUSEREG_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [compiler, *flags, f"-I{SHIM}", "-xc++", str(source)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "on_the_host_declare_shared_memory_with_FUSEREG_SHARED" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_dialect_is_cuda(tmp_path: Path, source: Path) -> None:
    """Nvcc accepts the same source, for a device."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    done = subprocess.run(
        [
            *(nvcc, "-std=c++17", "-arch=sm_90", "-Werror=all-warnings"),
            *("-Xcompiler=-Wall,-Wextra", f"-I{ROOT / 'csrc'}"),
            *("-c", str(source), "-o", str(tmp_path / "selftest.o")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
