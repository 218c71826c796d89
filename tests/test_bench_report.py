"""The benchmark's report: overview, figures, page, and two runs side by side. Nothing is timed."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fusereg.bench import SUITES, provider_names
from fusereg.bench.harness import (
    Call,
    Facts,
    Row,
    Settings,
    Workload,
    charts,
    command,
    compare,
    figures,
    machine,
    page,
    report,
    run_case,
    running,
)
from fusereg.cli import main
from fusereg.cli.errors import InputError
from fusereg.core.pictures import MARKERS
from test_bench import SETTINGS, FakeTimer, make_case, named, row

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def run_rows() -> list[Row]:
    """Two techniques on two devices, in two dtypes, with a loss, a failure and a host case."""
    rows = []
    for device in ("cpu", "cuda"):
        for suite in ("penalty", "drop_block"):
            for dtype, size in (("float32", 10_000), ("bfloat16", 80_000_000)):
                same: dict[str, Any] = {
                    "suite": suite, "dtype": dtype, "bytes": size, "device": device,
                }  # fmt: skip
                loss = suite == "penalty" and dtype == "bfloat16"
                rows += [
                    row("copy", vs_eager=None, gb_per_s=10.0, percent_of_copy=100.0, **same),
                    row("eager", gb_per_s=1.0, **same),
                    row("torch.compile", failed="Oops: <no> compiler", p50_us=None, **same),
                    row("fusereg", gb_per_s=8.0, vs_eager=0.5 if loss else 4.0, **same),
                ]
    rows.append(row("fusereg", host=True, shape="host", bytes=0, gb_per_s=None, vs_eager=2.0))
    return rows


# --- overview and figures -------------------------------------------------------------------------


def test_the_overview_has_a_line_for_each_technique_and_device() -> None:
    lines = report.overview(run_rows())
    assert [(line.suite, line.device) for line in lines] == [
        ("penalty", "cpu"), ("drop_block", "cpu"), ("penalty", "cuda"), ("drop_block", "cuda"),
    ]  # fmt: skip
    first = lines[0]
    assert (first.cases, first.slower, first.failed) == (3, 1, 0)
    assert (first.lowest, first.median, first.highest) == (0.5, 2.0, 4.0)
    assert first.cells()[-2:] == ("1", "-")


def test_the_overview_counts_what_failed() -> None:
    rows = [row("eager"), row("fusereg", p50_us=None, vs_eager=None, failed="Oops")]
    (line,) = report.overview(rows)
    assert (line.failed, line.median) == (1, None)
    (line,) = report.overview([row("all", p50_us=None, failed="skipped: needs memory")])
    assert line.failed == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_roofline_for_each_device_and_dtype(device: str) -> None:
    drawn = charts.rooflines(run_rows(), device)
    assert list(drawn) == [f"Roofline: {device}, float32", f"Roofline: {device}, bfloat16"]
    for chart in drawn.values():
        names = [trace["name"] for trace in chart["data"]]
        assert names == ["copy: the roof", "eager torch", "penalty", "drop_block"]


def test_every_suite_has_a_color_and_marker_of_its_own() -> None:
    names = [*SUITES, *(f"new{number}" for number in range(60))]
    style = figures.styles(names)
    assert len({style[name] for name in names}) == len(names)
    rows = [
        row(provider, suite=suite, gb_per_s=5.0, bytes=1000)
        for suite in SUITES
        for provider in ("copy", "eager", "fusereg")
    ]
    (chart,) = charts.rooflines(rows, "cpu").values()
    marks = [trace["marker"] for trace in chart["data"] if trace["name"] in SUITES]
    looks = {(mark["color"], mark["symbol"]) for mark in marks}
    assert len(looks) == len(marks) == len(SUITES)
    assert charts.SYMBOLS.keys() >= set(MARKERS)
    assert len(set(charts.SYMBOLS.values())) == len(charts.SYMBOLS)


def test_every_provider_has_a_color_and_marker_of_its_own() -> None:
    for suite in SUITES:
        names = provider_names(suite)
        style = figures.styles(names, figures.PROVIDERS)
        assert len({style[name] for name in names}) == len(names)


def test_every_mark_names_its_case_and_no_line_is_lost() -> None:
    (chart,) = charts.speeds(run_rows(), "all").values()
    assert sum(len(trace["x"]) for trace in chart["data"]) == 9  # not eager's, nor what failed
    for trace in chart["data"]:
        assert len(trace["x"]) == len(trace["y"]) == len(trace["text"])
        assert set(trace["y"]) <= set(chart["layout"]["yaxis"]["categoryarray"])


def test_nothing_to_draw_is_no_error() -> None:
    assert charts.rooflines(run_rows(), "tpu") == {}
    assert charts.rooflines([row("copy"), row("eager")], "cpu") == {}
    assert charts.speeds([row("copy", vs_eager=None), row("eager")], "") == {}


# --- the page -------------------------------------------------------------------------------------


class _Reader(html.parser.HTMLParser):
    """Checks that elements are closed, and collects what a browser would load."""

    EMPTY = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset") and str(value)[:1] != "#":
                self.loads.append(str(value))
            if name == "id":
                self.ids.append(str(value))
        if tag in ("img", "iframe", "object"):
            self.loads.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(text: str) -> _Reader:
    """Read a page but for plotly, which is in it once."""
    text = re.sub(r'<script id="plotly">.*?</script>', "", text, flags=re.DOTALL)
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_else() -> None:
    pytest.importorskip("plotly")
    text = page.report(run_rows(), machine.describe(CPU), interrupted=False)
    reader = read_page(text)
    assert reader.loads == ["data:,"]  # no icon
    assert text.count("plotly.js v") == 1
    text = re.sub(r'<script id="plotly">.*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "</script><b>" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert {"penalty", "drop_block", "machine"} <= set(reader.ids)
    # On each device a roofline a dtype, and each technique's speeds.
    assert text.count('<div class="chart"') == 4 + 4
    for part in ("Roofline: cpu", "Roofline: cuda", str(torch.__version__), "0.50x", "(1)"):
        assert part in reader.text
    assert "Oops: <no> compiler" in reader.text  # escaped in the page
    assert '<td class="loss">0.50x</td>' in text
    assert "Interrupted" not in reader.text


def test_an_interrupted_or_noisy_run_says_so() -> None:
    pytest.importorskip("plotly")
    facts = {**machine.describe(CPU), "others_cpu_share": 0.4}
    reader = read_page(page.report(run_rows(), facts, interrupted=True))
    assert "Interrupted: this is not the whole run." in reader.text
    assert "40 %" in reader.text


# --- two runs -------------------------------------------------------------------------------------


def spread(p20: float, p50: float, p80: float, provider: str = "fusereg", **changes: Any) -> Row:
    return row(provider, p20_us=p20, p50_us=p50, p80_us=p80, rounds=11, **changes)


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        ((9.0, 10.0, 11.0), (10.0, 12.0, 14.0), False),  # the ranges meet
        ((9.0, 10.0, 11.0), (11.5, 12.0, 14.0), True),
        ((9.0, 10.0, 11.0), (7.0, 8.0, 8.5), True),
        ((9.0, 10.0, 30.0), (29.0, 29.5, 30.0), False),  # the old run was noisy
        ((9.0, 10.0, 11.0), (11.0, 12.0, 13.0), False),
    ],
)
def test_only_what_is_beyond_the_noise_has_moved(
    old: tuple[float, ...], new: tuple[float, ...], moved: bool
) -> None:
    found = compare.compare([spread(*old)], [spread(*new)])
    assert [change.moved for change in found.changes] == [moved]
    assert len(found.moved) == moved


def test_rows_are_matched_by_case_and_provider() -> None:
    old = [spread(1, 1, 1), spread(2, 2, 2, "eager"), spread(1, 1, 1, shape="gone")]
    new = [spread(2, 2, 2, "eager"), spread(3, 3, 3), spread(1, 1, 1, device="cuda")]
    found = compare.compare(old, new)
    assert [(c.new.provider, c.ratio) for c in found.changes] == [("eager", 1.0), ("fusereg", 3.0)]
    assert (found.only_old, found.only_new) == (1, 1)
    assert found.yardsticks == 1.0


def test_slower_is_fuseregs_own_and_beyond_the_limit() -> None:
    old = [spread(9, 10, 11), spread(9, 10, 11, "eager"), spread(9, 10, 11, mode="b")]
    new = [spread(12, 13, 14), spread(90, 91, 92, "eager"), spread(5, 6, 7, mode="b")]
    found = compare.compare(old, new)
    assert [change.own for change in found.moved] == [False, True, True]
    assert [change.ratio for change in found.slower(0.0)] == [1.3]
    assert found.slower(35.0) == []


def test_what_no_longer_runs_counts_as_slower() -> None:
    gone = row("fusereg", p20_us=None, p50_us=None, p80_us=None, failed="Oops")
    found = compare.compare([spread(9, 10, 11)], [gone])
    assert [compare.percent(change) for change in found.slower(50.0)] == ["failed"]
    assert "1 failed" in compare.remarks(found, {}, {})[0]
    assert compare.compare([gone], [gone]).moved == []


def test_another_machine_and_few_rounds_are_remarked() -> None:
    found = compare.compare([row("fusereg")], [row("fusereg")])  # 3 rounds
    lines = "\n".join(
        compare.remarks(found, {"cpu": "A", "threads": 2}, {"cpu": "B", "threads": 2})
    )
    assert "not the same cpu: A before, B now" in lines
    assert "threads" not in lines
    assert "fewer than 11 rounds" in lines


@pytest.mark.parametrize("busy", ["old", "new"])
def test_runs_beside_other_programs_are_no_fair_comparison(
    busy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for name, times in (("old", (9, 10, 11)), ("new", (19, 20, 21))):
        share = 0.94 if name == busy else 0.01
        path = tmp_path / f"{name}.json"
        names.append(write_run(path, [spread(*times)], others_cpu_share=share))
    assert main(["bench", "--compare", *names]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"not a fair comparison: other programs took 94 % of the CPU time during the {busy}" in text
    )
    assert main(["bench", "--compare", *names, "--fail-on-slower"]) == 2
    printed = capsys.readouterr()
    assert "--fail-on-slower: not a fair comparison" in " ".join(printed.err.split())
    assert printed.out == ""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda path: path.stem
)
def test_stored_results_are_readable(path: Path) -> None:
    rows, data = report.read_json(path)
    assert {r.suite for r in rows} <= set(SUITES)
    assert {r.provider for r in rows} <= {"copy", *provider_names(rows[0].suite)}
    assert machine.summary(data["machine"])


def write_run(path: Path, rows: list[Row], **changes: Any) -> str:
    facts = {**machine.describe(CPU), **changes}
    report.write_json(path, report.document(rows, facts, Settings(), interrupted=False))
    return str(path)


@pytest.mark.parametrize("key", Row.__dataclass_fields__)
def test_a_row_with_a_value_of_another_kind_is_wrong_input(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = spread(9, 10, 11).to_json()
    kind = str(Row.__dataclass_fields__[key].type)
    wrong: list[Any] = [{}, {"a": 1}] + ([] if kind == "str" else ["text"])
    wrong += [] if "None" in kind and "list" not in kind else [None]
    wrong += [] if "list" in kind else [[], [1]]
    wrong += [7] if kind in ("str", "bool") else [True, float("nan"), 1e999]
    wrong += [-1.0, 0.0] if key.endswith("_us") else []
    if "list" in kind:
        wrong += [9.0, [9.0, "text"], [9.0, True], [-1.0]]
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=f"{key} must be"):
            Row.from_json({**good, key: value})
    path = tmp_path / "run.json"
    write_run(path, [spread(9, 10, 11)])
    data = json.loads(path.read_text())
    data["rows"][0][key] = wrong[0]
    path.write_text(json.dumps(data))
    assert main(["bench", "--compare", str(path), str(path), "--fail-on-slower"]) == 2
    printed = capsys.readouterr()
    assert f"has a row that cannot be read: {key} must be" in " ".join(printed.err.split())


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "text"},
        {"rows": None},
        {"rows": ["text"]},
        {"rows": [[1]]},
        {"rows": [{}]},
        {"rows": {"items": 1}},
        {"machine": "text"},
        {"machine": []},
    ],
    ids=str,
)
def test_a_document_of_another_kind_is_wrong_input(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_run(path, [spread(9, 10, 11)])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"has a row that cannot be read|must have a list of rows"):
        report.read_json(path)
    for text in (b"\xff\xfe", b"[" * 100_000, b"[1"):
        path.write_bytes(text)
        with pytest.raises(InputError, match="is not JSON"):
            report.read_json(path)


def test_compare_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_run(tmp_path / "old.json", [spread(9, 10, 11), spread(9, 10, 11, "eager")])
    new = write_run(tmp_path / "new.json", [spread(12, 13, 14), spread(9, 10, 11, "eager")])
    out = tmp_path / "moved.html"
    assert main(["bench", "--compare", old, new, "--html", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "+30 %" in printed
    assert "of 1 times of fusereg: 1 slower, 0 faster" in printed
    reader = read_page(out.read_text())
    assert "+30 %" in reader.text
    assert reader.loads == ["data:,"]
    assert "Plotly" not in reader.text or "plotly.js" not in out.read_text()
    assert main(["bench", "--compare", old, new, "--fail-on-slower"]) == 1
    assert main(["bench", "--compare", old, new, "--fail-on-slower", "40"]) == 0
    assert main(["bench", "--compare", new, old, "--fail-on-slower"]) == 0
    other = write_run(tmp_path / "other.json", [spread(1, 1, 1, shape="other")])
    capsys.readouterr()
    assert main(["bench", "--compare", old, other]) == 2
    assert "no case in common" in capsys.readouterr().err


# --- the command ----------------------------------------------------------------------------------

TINY = ["penalty", "--all", "--quick", "--only", "tiny", "--device", "cpu", "--min-time", "0"]


@pytest.mark.slow
def test_all_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    assert main(["bench", *TINY, "--report", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr()
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"report.json", "report.html"}
    assert "Times faster than eager torch" in printed.out
    assert "wrote " in printed.err
    rows, data = report.read_json(tmp_path / "r" / "report.json")
    assert {r.dtype for r in rows} == {"float32", "bfloat16"}
    assert {"git_commit", "torch", "fusereg"} <= set(data["machine"])
    assert "penalty" in read_page((tmp_path / "r" / "report.html").read_text()).ids

    out = tmp_path / "again.html"
    again = ["--from", str(tmp_path / "r" / "report.json"), "--html", str(out)]
    assert main(["bench", *again]) == 0
    assert out.read_text() == (tmp_path / "r" / "report.html").read_text()


def test_ctrl_c_writes_the_report_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    right, calls = running.run_case, []

    def stops(case: Any, *args: Any, **kwargs: Any) -> list[Row]:
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(case, *args, **kwargs)

    monkeypatch.setattr(running, "run_case", stops)
    assert main(["bench", *TINY, "--report", str(tmp_path)]) == 130
    err = " ".join(capsys.readouterr().err.split())
    assert "interrupted: what was measured until then, 1 of 6 cases, follows" in err
    assert json.loads((tmp_path / "report.json").read_text())["interrupted"] is True
    assert "Interrupted" in (tmp_path / "report.html").read_text()


def test_ctrl_c_before_the_first_case_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*args: Any, **kwargs: Any) -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_case", stops)
    assert main(["bench", *TINY, "--report", str(tmp_path)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_both_devices_only_where_all_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(name: str, everything: bool) -> list[str]:
        return [str(device) for device in command.choose_devices(name, everything)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices("auto", True) == ["cpu", "cuda"]
    assert devices("auto", False) == ["cuda"]
    assert devices("cpu", True) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices("auto", True) == ["cpu"]
    with pytest.raises(InputError, match="no CUDA device"):
        devices("cuda", True)


@pytest.mark.parametrize(
    ("elapsed", "done", "total", "text"),
    [(10.0, 1, 3, ""), (600.0, 1, 3, " (about 20 min left)"), (600.0, 3, 3, "")],
)
def test_time_left(elapsed: float, done: int, total: int, text: str) -> None:
    assert command.time_left(elapsed, done, total) == text


def test_a_table_for_each_device() -> None:
    from rich.console import Console

    console = Console(record=True, width=200, quiet=False)
    report.print_tables(console, run_rows(), machine.describe(CPU))
    text = console.export_text()
    assert re.search(r"^cpu$", text, re.MULTILINE)
    assert re.search(r"^cuda$", text, re.MULTILINE)
    assert "cpu: Host overhead" in text


def test_without_plotly_the_report_is_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    for option, package in (("--html", "plotly"), ("--plot", "matplotlib")):
        assert main(["bench", *TINY, option, str(tmp_path / "r")]) == 2
        assert f"fusereg bench {option} needs {package}, " in capsys.readouterr().err
    assert main(["bench", *TINY, "--report", str(tmp_path / "r")]) == 0
    assert "its page needs plotly" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["report.json"]


# --- whole training -------------------------------------------------------------------------------


def whole_rows() -> list[Row]:
    """A network's training by both, fusereg slower, and one provider that is not judged."""
    same: dict[str, Any] = {
        "suite": "end_to_end", "op": "training", "mode": "step", "bytes": 0,
        "gb_per_s": None, "percent_of_copy": None,
    }  # fmt: skip
    return [
        row("eager", peak_bytes=49_000_000, test_accuracy=0.978, **same),
        row("torch.compile", compile_s=20.0, vs_eager=1.25, **same),
        row("fusereg", peak_bytes=36_400_000, test_accuracy=0.981, vs_eager=0.5, **same),
    ]


