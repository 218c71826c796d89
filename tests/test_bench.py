"""The benchmark harness, with fake timers and providers. Nothing here is timed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusereg.bench.harness import (
    Accuracy,
    Call,
    Case,
    Interrupted,
    Provider,
    Row,
    Settings,
    Workload,
    figures,
    machine,
    report,
    run_case,
    run_cases,
    running,
    timers,
)
from fusereg.bench.harness.cases import quantile, ratio
from fusereg.bench.harness.running import rotated
from fusereg.cli.errors import InputError

CPU = torch.device("cpu")
SETTINGS = Settings(min_time_s=0.0, min_rounds=4, max_rounds=4, min_sample_s=0.0)


class FakeTimer:
    """A timer with given times for each provider; it records the order of the calls."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds
        self.order: list[str] = []
        self.clock = 0.0
        self.prepared: set[str] = set()

    def sample(self, call: Call, repeats: int, prime: bool) -> float:
        name = str(call())
        if name not in self.prepared:  # the harness first measures how long a call takes
            self.prepared.add(name)
            return self.seconds[name][0]
        turn = self.order.count(name)
        self.order.append(name)
        value = self.seconds[name][turn % len(self.seconds[name])]
        self.clock += value * repeats
        return value

    def now(self) -> float:
        return self.clock

    def synchronize(self) -> None:
        return None


def named(name: str) -> Provider:
    return Provider(name, lambda: lambda: name)


def make_case(
    *providers: Provider,
    bytes_moved: int = 0,
    check: Callable[[Call], Accuracy] | None = None,
    **changes: Any,
) -> Case:
    values: dict[str, Any] = {
        "suite": "fake",
        "op": "some op",
        "mode": "value",
        "shape": "10",
        "dtype": torch.float32,
        "device": CPU,
        "tensors": 10,
        "elements": 10,
        "bytes_moved": bytes_moved,
        "memory": 0,
        "setup": lambda: Workload(providers, check),
    }
    return Case(**{**values, **changes})


