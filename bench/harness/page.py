"""The report as one self-contained HTML page: ``page.html`` filled in, with plotly inside."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import charts
from . import compare as comparison
from . import machine as machine_facts
from .cases import COPY, EAGER, OWN, Row, cases_of
from .report import (
    OVERVIEW_HEADER,
    Footnotes,
    accuracy_text,
    failure_text,
    memory_text,
    overview,
    percent_text,
    ratio_text,
    three_digits,
    time_text,
)

#: The important columns first: a phone shows four without scrolling.
_CASE_HEADER = ("provider", "p50", "vs eager", "of a copy", "GB/s", "p20", "p80")
_WHOLE_HEADER = ("provider", "p50", "vs eager", "memory", "accuracy", "p20", "p80")


@dataclass
class _Line:
    """A row of a table: its class, its cells, and the classes of cells by their numbers."""

    cells: Sequence[str]
    kind: str = ""
    looks: Mapping[int, str] = field(default_factory=dict)


@dataclass
class _Table:
    """A table: lines under the case that they belong to, or each under an empty name.

    The first ``words`` columns are aligned as words, the others as numbers.
    """

    header: Sequence[str]
    groups: Mapping[str, Sequence[_Line]]
    words: int
    summary: str = ""
    notes: Sequence[str] = ()


@dataclass
class _Section:
    title: str
    id: str = ""
    texts: Sequence[str] = ()
    charts: Mapping[str, charts.Chart] = field(default_factory=dict)
    tables: Sequence[_Table] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")


def report(rows: Sequence[Row], machine: dict[str, Any], interrupted: bool) -> str:
    """Return the page of one run."""
    from plotly.offline import get_plotlyjs

    commit = machine.get("git_commit")
    what = f"fusereg {machine.get('fusereg')}" + (f" ({commit})" if commit else "")
    warning = machine_facts.noise_warning(machine)
    warnings = ["Interrupted: this is not the whole run."] if interrupted else []
    warnings += [f"{warning[:1].upper()}{warning[1:]}."] if warning else []
    devices = list(dict.fromkeys(row.device for row in rows))
    sections = [_overview(rows)]
    for device in devices:
        if drawn := charts.rooflines(rows, device):
            sections.append(_Section(f"Roofline: {device}", charts=drawn))
    for suite in dict.fromkeys(row.suite for row in rows):
        here = [[r for r in rows if (r.suite, r.device) == (suite, name)] for name in devices]
        drawn = {}
        for part in filter(None, here):
            drawn |= charts.speeds(part, f"{suite}, {part[0].device}")
        tables = [_cases(part, len(devices) > 1) for part in here if part]
        sections.append(_Section(suite, suite, charts=drawn, tables=tables))
    sections.append(_machine("machine", machine, "machine"))
    return str(
        _template().render(
            title=f"{what}: benchmark",
            heading="fusereg benchmark",
            about=f"{what}, torch {machine.get('torch')}, {str(machine.get('date', ''))[:10]}",
            warnings=warnings,
            sections=sections,
            plotly=get_plotlyjs(),
        )
    )


def _overview(rows: Sequence[Row]) -> _Section:
    slower, failed = len(OVERVIEW_HEADER) - 2, len(OVERVIEW_HEADER) - 1
    lines = [
        _Line(
            line.cells(),
            looks={slower: "loss" * bool(line.slower), failed: "loss" * bool(line.failed)},
        )
        for line in overview(rows)
    ]
    about = "Times faster than eager torch, case by case."
    return _Section("Overview", texts=[about], tables=[_Table(OVERVIEW_HEADER, {"": lines}, 2)])


def _cases(rows: Sequence[Row], named: bool) -> _Table:
    notes = Footnotes()
    groups = {}
    for case in cases_of(rows):
        name = case[0].name + (", host" if case[0].host else "")
        groups[name] = [_line(row, notes) for row in case]
    header = _WHOLE_HEADER if all(row.whole for row in rows) else _CASE_HEADER
    summary = f"{len(groups)} case{'s' * (len(groups) != 1)} in figures"
    summary += f": {rows[0].device}" if named else ""
    return _Table(header, groups, 1, summary, notes.texts)


def _line(row: Row, notes: Footnotes) -> _Line:
    times = [time_text(value) for value in (row.p50_us, row.p20_us, row.p80_us)]
    if row.failed:
        times[0] = failure_text(row)
    speed = "-" if row.gb_per_s is None else three_digits(row.gb_per_s)
    share = "-" if row.percent_of_copy is None else f"{percent_text(row.percent_of_copy)} %"
    if row.whole:
        speed, share = accuracy_text(row.test_accuracy), memory_text(row.peak_bytes)
    verdict = ""
    if row.vs_eager is not None and row.provider != EAGER:
        verdict = "loss" if row.vs_eager < 1.0 else "win"
    name = row.provider + notes.mark(row.failed, row.note)
    kind = "own" if row.provider in OWN else "copy" if row.provider == COPY else ""
    cells = (name, times[0], ratio_text(row.vs_eager), share, speed, *times[1:])
    return _Line(cells, kind, {2: verdict})


def _machine(title: str, machine: dict[str, Any], name: str = "") -> _Section:
    facts = {}
    for key, value in machine.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{n} {_plain(v)}" for n, v in value.items() if v not in (None, ""))
        elif key.endswith("_bytes"):
            value = f"{value / 2**30:.1f} GiB"
        facts[key.replace("_bytes", "").replace("_", " ")] = _plain(value)
    return _Section(title, name, facts=facts)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def changes(found: comparison.Comparison, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the page of a comparison of two runs."""
    lines = []
    for change in found.moved:
        verdict = ("win" if (change.ratio or 2.0) < 1.0 else "loss") if change.own else ""
        kind = "own" if change.own else ""
        lines.append(_Line(comparison.cells(change), kind, {comparison.MOVED_COLUMN: verdict}))
    table = _Table(comparison.HEADER, {"": lines}, 2)
    names = [f"{m.get('fusereg')} ({m.get('git_commit') or 'no commit known'})" for m in (old, new)]
    remarks = comparison.remarks(found, old, new)
    sections = [_Section("What moved", texts=remarks, tables=[table] if lines else [])]
    sections += [_machine("Machine before", old), _machine("Machine now", new)]
    title = "fusereg benchmark: what moved"
    about = f"{names[0]} before, {names[1]} now"
    return str(_template().render(title=title, heading=title, about=about, sections=sections))
