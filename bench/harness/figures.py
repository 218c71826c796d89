"""Colors and markers of what is drawn, and the picture of percent of a copy."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusereg.cli.output import write_atomically
from fusereg.core.pictures import STYLE_COLORS as COLORS
from fusereg.core.pictures import Style, new_figure, styles, tidy

from . import machine as machine_facts
from .cases import COPY, EAGER, OWN, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED = "#101112", "#6d6e6f"

#: Color and marker of the providers that many suites have.
PROVIDERS: dict[str, Style] = {
    "fusereg": (COLORS[0], "o"),
    "WeightPenalty": (COLORS[4], "D"),
    "torch.compile": (COLORS[1], "s"),
    "foreach": (COLORS[2], "^"),
    EAGER: (MUTED, "v"),
    "clone": (MUTED, "x"),
}
#: Percent of a copy that a kernel should reach.
GOAL = 85.0
_COLUMNS = 4


def _bytes_text(value: float) -> str:
    """Write a number of bytes with three digits."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def percent_of_copy(rows: Sequence[Row], machine: dict[str, Any]) -> Figure:
    """Draw a panel for each operation, mode and dtype, a mark for each shape and provider.

    Raises:
        ValueError: If no row has a bandwidth to draw.
    """
    drawn = [
        row
        for row in rows
        if row.provider != COPY and row.percent_of_copy is not None and row.bytes > 0
    ]
    if not drawn:
        raise ValueError("fusereg bench: nothing to plot: no row has a bandwidth")
    panels = {(row.suite, row.op, row.mode) for row in drawn}
    dtypes = list(dict.fromkeys(row.dtype for row in drawn))
    columns = min(_COLUMNS, len(panels))
    cells: dict[tuple[str, ...], list[Row]] = {}
    # A line for each dtype, unless there are too many panels for one line.
    for row in sorted(drawn, key=lambda row: dtypes.index(row.dtype)):
        cells.setdefault((row.suite, row.op, row.mode, row.dtype), []).append(row)
    lines = math.ceil(len(cells) / columns)
    style = styles(dict.fromkeys(row.provider for row in drawn), PROVIDERS)
    figure = new_figure(
        max(7.5, 1.5 + 4.3 * columns), 2.4 + 3.9 * lines,
        "Bandwidth in percent of a copy's", machine_facts.summary(machine),
    )  # fmt: skip
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    shares = [row.percent_of_copy or 100.0 for row in drawn]
    floor = 10.0 ** min(1, math.floor(math.log10(min(shares) * 0.8)))
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    for axis, ((_, op, mode, dtype), here) in zip(axes.flat, cells.items(), strict=False):
        _panel(axis, here, style)
        axis.set_title(f"{op}: {mode}, {dtype}", fontsize=11, loc="left", pad=8)
        axis.set_xlabel("bytes moved, by contract", labelpad=6)
    for line in axes:
        line[0].set_ylim(floor, max(200.0, 1.6 * max(shares)))
        line[0].set_ylabel("% of the copy's bandwidth")
    named: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower left", ncols=len(named),
        frameon=False, fontsize=9, handletextpad=0.4,
    )  # fmt: skip
    return figure


def _panel(axis: Any, rows: Sequence[Row], style: Mapping[str, Style]) -> None:
    """Draw one dtype and mode."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    tidy(axis)
    for provider, (color, marker) in style.items():
        marks = sorted((r for r in rows if r.provider == provider), key=lambda row: row.bytes)
        if not marks:
            continue
        main = provider == OWN[0]
        axis.plot(
            [row.bytes for row in marks], [row.percent_of_copy for row in marks],
            color=color, marker=marker,
            # Two names of the same kernel coincide: the larger mark shows behind the other.
            markersize=8 if main else 11 if provider in OWN else 6.5,
            markeredgecolor=color if marker == "x" else "white", markeredgewidth=0.7,
            # The marks are what was measured; a thin line only helps to follow a provider.
            lw=0.8, label=provider, zorder=4 if main else 3,
        )  # fmt: skip
        for row in marks if main else []:
            axis.annotate(
                f"{row.percent_of_copy:.0f}", (row.bytes, row.percent_of_copy), xytext=(0, 8),
                textcoords="offset points", ha="center", fontsize=9.5, fontweight="bold",
                color=color, zorder=5,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
    axis.axhspan(GOAL, 100.0, color=COLORS[1], alpha=0.12, lw=0, label=f"{GOAL:.0f} to 100 %")
    axis.axhline(100.0, color=INK, lw=1.2, label="copy")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # not 10^3
    axis.yaxis.set_minor_formatter(NullFormatter())
    shapes = {row.bytes: row.shape for row in sorted(rows, key=lambda row: row.bytes)}
    if not shapes:
        return
    places = list(shapes)
    span = math.log10(places[-1] / places[0]) or 1.0
    labels = []
    low_before = True
    for index, place in enumerate(places):
        near = index > 0 and math.log10(place / places[index - 1]) < 0.2 * span
        # Every other label that would overlap its neighbor goes further down.
        low = near and not low_before
        labels.append(("\n\n" if low else "") + f"{shapes[place]}\n{_bytes_text(place)}")
        low_before = low
    axis.set_xscale("log")
    axis.set_xticks(places, labels, fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(places[0] / 10 ** (0.14 * span), places[-1] * 10 ** (0.14 * span))


def write_plot(path: str | Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Write the percentages of a copy as PNG, PDF or SVG.

    Raises:
        ValueError: If no row has a bandwidth to draw.
    """
    buffer = io.BytesIO()
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    percent_of_copy(rows, machine).savefig(buffer, format=kind, dpi=150)
    write_atomically(Path(path), buffer.getvalue())