def test_whole_training_has_memory_and_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    facts = machine.describe(CPU)
    report.print_tables(Console(width=200), [*run_rows(), *whole_rows()], facts)
    said = capsys.readouterr().out
    for part in ("Whole training steps", "memory", "accuracy", "49.0 MB", "97.8 %", "98.1 %"):
        assert part in said
    lines = report.markdown(whole_rows(), facts).splitlines()
    assert (
        lines[0] == "| network and batch | dtype | provider | step | vs eager | memory | accuracy |"
    )
    assert "| eager | 10.0 us | 1.00x | 49.0 MB | 97.8 % |" in lines[2]
    assert "| torch.compile | 10.0 us (+20 s once) | 1.25x | - | - |" in lines[3]
    assert "| fusereg | 10.0 us | 0.50x (slower) | 36.4 MB | 98.1 % |" in lines[4]
    again = Row.from_json(json.loads(json.dumps(whole_rows()[2].to_json())))
    assert again == whole_rows()[2]


def test_whole_training_on_the_page() -> None:
    pytest.importorskip("plotly")
    text = page.report(whole_rows(), machine.describe(CPU), interrupted=False)
    reader = read_page(text)
    for part in ("49.0 MB", "36.4 MB", "98.1 %", "0.50x"):
        assert part in reader.text
    assert "Roofline" not in reader.text  # there is no bandwidth to draw
    assert '<td class="loss">0.50x</td>' in text


def test_facts_are_found_out_after_all_times() -> None:
    """And one that cannot be is a row with the reason; its rivals keep theirs."""
    timer = FakeTimer({"eager": [2.0], "fusereg": [1.0]})

    def facts(call: Call) -> Facts:
        assert len(timer.order) == 8, "before the last round"
        if call() == "fusereg":
            raise RuntimeError("diverged")
        return Facts(peak_bytes=7, test_accuracy=0.5)

    case = make_case(setup=lambda: Workload([named("eager"), named("fusereg")], facts=facts))
    eager, own = run_case(case, SETTINGS, timer=timer)
    assert (eager.peak_bytes, eager.test_accuracy) == (7, 0.5)
    assert (own.failed, own.p50_us) == ("RuntimeError: diverged", None)
