"""The rows as JSON, as tables for the terminal, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusereg.cli import output
from fusereg.cli.errors import InputError
from fusereg.core import screen

from . import machine as machine_facts
from .cases import COPY, EAGER, OWN, Row, Settings, cases_of, own_row, quantile, ratio

SCHEMA = 1
# The width of the table with all columns; on narrower terminals a case's name becomes a heading.
FULL_WIDTH = 138


# --- JSON -----------------------------------------------------------------------------------------


def document(
    rows: Sequence[Row], machine: dict[str, Any], settings: Settings, interrupted: bool
) -> dict[str, Any]:
    """Return the run as a JSON object. Times are in microseconds, percentages in percent."""
    return {
        "schema": SCHEMA,
        "tool": "fusereg bench",
        "interrupted": interrupted,
        "machine": machine,
        "settings": asdict(settings),
        "rows": [row.to_json() for row in rows],
    }


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write the file completely or not at all: a run of an hour must not leave half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    output.write_json(str(path), data)


def read_json(path: str | Path) -> tuple[list[Row], dict[str, Any]]:
    """Return rows and document of a file that :func:`write_json` wrote.

    Raises:
        InputError: If it is not such a file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("tool") != "fusereg bench":
        raise InputError(f"{path} was not written by fusereg bench --json")
    if data.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {data.get('schema')}, this version reads {SCHEMA}")
    rows, facts = data.get("rows"), data.get("machine")
    if not isinstance(rows, list) or not isinstance(facts, dict):
        raise InputError(f"{path} must have a list of rows and an object of the machine")
    try:
        return [Row.from_json(row) for row in rows], data
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} has a row that cannot be read: {error}") from error


# --- numbers --------------------------------------------------------------------------------------


def time_text(microseconds: float | None) -> str:
    """Return three significant digits with a unit."""
    if microseconds is None:
        return "-"
    for limit, factor, unit in ((999.5, 1.0, "us"), (999.5e3, 1e-3, "ms")):
        if microseconds < limit:
            return f"{three_digits(microseconds * factor)} {unit}"
    return f"{three_digits(microseconds * 1e-6)} s"


def three_digits(value: float) -> str:
    """Return three significant digits."""
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    if value >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}"


def ratio_text(value: float | None) -> str:
    """Return a ratio to eager's time."""
    return "-" if value is None else f"{three_digits(value)}x"


def percent_text(value: float | None) -> str:
    """Return a percentage without its sign."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}" if value >= 0.095 else f"{value:.1g}"


def memory_text(count: int | None) -> str:
    """Return bytes in megabytes."""
    return "-" if count is None else f"{count * 1e-6:.1f} MB"


def accuracy_text(share: float | None) -> str:
    """Return a share in percent; 1,000 test images resolve a tenth."""
    return "-" if share is None else f"{100 * share:.1f} %"


class Footnotes:
    """Numbered remarks; the same remark gets the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, *texts: str) -> str:
        """Return the mark of the remarks that are not empty."""
        numbers = []
        for text in texts:
            if text:
                if text not in self.texts:
                    self.texts.append(text)
                numbers.append(str(self.texts.index(text) + 1))
        return f" ({','.join(numbers)})" if numbers else ""


# --- tables ---------------------------------------------------------------------------------------

WHOLE, HOST = "Whole training steps", "Host overhead, tensors of few elements"
_ABOUT_WHOLE = (
    "memory: the most that torch held in two steps, weights and states included. "
    "accuracy: on test images, trained to the end. vs eager: of the step's time."
)
_ABOUT_BANDWIDTH = (
    "GB/s: bytes by contract over p50. % of copy: against a copy that moves as many "
    "bytes, in the same rounds. vs eager: median of the rounds; below 1 is slower."
)