def row(provider: str, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "suite": "penalty",
        "op": "elastic net",
        "provider": provider,
        "mode": "value",
        "shape": "resnet50",
        "dtype": "float32",
        "device": "cpu",
        "tensors": 161,
        "elements": 1000,
        "bytes": 4000,
        "p20_us": 9.0,
        "p50_us": 10.0,
        "p80_us": 11.0,
        "gb_per_s": 0.4,
        "percent_of_copy": 50.0,
        "vs_eager": 1.0,
        "rounds": 3,
        "repeats": 1,
        "samples_us": [9.0, 10.0, 11.0],
    }
    return Row(**{**values, **changes})


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([3.0], 0.2, 3.0),
        ([2.0, 1.0], 0.5, 1.5),
        ([5.0, 1.0, 3.0], 0.5, 3.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2, 2.0),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 0.8, 5.0),
        ([1.0, 2.0], 0.0, 1.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_quantile(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_quantile_rejects(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        quantile(values, q)


def test_ratio_is_the_median_of_each_rounds_ratio_not_the_ratio_of_medians() -> None:
    eager, own = [10.0, 40.0, 90.0], [1.0, 8.0, 3.0]
    assert ratio(eager, own) == pytest.approx(10.0)  # of 10, 5, 30; the medians would give 40/3
    assert ratio([10.0, None, 90.0], [1.0, 1.0, None]) == pytest.approx(10.0)
    assert ratio([None], [1.0]) is None
    assert ratio([], []) is None


# --- the rounds -----------------------------------------------------------------------------------


def test_rotation_gives_each_provider_each_place_once() -> None:
    orders = [rotated(3, turn) for turn in range(3)]
    assert orders == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_providers_are_interleaved_and_rotated() -> None:
    timer = FakeTimer({"eager": [4.0], "foreach": [2.0], "fusereg": [1.0]})
    rows = run_case(
        make_case(named("eager"), named("foreach"), named("fusereg")), SETTINGS, timer=timer
    )
    rounds = [timer.order[i : i + 3] for i in range(0, len(timer.order), 3)]
    assert rounds == [
        ["eager", "foreach", "fusereg"],
        ["foreach", "fusereg", "eager"],
        ["fusereg", "eager", "foreach"],
        ["eager", "foreach", "fusereg"],
    ]
    assert [r.vs_eager for r in rows] == pytest.approx([1.0, 2.0, 4.0])
    assert [r.rounds for r in rows] == [4, 4, 4]


def test_ratios_come_from_the_same_round() -> None:
    """The machine is ten times slower in two of the rounds: no ratio moves."""
    slow = [1.0, 10.0, 10.0, 1.0]
    timer = FakeTimer({"eager": [6 * s for s in slow], "fusereg": [2 * s for s in slow]})
    rows = run_case(make_case(named("eager"), named("fusereg")), SETTINGS, timer=timer)
    assert rows[1].vs_eager == pytest.approx(3.0)


class CopyAware(FakeTimer):
    """A timer that knows the harness's own copy, which returns a tensor instead of a name."""

    def sample(self, call: Call, repeats: int, prime: bool) -> float:
        result = call()
        return super().sample(
            (lambda: "copy") if isinstance(result, torch.Tensor) else call, repeats, prime
        )


def test_bandwidth_and_percent_of_the_copy() -> None:
    timer = CopyAware({"copy": [1e-3], "eager": [8e-3], "fusereg": [1.25e-3]})
    rows = run_case(
        make_case(named("eager"), named("fusereg"), bytes_moved=8_000_000), SETTINGS, timer=timer
    )
    assert [r.provider for r in rows] == ["copy", "eager", "fusereg"]
    copy, _, own = rows
    assert copy.gb_per_s == pytest.approx(8.0)
    assert copy.percent_of_copy == pytest.approx(100.0)
    assert copy.vs_eager is None
    assert own.p50_us == pytest.approx(1250.0)
    assert own.gb_per_s == pytest.approx(6.4)
    assert own.percent_of_copy == pytest.approx(80.0)
    assert own.vs_eager == pytest.approx(6.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_moves_the_contracts_bytes(dtype: torch.dtype) -> None:
    copied = running.copy_provider(make_case(bytes_moved=4096, dtype=dtype)).make()()
    assert isinstance(copied, torch.Tensor)
    assert 2 * copied.numel() * copied.element_size() == 4096  # read once, written once
    assert bool((copied == 1).all())


def test_host_rows_have_time_a_tensor_and_no_bandwidth() -> None:
    timer = FakeTimer({"eager": [1e-3], "fusereg": [1e-5]})
    rows = run_case(make_case(named("eager"), named("fusereg"), host=True), SETTINGS, timer=timer)
    assert [r.provider for r in rows] == ["eager", "fusereg"]
    assert rows[1].us_per_tensor == pytest.approx(1.0)
    assert rows[1].gb_per_s is None
    assert rows[1].percent_of_copy is None


def test_sampling_stops_by_time_and_never_below_the_least_rounds() -> None:
    timer = FakeTimer({"a": [1.0], "b": [1.0]})
    settings = Settings(min_time_s=5.0, min_rounds=2, max_rounds=100, min_sample_s=0.0)
    assert run_case(make_case(named("a"), named("b")), settings, timer=timer)[0].rounds == 5
    timer = FakeTimer({"a": [1.0], "b": [1.0]})
    settings = Settings(min_time_s=0.0, min_rounds=7, max_rounds=100, min_sample_s=0.0)
    assert run_case(make_case(named("a"), named("b")), settings, timer=timer)[0].rounds == 7
    timer = FakeTimer({"a": [50.0], "b": [50.0]})
    settings = Settings(min_time_s=0.0, min_rounds=7, max_case_s=60.0, min_sample_s=0.0)
    assert run_case(make_case(named("a"), named("b")), settings, timer=timer)[0].rounds == 3


@pytest.mark.parametrize("seconds", [1e-7, 3e-6, 1e-4, 0.5])
def test_a_sample_has_enough_calls(seconds: float) -> None:
    class Constant(FakeTimer):
        def sample(self, call: Call, repeats: int, prime: bool) -> float:
            return seconds

    repeats, seen = timers.choose_repeats(Constant({}), lambda: None, 1e-3)
    assert seen == seconds
    assert repeats * seconds >= 1e-3
    assert repeats == 1 or repeats * seconds <= 3e-3


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_provider_that_cannot_be_made_is_a_row_with_the_reason() -> None:
    def fail() -> Call:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: no compiler\nmore text")

    timer = FakeTimer({"eager": [2.0], "fusereg": [1.0]})
    case = make_case(named("eager"), Provider("torch.compile", fail), named("fusereg"))
    rows = run_case(case, SETTINGS, timer=timer)
    assert [r.provider for r in rows] == ["eager", "torch.compile", "fusereg"]
    assert rows[1].failed == "RuntimeError: InvalidCxxCompiler: no compiler"
    assert rows[1].p50_us is None
    assert rows[2].vs_eager == pytest.approx(2.0)


def test_a_provider_that_fails_while_sampled_does_not_stop_the_others() -> None:
    calls = 0

    def sometimes() -> object:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise MemoryError
        return "bad"

    timer = FakeTimer({"eager": [2.0], "bad": [1.0], "fusereg": [1.0]})
    case = make_case(named("eager"), Provider("bad", lambda: sometimes), named("fusereg"))
    rows = run_case(case, SETTINGS, timer=timer)
    assert rows[1].failed == "MemoryError"
    assert rows[1].p50_us is None
    assert rows[2].rounds == 4
    assert rows[2].vs_eager == pytest.approx(2.0)


def test_without_eager_there_is_no_ratio() -> None:
    rows = run_case(make_case(named("fusereg")), SETTINGS, timer=FakeTimer({"fusereg": [1.0]}))
    assert rows[0].vs_eager is None
    assert rows[0].p50_us == pytest.approx(1e6)


def test_data_that_cannot_be_made_fail_the_case_only() -> None:
    def setup() -> Workload:
        raise RuntimeError("cannot allocate")

    rows = run_case(make_case(setup=setup), SETTINGS, timer=FakeTimer({}))
    assert [r.failed for r in rows] == ["RuntimeError: cannot allocate"]


def test_a_case_that_needs_more_memory_than_is_free_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "free_memory", lambda device: 1_000_000_000)
    rows = run_case(make_case(named("eager"), memory=4_000_000_000), SETTINGS, timer=FakeTimer({}))
    assert rows[0].failed == "skipped: needs about 4.0 GB, 1.0 GB are free"


def test_a_result_that_differs_from_the_reference_is_noted() -> None:
    timer = FakeTimer({"a": [1.0]})
    case = make_case(named("a"), check=lambda call: Accuracy(0.84, 0.01, "value"))
    (measured,) = run_case(case, SETTINGS, timer=timer)
    assert measured.note == "value off by 84 % of the float64 reference"
    assert measured.relative_error == pytest.approx(0.84)
    for error, note in ((math.nan, True), (0.001, False)):
        timer = FakeTimer({"a": [1.0]})
        case = make_case(named("a"), check=lambda call, e=error: Accuracy(e, 0.01))
        assert bool(run_case(case, SETTINGS, timer=timer)[0].note) is note


def test_compile_time_is_reported_apart() -> None:
    timer = FakeTimer({"torch.compile": [1.0]})

    def make() -> Call:
        timer.clock += 37.0
        return lambda: "torch.compile"

    (measured,) = run_case(
        make_case(Provider("torch.compile", make, compiles=True)), SETTINGS, timer=timer
    )
    assert measured.compile_s == pytest.approx(37.0)
    assert measured.p50_us == pytest.approx(1e6)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the limit needs SIGALRM")
def test_compiling_is_given_up_after_the_limit() -> None:
    def forever() -> Call:
        while True:
            try:
                time.sleep(10)
            except Exception:  # as a compiler does that falls back on any error
                continue

    before = signal.getsignal(signal.SIGALRM)
    settings = Settings(min_time_s=0.0, min_rounds=3, min_sample_s=0.0, compile_limit_s=0.05)
    case = make_case(Provider("torch.compile", forever, compiles=True), named("fusereg"))
    rows = run_case(case, settings, timer=FakeTimer({"fusereg": [1.0]}))
    assert rows[0].failed == "not compiled after 0 s, given up"
    assert rows[1].p50_us is not None
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


def test_the_limit_is_silent_outside_the_main_thread() -> None:
    seen: list[str] = []

    def work() -> None:
        with timers.time_limit(0.01):
            seen.append("ran")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["ran"]


def test_ctrl_c_keeps_what_is_measured() -> None:
    class Interrupting(FakeTimer):
        def sample(self, call: Call, repeats: int, prime: bool) -> float:
            if len(self.order) == 7:  # in the fourth round of two providers
                raise KeyboardInterrupt
            return super().sample(call, repeats, prime)

    timer = Interrupting({"eager": [2.0], "fusereg": [1.0]})
    with pytest.raises(Interrupted) as caught:
        run_case(make_case(named("eager"), named("fusereg")), SETTINGS, timer=timer)
    assert {r.provider: r.vs_eager for r in caught.value.rows} == {"eager": 1.0, "fusereg": 2.0}


def test_ctrl_c_ends_the_run_with_the_rows_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> Workload:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "make_timer", lambda *about: FakeTimer({"eager": [1.0]}))
    first = make_case(named("eager"))
    rows, interrupted = run_cases([first, make_case(setup=stop), first], SETTINGS)
    assert interrupted
    assert [r.provider for r in rows] == ["eager"]


# --- output ---------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    rows = [row("copy", vs_eager=None), row("eager"), row("fusereg", vs_eager=2.0)]
    return report.document(rows, machine.describe(CPU), SETTINGS, interrupted=False)


def test_json_has_rows_settings_and_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    report.write_json(path, document())
    data = json.loads(path.read_text())
    assert {"schema", "tool", "interrupted", "machine", "settings", "rows"} == set(data)
    assert {
        "date", "cpu", "physical_cores", "usable_cpus", "caches", "memory_bytes", "kernel",
        "python", "torch", "threads", "fusereg", "isa", "gpu", "git_commit", "load_average",
    } <= set(data["machine"])  # fmt: skip
    assert data["machine"]["torch"] == str(torch.__version__)
    assert {
        "op", "provider", "mode", "shape", "dtype", "bytes", "p20_us", "p50_us", "p80_us",
        "gb_per_s", "percent_of_copy", "vs_eager", "compile_s", "failed", "samples_us",
    } <= set(data["rows"][0])  # fmt: skip
    rows, again = report.read_json(path)
    assert again == data
    assert rows[2] == row("fusereg", vs_eager=2.0)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    report.write_json(path, document())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(path, {"not": math.nan})

    def fail(source: str, target: str) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_json(path, {"tool": "other"})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not written by"),
        ('{"tool": "fusereg bench", "schema": 99}', "99"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        report.read_json(path)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(None, "-"), (0.1234, "0.12 us"), (12.34, "12.3 us"), (999.7, "1.00 ms"),
     (25_400.0, "25.4 ms"), (962_000.0, "962 ms"), (3_900_000.0, "3.90 s")],
)  # fmt: skip
def test_time_text(microseconds: float | None, text: str) -> None:
    assert report.time_text(microseconds) == text


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_shows_losses_failures_and_notes(width: int, terminal: bool) -> None:
    from rich.console import Console

    rows = [
        row("copy", vs_eager=None, percent_of_copy=100.0),
        row("eager"),
        row("torch.compile", failed="Oops: no compiler", p50_us=None),
        row("fusereg", vs_eager=0.5, note="value off by 84 %"),
    ]
    host = row("fusereg", host=True, shape="host", bytes=0, us_per_tensor=0.123, vs_eager=9.0)
    console = Console(record=True, width=width, force_terminal=terminal, file=None, quiet=False)
    report.print_tables(console, [*rows, host], machine.describe(CPU))
    text = console.export_text(clear=False)
    for part in ("0.50x", "(1)", "Oops: no compiler", "value off by 84 %", "0.123", "failed"):
        assert part in text
    for column in ("provider", "p20", "p50", "p80", "GB/s", "% of copy", "vs eager", "us/tensor"):
        assert column in text
    assert "…" not in text  # nothing is cut
    assert report.ratio_style(rows[3]) == "bold red"
    assert report.ratio_style(host) == "green"


def test_markdown_has_every_case_and_its_losses() -> None:
    rows = [
        row("copy"),
        row("eager", samples_us=[9.0, 10.0, 11.0]),
        row("torch.compile", failed="Oops: no | compiler", p50_us=None, samples_us=[]),
        row("fusereg", samples_us=[18.0, 20.0, 22.0], p50_us=20.0),
    ]
    lines = report.markdown(rows, machine.describe(CPU)).splitlines()
    assert lines[0].startswith("| work | mode | dtype | eager | torch.compile | fusereg | vs")
    assert "0.50x (slower)" in lines[2]
    assert "failed (1)" in lines[2]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert any("Oops" in line for line in lines)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(name, dtype=dtype, bytes=size, shape=str(size), percent_of_copy=percent)
        for dtype in ("float32", "bfloat16")
        for size in (10_000, 12_000, 10_000_000)
        for name, percent in (("copy", 100.0), ("eager", 5.0), ("fusereg", 97.0), ("new", 40.0))
    ]
    path = tmp_path / "roof.png"
    figures.write_plot(path, rows, machine.describe(CPU))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        figures.write_plot(path, [row("copy")], machine.describe(CPU))


def test_noise_is_told() -> None:
    assert "40 %" in machine.noise_warning({"others_cpu_share": 0.4})
    assert machine.noise_warning({"others_cpu_share": 0.0}) == ""
    assert machine.noise_warning({}) == ""
    share = machine.OthersMeter().share()
    assert share is None or 0.0 <= share <= 1.0


def test_rows_of_the_suite_that_was_called_optimizer_are_of_optim() -> None:
    assert Row.from_json(row("fusereg", suite="optimizer").to_json()).suite == "optim"
