"""The report as one self-contained HTML page: no script, no font, no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from . import compare as comparison
from . import figures
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

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --muted: #646a73; --line: #dfe2e6;
  --paper: #ffffff; --raised: #f5f6f8; --win: #0a7a4b; --loss: #c0261a; --accent: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --muted: #9aa1ab; --line: #343941;
  --paper: #15171a; --raised: #1e2126; --win: #4ecb93; --loss: #ff7b6e; --accent: #ff8a3d; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; border-bottom: 1px solid var(--line);
  padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .5rem 0; max-width: 44rem; }
a { color: inherit; }
nav a { display: inline-block; margin: 0 .9rem .2rem 0; }
.muted { color: var(--muted); } .small { font-size: .875rem; }
.warning { border-left: 4px solid var(--loss); background: var(--raised); padding: .6rem .9rem; }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .75rem .28rem 0; text-align: right; white-space: nowrap;
  vertical-align: top; }
th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; }
tr.case td { border-top: 1px solid var(--line); padding-top: .5rem; }
tr.case td { white-space: normal; font-weight: 600; }
td.text { white-space: normal; min-width: 5rem; }
tr.own td { font-weight: 650; } tr.copy td { color: var(--muted); }
td.win { color: var(--win); } td.loss { color: var(--loss); font-weight: 650; }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .3rem 0; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem;
  font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: .6rem 0 1rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; max-width: 50rem; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .5rem; } }
@media print { details > * { display: block; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

#: The important columns first: a phone shows four without scrolling.
_CASE_HEADER = ("provider", "p50", "vs eager", "of a copy", "GB/s", "p20", "p80")
_WHOLE_HEADER = ("provider", "p50", "vs eager", "memory", "accuracy", "p20", "p80")

_HOW = """
<ul class="small">
<li><b>p20, p50, p80</b>: time of one call; p50 is the median. All providers of a case are sampled
in turn, round by round, so that a disturbance of the machine affects all of them.</li>
<li><b>GB/s</b>: the bytes that the operation must move, read once and written once, over p50.</li>
<li><b>of a copy</b>: against a copy that moves as many bytes, in the same rounds. Above 100&nbsp;%
is possible: an update in place needs no second buffer.</li>
<li><b>vs eager</b>: median of the rounds' ratios. Below 1 the provider is slower than eager
torch; such rows are shown, in red.</li>
<li><b>memory</b>: the most that torch held in two training steps, weights and states included;
<b>accuracy</b>: on test images, after training to the end.</li>
</ul>
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _page(title: str, body: Sequence[str]) -> str:
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(body))


def _table(header: Sequence[str], rows: Sequence[str], texts: int) -> str:
    """Return a table; the first ``texts`` columns are aligned as words, the others as numbers."""
    head = "".join(
        f'<th class="text">{_text(name)}</th>' if index < texts else f"<th>{_text(name)}</th>"
        for index, name in enumerate(header)
    )
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def _line(cells: Sequence[str], texts: int, kind: str = "", classes: Sequence[str] = ()) -> str:
    """Return a row of a table; ``classes`` are those of the last cells."""
    named = ["text"] * texts + [""] * (len(cells) - texts)
    for index, name in enumerate(reversed(classes), start=1):
        named[-index] = name
    data = "".join(
        f'<td class="{name}">{_text(cell)}</td>' if name else f"<td>{_text(cell)}</td>"
        for name, cell in zip(named, cells, strict=True)
    )
    return f'<tr class="{kind}">{data}</tr>' if kind else f"<tr>{data}</tr>"


def _figure(figure: object, name: str) -> str:
    # Typed as object: matplotlib is not imported before a page is written.
    return f"<figure>{figures.svg(figure, name)}</figure>"  # type: ignore[arg-type]


