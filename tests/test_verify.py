"""`fusereg verify`: it passes here, and fails for each way in which a kernel can be wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fusereg
from conftest import Backend
from fusereg import _C
from fusereg.augment import resize_op
from fusereg.cli import checks, main, verify
from fusereg.cli.checks import CheckResult, Inputs, Operation, Pairs, Place, _process, _worker
from fusereg.cli.errors import RENAMED
from kernels_by_name import kernels_by_name

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
PLACE = Place(f"cpu {_C.cpu_isas()[0]}", CPU, _C.cpu_isas()[0])
#: What is in _C and computes nothing that could be held against torch.
NO_KERNELS = {
    "bind_torch", "build_info", "cuda_device_info", "cuda_error", "cpu_isa", "cpu_isas",
    "set_cpu_isa", "scan", "inspect", "philox_words", "batch_norm_plan", "batch_norm_force",
    "batch_norm_layout", "cuda_ballot", "dropout_norm_chunks", "fused_dropout_partials",
    "dropout_constants", "augment_elementary", "set_restore_device", "working_stream",
    "color_program_scratch", "bind_gate", "direct", "drawn_apply", "random_state",
    "dropout_functions", "gaussian_dropout_functions", "activation_dropout_functions",
    "batch_norm_functions", "batch_norm_at_once", "dropout_norm_functions", "bind_owners",
    "bind_random", "drawn_at_once", "fused_dropout_add_functions",
    "cross_entropy_at_once", "cross_entropy_functions",
}  # fmt: skip


@pytest.mark.parametrize("operation", checks.OPERATIONS, ids=lambda operation: operation.name)
def test_every_check_passes_in_every_dtype(
    operation: Operation, dtype: torch.dtype, backend: Backend
) -> None:
    result = checks.run_check(operation, Inputs(backend.device, dtype), backend.name)
    assert result.ok, verify.why(result)


def test_every_room_has_operations() -> None:
    rooms = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"core"}
    assert {RENAMED.get(room, room) for room in rooms} <= set(checks.TECHNIQUES)
    assert {operation.technique for operation in checks.OPERATIONS} == set(checks.TECHNIQUES)
    names = [operation.name for operation in checks.OPERATIONS]
    assert len(names) == len(set(names))


@pytest.fixture
def by_name() -> Iterator[None]:
    with kernels_by_name():
        yield


@pytest.mark.usefixtures("by_name")
def test_every_compiled_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {name for name, value in vars(_C).items() if callable(value) and name[0] != "_"}
    kernels = {name for name in kernels if not isinstance(getattr(_C, name), type)} - NO_KERNELS
    assert {"penalty_forward", "dropout_backward", "optimizer_step"} <= kernels
    called: set[str] = set()

    def spy(name: str) -> Callable[..., Any]:
        right = getattr(_C, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return right(*args, **kwargs)

        return call

    for name in kernels:
        monkeypatch.setattr(_C, name, spy(name))
    resize_op._band.cache_clear()  # its tables are made anew
    with kernels_by_name():
        for operation in checks.OPERATIONS:
            checks.run_check(operation, Inputs(CPU), "cpu")
    assert kernels - called == set()


# --- a broken kernel ------------------------------------------------------------------------------


def _result_of(name: str) -> Callable[[tuple[Any, ...]], torch.Tensor]:
    """Where a kernel's arguments have its first result."""
    positions = {"penalty_forward": 1, "prox_": 0, "optimizer_step": 1, "grad_norm": 2}

    def result(args: tuple[Any, ...]) -> torch.Tensor:
        value = args[positions.get(name, 0)]
        return next(t for t in value if t.numel() > 1) if isinstance(value, list) else value

    return result


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize(
    ("kernel", "technique"),
    [
        ("penalty_forward", "penalty"),
        ("prox_", "penalty"),
        ("dropout_forward", "dropout"),
        ("dropout_backward", "dropout"),
        ("batch_norm_forward", "batch_norm"),
        ("optimizer_step", "optim"),
    ],
)
def test_a_kernel_that_is_a_thousandth_off_fails(
    kernel: str, technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(_C, kernel)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        status = right(*args, **kwargs)
        if status == 0:
            values = _result_of(kernel)(args).detach()
            values.view(-1)[-1:].mul_(1.001).add_(1e-3)
        return status

    monkeypatch.setattr(_C, kernel, wrong)
    wanted = [row for row in checks.OPERATIONS if row.technique == technique]
    results = [checks.run_check(row, Inputs(CPU), "cpu") for row in wanted]
    reasons = [verify.why(result) for result in results if not result.ok]
    assert any(reason.startswith("relative error") for reason in reasons)


def operation_of(pairs: Callable[[Inputs], Pairs]) -> Operation:
    """Return an operation that is compared in this way."""
    return Operation(name="some", formula="", function=torch.ones, pairs=pairs)


def test_bits_that_depend_on_the_thread_count_fail() -> None:
    def call(inputs: Inputs) -> Pairs:
        one = torch.ones(2)
        return [(one + 1e-7 * torch.get_num_threads(), one)]

    row = operation_of(call)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = _worker.called_twice(row, Inputs(CPU), PLACE)
    finally:
        torch.set_num_threads(threads)
    assert not result.ok
    assert result.message == "a second call with 1 thread instead of 2 gave other bits"


def test_bits_that_depend_on_the_instruction_set_fail() -> None:
    row = operation_of(lambda inputs: [(torch.ones(1), torch.ones(1))])
    first = checks.run_check(row, Inputs(CPU), "cpu a")
    same = replace(first, backend="cpu b")
    other = replace(first, backend="cpu c", bits="0")
    elsewhere = replace(first, backend="cuda:0", device="cuda:0", bits="0")
    results = verify.compare_bits([first, same, other, elsewhere])
    assert [result.ok for result in results] == [True, True, False, True]
    assert verify.why(results[2]) == "other bits than on cpu a"


def test_the_table_has_the_worst_of_each_technique() -> None:
    def result(kernel: str, place: str, error: float | None, ok: bool = True) -> CheckResult:
        return CheckResult(
            "snow", kernel, "", place, "cpu", "float32", False, ok, error, 1e-6, None, "0"
        )

    results = [
        result("a", "cpu x", 1e-7), result("b", "cpu x", 5e-7),
        result("a", "cpu y", None, False), result("b", "cpu y", 1e-7),
    ]  # fmt: skip
    header, rows = verify.table(results)
    assert header == ["technique", "on", "float32"]
    assert rows == [["snow", "cpu x", "ok 50 %"], ["snow", "cpu y", "FAILED 1 of 2"]]


# --- the command ----------------------------------------------------------------------------------

SMALL = ["verify", "drop_block", "--dtype", "float32,bfloat16", "--device", "cpu"]


def test_all_is_well_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "verify.json"
    assert main([*SMALL, "--json", str(out)]) == 0
    printed = capsys.readouterr()
    isas = _C.cpu_isas()
    assert f"{4 * len(isas)} of {4 * len(isas)} calls ok" in printed.out
    content = json.loads(out.read_text())
    assert content["ok"] is True
    assert content["places"] == [f"cpu {isa}" for isa in isas]
    assert content["versions"]["fusereg"] == fusereg.__version__
    assert {r["dtype"] for r in content["results"]} == {"float32", "bfloat16"}
    assert {r["backend"] for r in content["results"]} == set(content["places"])
    for isa in isas:
        assert f"cpu {isa}: 4 calls ok" in printed.err


@pytest.mark.parametrize("count", [0, 1])
def test_an_interrupt_leaves_what_there_is(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(place: Place, *_: object) -> list[CheckResult]:
        on_result = _[-1]
        assert callable(on_result)
        for operation in checks.OPERATIONS[:count]:
            on_result(checks.run_check(operation, Inputs(place.device), place.name))
        raise KeyboardInterrupt

    monkeypatch.setattr(_process, "verify_place", work)
    out = tmp_path / "verify.json"
    assert main([*SMALL, "--json", str(out)]) == 130
    printed = capsys.readouterr()
    assert f"{count} calls ok, then interrupted, of 4" in printed.err
    assert "fusereg verify: interrupted" in printed.err
    assert f"{count} of {count} calls ok" in printed.out
    content = json.loads(out.read_text())
    assert (content["ok"], content["interrupted"]) == (False, True)
    assert len(content["results"]) == count


def _broken_worker(code: str) -> Callable[[], list[str]]:
    """A worker that first runs this, as a broken build would be broken from the start."""
    program = (
        "import os, sys, signal; from fusereg import _C; from fusereg.cli.checks import _worker\n"
        f"{code}\nsys.exit(_worker.main())"
    )
    return lambda: [sys.executable, "-c", program]


WRONG = """
right = _C.drop_block_forward
def wrong(y, *rest):
    status = right(y, *rest)
    y.mul_(1.01)
    return status
_C.drop_block_forward = wrong
"""
DIES = """
right = _C.drop_block_backward
def dies(*arguments):
    os.kill(os.getpid(), signal.SIGILL)
_C.drop_block_backward = dies
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [(WRONG, "relative error 1.0e-02, allowed 1e-06"), (DIES, "its process was ended by SIGILL")],
    ids=["wrong", "dies"],
)
def test_a_broken_build_fails(
    code: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_process, "worker_command", _broken_worker(code))
    isa = _C.cpu_isas()[0]
    small = ["verify", "drop_block", "--dtype", "float32", "--isa", isa, "--device", "cpu"]
    assert main([*small, "--json", "-"]) == 1
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["ok"] is False
    assert len(content["results"]) == 2  # the small call and the large one
    assert f"failed: drop_block2d, float32, small, on cpu {isa}: {reason}" in printed.err


def test_after_three_dead_processes_the_rest_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    dies = [sys.executable, "-c", "raise SystemExit('no luck')"]
    monkeypatch.setattr(_process, "worker_command", lambda: dies)
    results = _process.verify_place(PLACE, ["drop_block"], list(checks.TOLERANCES))
    assert len(results) == 8
    assert not any(result.ok for result in results)
    assert results[0].message == "its process ended with exit status 1: no luck"
    assert results[7].message == "not run: 3 processes have died before it"


def test_a_worker_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process, "SECONDS_A_RESULT", 0.2)
    monkeypatch.setattr(_process, "MAX_DEATHS", 1)
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(_process, "worker_command", lambda: hangs)
    results = _process.verify_place(PLACE, ["drop_block"], [torch.float32])
    assert results[0].message == "its process gave nothing for 0 s and was ended"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nothing"], "no technique named 'nothing'; there are:"),
        (["penalty,dropout,batchnorm"], "no technique named 'batchnorm'; there are:"),
        (["batchnorm"], "; did you mean batch_norm?"),
        (["--dtype", ","], "--dtype: no dtype named ','"),
        (["--device", "tpu"], "--device: no device named 'tpu'; there are: cpu"),
        (["--dtype", "int8"], "--dtype: no dtype named 'int8'; there are: float64, float32,"),
        (["--isa", "mmx"], "--isa: no instruction set here that is named 'mmx'; there are:"),
        (["--device", "cuda:99"], "--device cuda:99: not here"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *words]) == 2
    assert part in capsys.readouterr().err


def test_the_instruction_set_comes_from_the_environment() -> None:
    """The worker refuses to check another one than it was asked to."""
    if len(_C.cpu_isas()) < 2:
        pytest.skip("this machine has one instruction set")
    other = next(isa for isa in _C.cpu_isas() if isa != _C.cpu_isa())
    words = ["--name", "cpu", "--device", "cpu", "--isa", other, "--techniques", "penalty"]
    with pytest.raises(RuntimeError, match=f"FUSEREG_CPU_ISA={other} was not heeded"):
        _worker.main([*words, "--dtypes", "float32"])
