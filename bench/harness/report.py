"""What becomes of the rows: a table, the README's table, JSON, a plot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import machine as machine_facts
from .harness import COPY, EAGER, Row, Settings, ratio

SCHEMA = 1
# What the table with all columns needs; on narrower terminals a case's name becomes a heading.
FULL_WIDTH = 138


# ------------------------------------------------------------------------------------------- JSON


def document(
    rows: Sequence[Row], machine: dict[str, Any], settings: Settings, interrupted: bool
) -> dict[str, Any]:
    """The whole run as one JSON value. Times in microseconds, bytes in bytes, ratios plain."""
    return {
        "schema": SCHEMA,
        "tool": "fusereg bench",
        "interrupted": interrupted,
        "machine": machine,
        "settings": asdict(settings),
        "rows": [row.to_json() for row in rows],
    }


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Writes the file whole or not at all: a run of an hour must not leave half a file."""
    # allow_nan=False: NaN is not JSON, and most readers refuse it.
    write_atomically(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def write_atomically(path: str | Path, content: bytes) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide the file from others
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and the whole document of a file that :func:`write_json` wrote.

    Raises:
        ValueError: If it is not such a file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"fusereg bench: {path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("tool") != "fusereg bench":
        raise ValueError(f"fusereg bench: {path} was not written by fusereg bench --json")
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"fusereg bench: {path} has schema {data.get('schema')}, this version reads {SCHEMA}"
        )
    return [Row.from_json(row) for row in data["rows"]], data


# ---------------------------------------------------------------------------------------- figures


def time_text(microseconds: float | None) -> str:
    """Three significant digits with a unit."""
    if microseconds is None:
        return "-"
    for limit, factor, unit in ((999.5, 1.0, "us"), (999.5e3, 1e-3, "ms")):
        if microseconds < limit:
            return f"{three_digits(microseconds * factor)} {unit}"
    return f"{three_digits(microseconds * 1e-6)} s"


def three_digits(value: float) -> str:
    """As many decimals as three significant digits need."""
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    if value >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}"


def ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{three_digits(value)}x"


def percent_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}" if value >= 0.095 else f"{value:.1g}"


def memory_text(count: int | None) -> str:
    """In millions of bytes."""
    return "-" if count is None else f"{count * 1e-6:.1f} MB"


def accuracy_text(share: float | None) -> str:
    """In percent; 1,000 test images tell no more than a tenth."""
    return "-" if share is None else f"{100 * share:.1f} %"


def cases_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows grouped by case, in order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return list(groups.values())