def report(rows: Sequence[Row], machine: dict[str, Any], interrupted: bool) -> str:
    """Return the page of one run."""
    version, commit = machine.get("fusereg"), machine.get("git_commit")
    devices = list(dict.fromkeys(row.device for row in rows))
    suites = list(dict.fromkeys(row.suite for row in rows))
    what = f"fusereg {version}" + (f" ({commit})" if commit else "")
    body = [
        "<h1>fusereg benchmark</h1>",
        f'<p class="muted">{_text(what)}, torch {_text(machine.get("torch"))}, '
        f"{_text(str(machine.get('date', ''))[:10])}</p>",
    ]
    if interrupted:
        body.append('<p class="warning">Interrupted: this is not the whole run.</p>')
    warning = machine_facts.noise_warning(machine)
    if warning:
        body.append(f'<p class="warning">{_text(warning[:1].upper() + warning[1:])}.</p>')
    links = "".join(f'<a href="#{_text(suite)}">{_text(suite)}</a>' for suite in suites)
    body.append(f'<nav class="small">{links}<a href="#machine">machine</a></nav>')
    body += ["<h2>Overview</h2>", "<p>Times faster than eager torch, case by case.</p>"]
    body.append(_overview_table(rows))
    for device in devices:
        drawn = figures.roofline(rows, device)
        if drawn is not None:
            body += [f"<h2>Roofline: {_text(device)}</h2>", _figure(drawn, f"Roofline, {device}")]
    for suite in suites:
        body.append(f'<h2 id="{_text(suite)}">{_text(suite)}</h2>')
        for device in devices:
            here = [row for row in rows if row.suite == suite and row.device == device]
            if here:
                title = device if len(devices) > 1 else ""
                body += _section(here, suite, device, title)
    body += [
        '<h2 id="machine">Machine</h2>',
        _machine(machine),
        "<h2>How to read the figures</h2>",
        _HOW,
    ]
    return _page(f"{what}: benchmark", body)


def _overview_table(rows: Sequence[Row]) -> str:
    lines = []
    for line in overview(rows):
        loss = "loss" if line.slower else ""
        lines.append(_line(line.cells(), 2, "", (loss, "loss" if line.failed else "")))
    return _table(OVERVIEW_HEADER, lines, 2)


def _section(rows: Sequence[Row], suite: str, device: str, title: str) -> list[str]:
    parts = [f"<h3>{_text(title)}</h3>"] if title else []
    drawn = figures.speeds(rows)
    if drawn is not None:
        parts.append(_figure(drawn, f"Speed relative to eager torch: {suite}, {device}"))
    notes = Footnotes()
    cases = cases_of(rows)
    lines = [line for case in cases for line in _case(case, notes)]
    count = f"{len(cases)} case" + ("s" if len(cases) != 1 else "")
    header = _WHOLE_HEADER if all(row.whole for row in rows) else _CASE_HEADER
    parts.append(f"<details><summary>{count} in figures</summary>{_table(header, lines, 1)}")
    for number, text in enumerate(notes.texts, start=1):
        parts.append(f'<p class="small muted">({number}) {_text(text)}</p>')
    parts.append("</details>")
    return parts


def _case(case: Sequence[Row], notes: Footnotes) -> list[str]:
    """Return a line with the case's name, then one for each provider."""
    first = case[0]
    host = ", host" if first.host else ""
    name = _text(f"{first.op}, {first.mode}, {first.shape}, {first.dtype}{host}")
    lines = [f'<tr class="case"><td class="text" colspan="{len(_CASE_HEADER)}">{name}</td></tr>']
    for row in case:
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
        cells = (
            row.provider + notes.mark(row.failed, row.note),
            times[0],
            ratio_text(row.vs_eager),
            share,
            speed,
            *times[1:],
        )
        kind = "own" if row.provider in OWN else "copy" if row.provider == COPY else ""
        lines.append(_line(cells, 1, kind, (verdict, "", "", "", "")))
    return lines


def _machine(machine: dict[str, Any]) -> str:
    parts = []
    for key, value in machine.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{n} {_plain(v)}" for n, v in value.items() if v not in (None, ""))
        elif key.endswith("_bytes"):
            value = f"{value / 2**30:.1f} GiB"
        name = key.replace("_bytes", "").replace("_", " ")
        parts.append(f"<dt>{_text(name)}</dt><dd>{_text(_plain(value))}</dd>")
    return f"<dl>{''.join(parts)}</dl>"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def changes(found: comparison.Comparison, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the page of a comparison of two runs."""
    lines = []
    for change in found.moved:
        verdict = ""
        if change.own:
            verdict = "win" if (change.ratio or 2.0) < 1.0 else "loss"
        lines.append(
            _line(
                comparison.cells(change), 2, "own" if change.own else "", (verdict, "", "", "", "")
            )
        )
    names = [f"{m.get('fusereg')} ({m.get('git_commit') or 'no commit known'})" for m in (old, new)]
    body = ["<h1>fusereg benchmark: what moved</h1>"]
    body.append(f'<p class="muted">{_text(names[0])} before, {_text(names[1])} now</p>')
    body += [f"<p>{_text(line)}</p>" for line in comparison.remarks(found, old, new)]
    if lines:
        body.append(_table(comparison.HEADER, lines, 2))
    for title, machine in (("Machine before", old), ("Machine now", new)):
        body += [f"<h2>{title}</h2>", _machine(machine)]
    return _page("fusereg benchmark: what moved", body)