def sections(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return titled groups of rows whose tables have the same columns: the large ones first."""
    parts = [
        ("", [row for row in rows if not row.host and not row.whole]),
        (WHOLE, [row for row in rows if row.whole]),
        (HOST, [row for row in rows if row.host]),
    ]
    return [(title, part) for title, part in parts if part]


def print_tables(console: Console, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Print the tables of each device, then the notes and the machine."""
    notes = Footnotes()
    devices = list(dict.fromkeys(row.device for row in rows))
    screen.at_least(console, FULL_WIDTH)
    wide = console.width >= FULL_WIDTH
    for device in devices:
        for title, part in sections([row for row in rows if row.device == device]):
            heading = ": ".join(
                text for text in (device if len(devices) > 1 else "", title) if text
            )
            if heading:
                console.print(Text(heading, style="bold"))
            if wide:
                console.print(_table(part, notes, wide=True))
                continue
            for group in cases_of(part):
                console.print(Text(group[0].name, style="bold"))
                console.print(_table(group, notes, wide=False))
    remarks = [f"({number}) {text}" for number, text in enumerate(notes.texts, start=1)]
    remarks += [
        compile_times(rows),
        _ABOUT_WHOLE if any(row.whole for row in rows) else "",
        _ABOUT_BANDWIDTH if any(not row.host and not row.whole for row in rows) else "",
        machine_facts.summary(machine),
    ]
    for text in filter(None, remarks):
        console.print(Text(text), style="dim")
    if warning := machine_facts.noise_warning(machine):
        console.print(Text(warning), style="yellow")


def _special(row: Row) -> dict[str, str]:
    """Return the columns that only some sections have."""
    if row.host:
        return {"us/tensor": "-" if row.us_per_tensor is None else f"{row.us_per_tensor:.3f}"}
    if row.whole:
        return {"memory": memory_text(row.peak_bytes), "accuracy": accuracy_text(row.test_accuracy)}
    return {
        "GB/s": "-" if row.gb_per_s is None else three_digits(row.gb_per_s),
        "% of copy": percent_text(row.percent_of_copy),
    }


def _table(rows: Sequence[Row], notes: Footnotes, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if wide:
        table.add_column("op", no_wrap=True)
    # Fixed in the narrow layout, where each case is a table, so that their columns line up.
    table.add_column("provider", no_wrap=True, min_width=None if wide else 17)
    if wide:
        for name in ("mode", "shape", "dtype"):
            table.add_column(name, no_wrap=True)
    for name in ("p20", "p50", "p80", *_special(rows[0]), "vs eager"):
        width = 7 if name.startswith("p") else 5 if name == "GB/s" else len(name)
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for group in cases_of(rows):
        for row in group:
            table.add_row(*_cells(row, notes, wide), end_section=row is group[-1])
    return table


def _cells(row: Row, notes: Footnotes, wide: bool) -> list[Text]:
    style = "bold" if row.provider.startswith("fusereg") else "dim" if row.provider == COPY else ""
    cells = [Text(row.provider + notes.mark(row.failed, row.note), style=style)]
    if wide:
        cells = [Text(row.op), *cells, Text(row.mode), Text(row.shape), Text(row.dtype)]
    times = [Text(time_text(value)) for value in (row.p20_us, row.p50_us, row.p80_us)]
    if row.failed:
        times = [Text("-"), Text(failure_text(row), "red"), Text("-")]
    numbers = [Text("-" if row.failed else text) for text in _special(row).values()]
    return [*cells, *times, *numbers, Text(ratio_text(row.vs_eager), ratio_style(row))]


def failure_text(row: Row) -> str:
    """Return what stands in place of the time of a provider that has none."""
    return "skipped" if row.failed.startswith("skipped") else "failed"


def compile_times(rows: Sequence[Row]) -> str:
    """Return how long compiling took, which the times a call do not show; empty if none did."""
    parts = [
        f"{row.shape} {row.mode} {row.dtype} {row.compile_s:.1f} s"
        for row in rows
        if row.compile_s is not None and not row.failed
    ]
    return f"Time to compile, once: {'; '.join(parts)}" if parts else ""


def ratio_style(row: Row) -> str:
    """Return the style of the ratio: losses are as visible as wins."""
    if row.vs_eager is None or row.provider == EAGER:
        return ""
    return "bold red" if row.vs_eager < 1.0 else "green"


def case_line(rows: Sequence[Row]) -> str:
    """Return one line for a case that has just been measured, for logs."""
    first = rows[0]
    parts = []
    for row in rows:
        if row.failed:
            parts.append(f"{row.provider} failed")
        elif row.provider != COPY:
            ratio_part = f" {ratio_text(row.vs_eager)}" if row.provider != EAGER else ""
            parts.append(f"{row.provider} {time_text(row.p50_us)}{ratio_part}")
    return f"{first.op} {first.mode} {first.shape} {first.dtype}: {', '.join(parts)}"


# --- overview -------------------------------------------------------------------------------------

OVERVIEW_HEADER = (
    "technique", "on", "cases", "lowest", "median", "highest", "copy", "slower", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Overview:
    """One technique on one device: fusereg's own rows, those that have a rival to be compared with.

    ``slower`` counts the cases below 1; ``failed`` those that have no time.
    """

    suite: str
    device: str
    cases: int
    lowest: float | None
    median: float | None
    highest: float | None
    of_copy: float | None
    slower: int
    failed: int

    def cells(self) -> tuple[str, ...]:
        """Return the line under OVERVIEW_HEADER."""
        ratios = map(ratio_text, (self.lowest, self.median, self.highest))
        share = "-" if self.of_copy is None else f"{percent_text(self.of_copy)} %"
        counts = (str(self.slower or "-"), str(self.failed or "-"))
        return (self.suite, self.device, str(self.cases), *ratios, share, *counts)


def overview(rows: Sequence[Row]) -> list[Overview]:
    """Return a line for each technique and device, in the order of the rows."""
    groups: dict[tuple[str, str], list[list[Row]]] = {}
    for case in cases_of(rows):
        groups.setdefault((case[0].suite, case[0].device), []).append(case)
    lines = []
    for (suite, device), cases in groups.items():
        own = [row for row in map(own_row, cases) if row is not None]
        ratios = [row.vs_eager for row in own if row.vs_eager is not None]
        shares = [row.percent_of_copy for row in own if row.percent_of_copy is not None]
        lines.append(
            Overview(
                suite=suite,
                device=device,
                cases=len(cases),
                lowest=min(ratios, default=None),
                median=quantile(ratios, 0.5) if ratios else None,
                highest=max(ratios, default=None),
                of_copy=quantile(shares, 0.5) if shares else None,
                slower=sum(value < 1.0 for value in ratios),
                failed=len(cases) - sum(row.p50_us is not None for row in own),
            )
        )
    return lines


def print_overview(console: Console, rows: Sequence[Row]) -> None:
    """Print the lines as a table."""
    table = screen.table(
        OVERVIEW_HEADER,
        words=2,
        wrap=False,
        padding=(0, 1, 0, 0),
        title="Times faster than eager torch, and share of a copy's bandwidth",
        title_justify="left",
    )
    for line in overview(rows):
        texts = [Text(text) for text in line.cells()]
        for place, count in ((-2, line.slower), (-1, line.failed)):
            if count:
                texts[place].stylize("bold red")
        table.add_row(*texts)
    screen.at_least(console, 100)
    console.print(table)


# --- Markdown -------------------------------------------------------------------------------------

_MARKDOWN_TITLES = {
    WHOLE: "Whole training steps:",
    HOST: "Host time a tensor, in us (tensors of few elements):",
}
_ABOUT_MARKDOWN = {
    WHOLE: "A step's median time, *vs eager* as the median over interleaved rounds; below 1 is "
    "slower. *memory*: the most that torch held in two steps. *accuracy*: on test images, "
    "trained to the end.",
    "": "Median times. *vs*: times faster than that provider, the median over interleaved "
    "rounds; below 1 is slower. *of a copy*: against `dst.copy_(src)` that moves as "
    "many bytes.",
}


def markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Return Markdown tables: a line for each case, a column for each provider."""
    notes = Footnotes()
    lines: list[str] = []
    parts = sections(rows)
    for title, part in parts:
        if title and (lines or title == HOST):
            lines += ["", _MARKDOWN_TITLES[title], ""]
        lines += (_markdown_whole if title == WHOLE else _markdown_table)(part, notes)
    if lines:
        lines.append("")
    lines += [f"({number}) {text}  " for number, text in enumerate(notes.texts, start=1)]
    if notes.texts:
        lines.append("")
    lines += [_ABOUT_MARKDOWN[title] for title, _ in reversed(parts) if title in _ABOUT_MARKDOWN]
    lines.append(f"Measured on {machine_facts.summary(machine)}.")
    if warning := machine_facts.noise_warning(machine):
        lines += ["", f"**Noisy: {warning}.**"]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Row], notes: Footnotes) -> list[str]:
    """Return a line for each case, ours last, next to its ratios."""
    host = rows[0].host
    names: list[str] = []
    for row in rows:
        if row.provider not in (COPY, "all", *names):
            names.append(row.provider)
    names.sort(key=lambda name: name == "fusereg")
    rivals = [name for name in names if name not in OWN]
    has_own = "fusereg" in names
    head = ["work", "mode", "dtype", *names]
    if has_own:
        head += [f"vs {name}" for name in rivals] + ([] if host else ["of a copy"])
    lines = [_markdown_line(head), _markdown_line(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for group in cases_of(rows):
        first = group[0]
        of = {row.provider: row for row in group}
        cells = [first.shape, first.mode, first.dtype]
        if "all" in of:
            cells[0] += notes.mark(of["all"].failed)
        cells += [_markdown_time(of.get(name), notes) for name in names]
        own = of.get("fusereg")
        if has_own:
            for name in rivals:
                cells.append(_markdown_ratio(of.get(name), own))
            if not host:
                share = own.percent_of_copy if own else None
                cells.append("-" if share is None else f"{percent_text(share)} %")
        lines.append(_markdown_line(cells))
    return lines


def _markdown_whole(rows: Sequence[Row], notes: Footnotes) -> list[str]:
    """Return a line for each provider."""
    head = ["network and batch", "dtype", "provider", "step", "vs eager", "memory", "accuracy"]
    lines = [_markdown_line(head), _markdown_line(["---"] * 3 + ["---:"] * 4)]
    for row in rows:
        slower = row.vs_eager is not None and row.vs_eager < 1.0
        cells = [row.shape, row.dtype, row.provider, _markdown_time(row, notes)]
        cells += [ratio_text(row.vs_eager) + (" (slower)" if slower else "")]
        cells += [memory_text(row.peak_bytes), accuracy_text(row.test_accuracy)]
        lines.append(_markdown_line(cells))
    return lines


def _markdown_time(row: Row | None, notes: Footnotes) -> str:
    if row is None:
        return "-"
    if row.failed:
        return "failed" + notes.mark(row.failed)
    text = _special(row)["us/tensor"] if row.host else time_text(row.p50_us)
    if row.compile_s is not None:
        text += f" (+{row.compile_s:.0f} s once)"
    return text + notes.mark(row.note)


def _markdown_ratio(rival: Row | None, own: Row | None) -> str:
    if rival is None or own is None or rival.failed or own.failed:
        return "-"
    value = ratio(rival.samples_us, own.samples_us)
    text = ratio_text(value)
    return f"{text} (slower)" if value is not None and value < 1 else text


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