class Footnotes:
    """Numbers for remarks; the same remark gets the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, *texts: str) -> str:
        numbers = []
        for text in texts:
            if text:
                if text not in self.texts:
                    self.texts.append(text)
                numbers.append(str(self.texts.index(text) + 1))
        return f" ({','.join(numbers)})" if numbers else ""


# ------------------------------------------------------------------------------------------ table


def print_tables(console: Console, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """The measured table, and beneath it that of host overhead, notes and the machine."""
    notes = Footnotes()
    devices = list(dict.fromkeys(row.device for row in rows))
    parts = []
    for device in devices:
        name = device if len(devices) > 1 else ""
        here = [row for row in rows if row.device == device]
        parts.append((name, [row for row in here if not row.host and not row.whole]))
        whole = "Whole training steps"
        parts.append((f"{name}: {whole}" if name else whole, [row for row in here if row.whole]))
        host = "Host overhead, tensors of one element"
        parts.append((f"{name}: {host}" if name else host, [row for row in here if row.host]))
    # A log file has no width: take what the table needs rather than 80 columns.
    if not console.is_terminal:
        console.width = max(console.width, FULL_WIDTH)
    wide = console.width >= FULL_WIDTH
    for title, part in parts:
        if not part:
            continue
        if title:
            console.print(Text(title, style="bold"))
        if wide:
            console.print(_table(part, notes, wide=True))
            continue
        for group in cases_of(part):
            first = group[0]
            name = f"{first.op}, {first.mode}, {first.shape}, {first.dtype}"
            console.print(Text(name, style="bold"))
            console.print(_table(group, notes, wide=False))
    for number, text in enumerate(notes.texts, start=1):
        console.print(Text(f"({number}) {text}"), style="dim")
    compiled = compile_times(rows)
    if compiled:
        console.print(Text(compiled), style="dim")
    if any(row.whole for row in rows):
        console.print(
            Text(
                "memory: the most that torch held in two steps, weights and states included. "
                "accuracy: on test images, trained to the end. vs eager: of the step's time."
            ),
            style="dim",
        )
    if any(not row.host and not row.whole for row in rows):
        console.print(
            Text(
                "GB/s: bytes by contract over p50. % of copy: against a copy that moves as many "
                "bytes, in the same rounds. vs eager: median of the rounds; below 1 is slower."
            ),
            style="dim",
        )
    console.print(Text(machine_facts.summary(machine)), style="dim")
    warning = machine_facts.noise_warning(machine)
    if warning:
        console.print(Text(warning), style="yellow")


def _table(rows: Sequence[Row], notes: Footnotes, wide: bool) -> Table:
    special = (
        ["memory", "accuracy"]
        if rows[0].whole
        else ["us/tensor"]
        if rows[0].host
        else ["GB/s", "% of copy"]
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if wide:
        table.add_column("op", no_wrap=True)
    # Fixed in the narrow layout, where each case is a table, so that their columns line up.
    table.add_column("provider", no_wrap=True, min_width=None if wide else 17)
    if wide:
        for name in ("mode", "shape", "dtype"):
            table.add_column(name, no_wrap=True)
    numbers = ["p20", "p50", "p80", *special, "vs eager"]
    for name in numbers:
        width = 7 if name.startswith("p") else 5 if name == "GB/s" else len(name)
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for group in cases_of(rows):
        for row in group:
            table.add_row(*_cells(row, notes, wide), end_section=row is group[-1])
    return table


def _cells(row: Row, notes: Footnotes, wide: bool) -> list[Text]:
    style = "bold" if row.provider.startswith("fusereg") else "dim" if row.provider == COPY else ""
    provider = Text(row.provider + notes.mark(row.failed, row.note), style=style)
    cells = [provider]
    if wide:
        cells = [Text(row.op), provider, Text(row.mode), Text(row.shape), Text(row.dtype)]
    if row.failed:
        cells.append(Text("-"))
        cells.append(Text("failed" if not row.failed.startswith("skipped") else "skipped", "red"))
        return [*cells, *(Text("-") for _ in range(3 if row.host else 4))]
    cells.extend(Text(time_text(value)) for value in (row.p20_us, row.p50_us, row.p80_us))
    if row.host:
        cells.append(Text("-" if row.us_per_tensor is None else f"{row.us_per_tensor:.3f}"))
    elif row.whole:
        cells += [Text(memory_text(row.peak_bytes)), Text(accuracy_text(row.test_accuracy))]
    else:
        cells.append(Text("-" if row.gb_per_s is None else three_digits(row.gb_per_s)))
        cells.append(Text(percent_text(row.percent_of_copy)))
    cells.append(Text(ratio_text(row.vs_eager), ratio_style(row)))
    return cells


def compile_times(rows: Sequence[Row]) -> str:
    """How long compiling took, which the times a call do not show; empty if nothing compiled."""
    parts = [
        f"{row.shape} {row.mode} {row.dtype} {row.compile_s:.1f} s"
        for row in rows
        if row.compile_s is not None and not row.failed
    ]
    return f"Time to compile, once: {'; '.join(parts)}" if parts else ""


def ratio_style(row: Row) -> str:
    """Losses are seen as easily as wins."""
    if row.vs_eager is None or row.provider == EAGER:
        return ""
    return "bold red" if row.vs_eager < 1.0 else "green"


def case_line(rows: Sequence[Row], done: int, total: int) -> str:
    """One line for a case that has just been measured, for logs."""
    first = rows[0]
    parts = []
    for row in rows:
        if row.failed:
            parts.append(f"{row.provider} failed")
        elif row.provider != COPY:
            ratio_part = f" {ratio_text(row.vs_eager)}" if row.provider != EAGER else ""
            parts.append(f"{row.provider} {time_text(row.p50_us)}{ratio_part}")
    name = f"{first.op} {first.mode} {first.shape} {first.dtype}"
    return f"[{done}/{total}] {name}: {', '.join(parts)}"


# --------------------------------------------------------------------------------------- markdown


def markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The README's table: a line for each case, a column for each provider, nothing left out."""
    notes = Footnotes()
    lines: list[str] = []
    bandwidth = [row for row in rows if not row.host and not row.whole]
    whole = [row for row in rows if row.whole]
    host = [row for row in rows if row.host]
    if bandwidth:
        lines += _markdown_table(bandwidth, notes)
    if whole:
        lines += ["", "Whole training steps:", ""] if lines else []
        lines += _markdown_whole(whole, notes)
    if host:
        lines += ["", "Host time a tensor, in us (lists of tensors with one element):", ""]
        lines += _markdown_table(host, notes)
    if lines:
        lines.append("")
    lines += [f"({number}) {text}  " for number, text in enumerate(notes.texts, start=1)]
    if notes.texts:
        lines.append("")
    if whole:
        lines.append(
            "A step's median time, *vs eager* as the median over interleaved rounds; below 1 is "
            "slower. *memory*: the most that torch held in two steps. *accuracy*: on test images, "
            "trained to the end."
        )
    if bandwidth:
        lines.append(
            "Median times. *vs*: times faster than that provider, the median over interleaved "
            "rounds; below 1 is slower. *of a copy*: against `dst.copy_(src)` that moves as "
            "many bytes."
        )
    lines.append(f"Measured on {machine_facts.summary(machine)}.")
    warning = machine_facts.noise_warning(machine)
    if warning:
        lines += ["", f"**Noisy: {warning}.**"]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Row], notes: Footnotes) -> list[str]:
    host = rows[0].host
    names: list[str] = []
    for row in rows:
        if row.provider not in (COPY, "all", *names):
            names.append(row.provider)
    # Ours last, next to its ratios.
    names.sort(key=lambda name: name == "fusereg")
    rivals = [name for name in names if name not in ("fusereg", "WeightPenalty")]
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
    """A line for each provider."""
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
    if row.host:
        text = "-" if row.us_per_tensor is None else f"{row.us_per_tensor:.3f}"
    else:
        text = time_text(row.p50_us)
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
