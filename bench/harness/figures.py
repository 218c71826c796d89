"""The figures: the roofline of a device, a technique's speed, and percent of a copy.

Figures of the page are SVGs whose inks become CSS variables, so that they follow the reader's light
or dark scheme.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusereg.cli.output import write_atomically
from fusereg.core.pictures import STYLE_COLORS as COLORS
from fusereg.core.pictures import Style, styles

from .. import SUITES
from . import machine as machine_facts
from .cases import COPY, EAGER, OWN, Row, cases_of, own_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inks that no color above equals: the page's style sheet has them as variables.
INK, MUTED, LINE, PAPER = "#101112", "#6d6e6f", "#dcdddf", "#fefefd"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}

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


# --- roofline -------------------------------------------------------------------------------------


def roofline(rows: Sequence[Row], device: str, caption: str = "") -> Figure | None:
    """Draw GB/s over bytes moved: a mark for each case of fusereg, and the copies as the roof.

    Returns:
        None where nothing was measured that has a bandwidth.
    """
    cases = [
        case
        for case in cases_of(rows)
        if case[0].device == device and case[0].bytes and not case[0].host
    ]
    own = [row for row in map(own_row, cases) if row is not None and row.gb_per_s]
    if not own:
        return None
    dtypes = list(dict.fromkeys(row.dtype for row in own))
    suites = list(dict.fromkeys(row.suite for row in own))
    style = styles([*SUITES, *suites])
    figure, grid = _figure(7.6, 1.1 + 3.3 * len(dtypes), len(dtypes), sharex=True, sharey=True)
    axes = [axis for (axis,) in grid]
    every = [row for case in cases for row in case if row.gb_per_s]
    for axis, dtype in zip(axes, dtypes, strict=True):
        here = [row for row in every if row.dtype == dtype]
        _roof(axis, [row for row in here if row.provider == COPY])
        eager = [row for row in here if row.provider == EAGER]
        axis.scatter(
            [row.bytes for row in eager], [row.gb_per_s for row in eager],
            s=16, facecolor="none", edgecolor=MUTED, alpha=0.8, lw=0.8, label="eager torch",
        )  # fmt: skip
        for suite in suites:
            marks = [row for row in own if row.dtype == dtype and row.suite == suite]
            color, marker = style[suite]
            axis.scatter(
                [row.bytes for row in marks], [row.gb_per_s for row in marks],
                s=42, color=color, edgecolor=PAPER, lw=0.8, marker=marker, label=suite, zorder=3,
            )  # fmt: skip
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
        axis.set_ylabel("GB/s", color=INK)
        axis.set_title(dtype, loc="left", fontsize=10.5, color=INK)
    low = math.floor(math.log10(min(row.bytes for row in every)))
    high = math.ceil(math.log10(max(row.bytes for row in every)))
    places = [10.0**power for power in range(low, high + 1)]
    _bytes_axis(axes[-1], places, [_bytes_text(place) for place in places])
    axes[-1].set_xlabel("bytes moved, by contract", color=INK)
    if caption:
        text = textwrap.fill(caption, 110)
        figure.text(0.01, -0.01, text, fontsize=7.5, color=MUTED, va="top", ha="left")
    _legend(figure, axes)
    return figure


def _roof(axis: Any, copies: Sequence[Row]) -> None:
    """Draw the copy's bandwidth: the median of those that move about as many bytes."""
    if not copies:
        return
    steps: dict[float, list[float]] = {}
    for row in sorted(copies, key=lambda row: row.bytes):
        steps.setdefault(round(4 * math.log10(row.bytes)) / 4, []).append(row.gb_per_s or 0.0)
    places = [10**step for step in steps]
    heights = [sorted(values)[len(values) // 2] for values in steps.values()]
    axis.plot(places, heights, color=INK, lw=1.6, label="copy: the roof", zorder=2)


# --- speeds ---------------------------------------------------------------------------------------


def speeds(rows: Sequence[Row]) -> Figure | None:
    """Draw how many times faster than eager each provider is: a line for each kind of case."""
    drawn = [
        row for row in rows if row.vs_eager and row.provider not in (EAGER, COPY) and not row.failed
    ]
    if not drawn:
        return None

    def kind(row: Row) -> str:
        host = ", host" if row.host else ""
        return f"{row.op}: {row.mode}, {row.dtype}{host}"

    kinds = list(dict.fromkeys(kind(row) for row in drawn))
    providers = list(dict.fromkeys(row.provider for row in drawn))
    providers.sort(key=lambda name: (name not in OWN, name))
    style = styles(providers, PROVIDERS)
    figure, ((axis,),) = _figure(7.6, 1.3 + 0.27 * len(kinds))
    for name in reversed(providers):
        color, marker = style[name]
        marks = [row for row in drawn if row.provider == name]
        axis.scatter(
            [row.vs_eager for row in marks], [kinds.index(kind(row)) for row in marks],
            s=40 if name in OWN else 32, color=color, marker=marker, lw=0.9, alpha=0.9,
            edgecolor=None if marker == "x" else PAPER, label=name, zorder=3 + (name in OWN),
        )  # fmt: skip
    axis.axvline(1.0, color=INK, lw=1.2)
    axis.set_xscale("log")
    low = min(1.0, *(row.vs_eager or 1.0 for row in drawn)) / 1.35
    high = max(1.0, *(row.vs_eager or 1.0 for row in drawn)) * 1.35
    axis.set_xlim(low, high)
    axis.set_xticks(_round_numbers(low, high))
    _plain_numbers(axis.xaxis)
    axis.minorticks_off()
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(len(kinds) - 0.4, -0.6)
    axis.set_xlabel("times faster than eager torch (a mark for each shape)", color=INK)
    _legend(figure, [axis])
    return figure


def _round_numbers(low: float, high: float) -> list[float]:
    """Return at most 8 round numbers between two, for the labels of a logarithmic axis."""
    found: list[float] = []
    ladders = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
    for steps, stride in [*((steps, 1) for steps in ladders), ((1,), 2)]:
        found = [k * 10.0**power for power in range(-6, 7, stride) for k in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 8:
            break
    return found


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


def png(figure: Figure) -> bytes:
    """Return a PNG of twice the usual resolution."""
    buffer = io.BytesIO()
    # Tight: with what lies below the axes, such as a caption.
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """Return an SVG element for a page; ``name`` is what a screen reader says of it."""
    import html

    from matplotlib import rc_context

    buffer = io.StringIO()
    # A salt for each figure: its ids must not be those of another one on the same page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for ink, variable in VARIABLES.items():
        text = text.replace(ink, variable)
    opening = f'<svg role="img" aria-label="{html.escape(name)}"'
    return text.replace("<svg", opening, 1)
