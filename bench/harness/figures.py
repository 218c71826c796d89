"""Colors and markers of what is drawn, and the picture of percent of a copy."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusereg.cli.output import write_atomically
from fusereg.core.pictures import STYLE_COLORS as COLORS
from fusereg.core.pictures import Style, styles

from . import machine as machine_facts
from .cases import COPY, EAGER, OWN, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#101112", "#6d6e6f", "#dcdddf", "#fefefd"

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


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **share: Any
) -> tuple[Figure, list[list[Any]]]:
    """Return a figure and its axes. They are typed as Any: matplotlib has few types."""
    # Without pyplot: no global state, no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    for axis in axes.flat:
        axis.set_facecolor(PAPER)
        axis.grid(color=LINE, lw=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, which="both")
        for side, spine in axis.spines.items():
            spine.set_color(LINE)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes.tolist()


def _plain_numbers(axis: Any) -> None:
    """Write 1000 rather than 10^3."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _bytes_text(value: float) -> str:
    """Write a number of bytes with three digits."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def _bytes_axis(axis: Any, places: Sequence[float], labels: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(places))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels(labels)


def _legend(figure: Figure, axes: Iterable[Any], columns: int = 4) -> None:
    """Add one legend for all axes above them."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    legend = figure.legend(
        list(named.values()), list(named), loc="outside upper left",
        ncols=min(columns, len(named)), frameon=False, fontsize=9, handletextpad=0.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(INK)


# --- percent of a copy ----------------------------------------------------------------------------


def percent_of_copy(rows: Sequence[Row], machine: dict[str, Any]) -> Figure:
    """Draw a panel for each dtype and mode, a mark for each shape and provider.

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
    panels = list(dict.fromkeys((row.suite, row.op, row.mode) for row in drawn))
    dtypes = list(dict.fromkeys(row.dtype for row in drawn))
    style = styles(dict.fromkeys(row.provider for row in drawn), PROVIDERS)
    figure, axes = _figure(
        max(7.5, 1.5 + 4.3 * len(panels)), 1.9 + 3.9 * len(dtypes), len(dtypes), len(panels),
        sharey=True,
    )  # fmt: skip
    shares = [row.percent_of_copy or 100.0 for row in drawn]
    floor = 10.0 ** min(1, math.floor(math.log10(min(shares) * 0.8)))
    for dtype, line in zip(dtypes, axes, strict=True):
        for panel, axis in zip(panels, line, strict=True):
            here = [row for row in drawn if (row.suite, row.op, row.mode) == panel]
            _panel(axis, [row for row in here if row.dtype == dtype], style)
            title = f"{panel[1]}: {panel[2]}, {dtype}"
            axis.set_title(title, fontsize=11, loc="left", pad=8, color=INK)
        line[0].set_ylim(floor, max(200.0, 1.6 * max(shares)))
        line[0].set_ylabel("% of the copy's bandwidth", color=INK)
    for axis in axes[-1]:
        axis.set_xlabel("bytes moved, by contract", labelpad=6, color=INK)
    _legend(figure, (axis for line in axes for axis in line), columns=len(style) + 2)
    figure.supxlabel(machine_facts.summary(machine), fontsize=8, color=MUTED)
    return figure


def _panel(axis: Any, rows: Sequence[Row], style: Mapping[str, Style]) -> None:
    """Draw one dtype and mode."""
    from matplotlib.patheffects import withStroke

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
    _plain_numbers(axis.yaxis)
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
    _bytes_axis(axis, places, labels)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlim(places[0] / 10 ** (0.14 * span), places[-1] * 10 ** (0.14 * span))


# --- files ----------------------------------------------------------------------------------------


def write_plot(path: str | Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Write the percentages of a copy as PNG, PDF or SVG.

    Raises:
        ValueError: If no row has a bandwidth to draw.
    """
    buffer = io.BytesIO()
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    percent_of_copy(rows, machine).savefig(buffer, format=kind, dpi=150)
    write_atomically(Path(path), buffer.getvalue())
