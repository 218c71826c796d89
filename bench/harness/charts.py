"""The page's charts as plotly's JSON: the rooflines of a device, and a technique's speeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fusereg.core.pictures import Style, styles

from .. import SUITES
from .cases import COPY, EAGER, OWN, Row, cases_of, own_row
from .figures import MUTED, PROVIDERS

Chart = dict[str, Any]
#: Plotly's names of matplotlib's markers.
SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down",
    "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "h": "hexagon", "P": "cross",
    "X": "x", "x": "x-thin-open",
}  # fmt: skip


def _marks(
    name: str, rows: Sequence[Row], style: Style, x: Iterable[Any], y: Iterable[Any], hover: str
) -> dict[str, Any]:
    color, marker = style
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y),
        "marker": {"color": color, "symbol": SYMBOLS[marker], "size": 9, "line": {"width": 1}},
        "text": [row.name for row in rows], "hovertemplate": f"%{{text}}<br>{hover}",
    }  # fmt: skip


def _layout(height: int, x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0}
    margin = {"l": 60, "r": 20, "t": 20, "b": 50}
    return {
        "height": height, "xaxis": x, "yaxis": y, "margin": margin, "legend": legend,
        "showlegend": True,
    }  # fmt: skip


def rooflines(rows: Sequence[Row], device: str) -> dict[str, Chart]:
    """Return GB/s over bytes moved, a chart for each dtype, by its title.

    A mark is a case of fusereg; the copies are the roof. Nothing where no row has a bandwidth.
    """
    cases = [
        case
        for case in cases_of(rows)
        if case[0].device == device and case[0].bytes and not case[0].host
    ]
    own = [row for row in map(own_row, cases) if row is not None and row.gb_per_s]
    style = styles([*SUITES, *(row.suite for row in own)])
    hover = "%{x:.3s}B at %{y:.3g} GB/s"
    found: dict[str, Chart] = {}
    for dtype in dict.fromkeys(row.dtype for row in own):
        every = [row for case in cases for row in case if row.gb_per_s and row.dtype == dtype]
        eager = [row for row in every if row.provider == EAGER]
        parts = {"eager torch": (eager, (MUTED, "x"))}
        for suite in dict.fromkeys(row.suite for row in own):
            marks = [row for row in own if (row.dtype, row.suite) == (dtype, suite)]
            parts[suite] = (marks, style[suite])
        data = [_roof([row for row in every if row.provider == COPY])]
        data += [
            _marks(name, marks, look, [r.bytes for r in marks], [r.gb_per_s for r in marks], hover)
            for name, (marks, look) in parts.items()
            if marks
        ]
        x = {"type": "log", "title": {"text": f"bytes moved, by contract: {dtype}"}, "dtick": 1}
        y = {"type": "log", "title": {"text": "GB/s"}}
        found[f"Roofline: {device}, {dtype}"] = {
            "data": data,
            "layout": _layout(460, {**x, "tickformat": "~s", "ticksuffix": "B"}, y),
        }
    return found


def _roof(copies: Sequence[Row]) -> dict[str, Any]:
    """Return the copy's bandwidth: the median of those that move about as many bytes."""
    steps: dict[float, list[float]] = {}
    for row in sorted(copies, key=lambda row: row.bytes):
        steps.setdefault(round(4 * math.log10(row.bytes)) / 4, []).append(row.gb_per_s or 0.0)
    return {
        "type": "scatter", "mode": "lines", "name": "copy: the roof", "line": {"color": MUTED},
        "x": [10**step for step in steps],
        "y": [sorted(values)[len(values) // 2] for values in steps.values()],
    }  # fmt: skip


def speeds(rows: Sequence[Row], where: str) -> dict[str, Chart]:
    """Return how many times faster than eager each provider is, a line for each kind of case."""
    drawn = [
        row for row in rows if row.vs_eager and row.provider not in (EAGER, COPY) and not row.failed
    ]
    if not drawn:
        return {}
    kinds = {id(r): f"{r.op}: {r.mode}, {r.dtype}{', host' if r.host else ''}" for r in drawn}
    names = list(dict.fromkeys(kinds.values()))
    style = styles(dict.fromkeys(row.provider for row in drawn), PROVIDERS)
    data = []
    for name in sorted({row.provider for row in drawn}, key=_own_first):
        marks = [row for row in drawn if row.provider == name]
        x, y = [row.vs_eager for row in marks], [kinds[id(row)] for row in marks]
        data.append(_marks(name, marks, style[name], x, y, "%{x:.3g}x of eager's speed"))
    one = {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}
    about = {"text": "times faster than eager torch (a mark for each shape)"}
    layout = _layout(
        150 + 26 * len(names),
        {"type": "log", "title": about, "dtick": "D2", "minallowed": -6},
        {"categoryarray": names[::-1], "automargin": True, "ticksuffix": " "},
    )
    return {f"Speed relative to eager torch: {where}": {
        "data": data, "layout": {**layout, "shapes": [{**one, "line": {"color": MUTED}}]},
    }}  # fmt: skip


def _own_first(name: str) -> tuple[bool, str]:
    return (name not in OWN, name)
