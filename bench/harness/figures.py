"""The report's figures: the roofline of a device, and a technique's speed beside its rivals.

Each is drawn once and written twice: as a PNG, and as an SVG for the page, whose inks are then
CSS variables, so that it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .harness import COPY, EAGER, OWN, Row
from .overview import own_row
from .report import cases_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; readable on white and on black.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#7B61C9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Inks that no colour above equals: the page's style sheet has them as variables.
INK, MUTED, LINE, PAPER = "#101112", "#6d6e6f", "#dcdddf", "#fefefd"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}

RIVALS = {
    "fusereg": (COLOURS[0], "o"),
    "WeightPenalty": (COLOURS[4], "D"),
    "torch.compile": (COLOURS[1], "s"),
    "foreach": (COLOURS[2], "^"),
    "clone": (MUTED, "x"),
}


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Any]]:
    # Without pyplot: no global state, no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    for axis in axes:
        axis.set_facecolor(PAPER)
        axis.grid(color=LINE, lw=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, which="both")
        for side, spine in axis.spines.items():
            spine.set_color(LINE)
            spine.set_visible(side in ("left", "bottom"))
    return figure, list(axes)


def _plain_numbers(axis: Any) -> None:
    """1000 rather than 10^3."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _bytes_axis(axis: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low = math.floor(math.log10(min(row.bytes for row in rows)))
    high = math.ceil(math.log10(max(row.bytes for row in rows)))
    units = {3: "kB", 6: "MB", 9: "GB", 12: "TB"}

    def text(value: float, _: object) -> str:
        power = round(math.log10(value))
        base = power // 3 * 3
        return f"{10 ** (power - base):g} {units.get(base, 'B')}"

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator([10.0**power for power in range(low, high + 1)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(text))
    axis.set_xlabel("bytes moved, by contract", color=INK)


def roofline(rows: Sequence[Row], device: str, caption: str = "") -> Figure | None:
    """GB/s over bytes moved: a mark for each case of fusereg, under the roof that a copy gives.

    None where nothing was measured that has a bandwidth. ``caption`` is for a picture that stands
    alone.
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
    figure, axes = _figure(7.6, 1.1 + 3.3 * len(dtypes), len(dtypes))
    every = [row for case in cases for row in case if row.gb_per_s]
    for axis, dtype in zip(axes, dtypes, strict=True):
        here = [row for row in every if row.dtype == dtype]
        copies = sorted((row for row in here if row.provider == COPY), key=lambda row: row.bytes)
        if copies:
            _roof(axis, copies)
        eager = [row for row in here if row.provider == EAGER]
        axis.scatter(
            [row.bytes for row in eager], [row.gb_per_s for row in eager],
            s=16, facecolor="none", edgecolor=MUTED, alpha=0.8, lw=0.8, label="eager torch",
        )  # fmt: skip
        for index, suite in enumerate(suites):
            marks = [row for row in own if row.dtype == dtype and row.suite == suite]
            axis.scatter(
                [row.bytes for row in marks], [row.gb_per_s for row in marks],
                s=42, color=COLOURS[index % len(COLOURS)], edgecolor=PAPER, lw=0.8,
                marker=MARKERS[index % len(MARKERS)], label=suite, zorder=3,
            )  # fmt: skip
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
        axis.set_ylabel("GB/s", color=INK)
        axis.set_title(dtype, loc="left", fontsize=10.5, color=INK)
    _bytes_axis(axes[-1], every)
    for axis in axes[:-1]:
        axis.sharey(axes[-1])
    if caption:
        text = textwrap.fill(caption, 110)
        figure.text(0.01, -0.01, text, fontsize=7.5, color=MUTED, va="top", ha="left")
    _legend(figure, axes)
    return figure


def _roof(axis: Any, copies: Sequence[Row]) -> None:
    """The copy's bandwidth: the median of those that move about as many bytes."""
    steps: dict[float, list[float]] = {}
    for row in copies:
        steps.setdefault(round(4 * math.log10(row.bytes)) / 4, []).append(row.gb_per_s or 0.0)
    places = [10**step for step in steps]
    heights = [sorted(values)[len(values) // 2] for values in steps.values()]
    axis.plot(places, heights, color=INK, lw=1.6, label="copy: the roof", zorder=2)


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    legend = figure.legend(
        list(named.values()), list(named), loc="outside upper left",
        ncols=min(4, len(named)), frameon=False, fontsize=9, handletextpad=0.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(INK)


def speeds(rows: Sequence[Row]) -> Figure | None:
    """How many times faster than eager each provider is: a line for each kind of case."""
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
    figure, (axis,) = _figure(7.6, 1.3 + 0.27 * len(kinds))
    spare = list(zip(COLOURS, MARKERS, strict=True))[4:]
    for number, name in enumerate(reversed(providers)):
        colour, marker = RIVALS.get(name, spare[number % len(spare)])
        marks = [row for row in drawn if row.provider == name]
        axis.scatter(
            [row.vs_eager for row in marks], [kinds.index(kind(row)) for row in marks],
            s=40 if name in OWN else 26, color=colour, marker=marker, lw=0.9, alpha=0.9,
            edgecolor=None if marker == "x" else PAPER, label=name, zorder=3 + (name in OWN),
        )  # fmt: skip
    axis.axvline(1.0, color=INK, lw=1.2)
    axis.set_xscale("log")
    low = min(1.0, *(row.vs_eager or 1.0 for row in drawn))
    high = max(1.0, *(row.vs_eager or 1.0 for row in drawn))
    axis.set_xlim(low / 1.35, high * 1.35)
    ticks = [value for value in _round_numbers() if low / 1.35 <= value <= high * 1.35]
    axis.set_xticks(ticks)
    _plain_numbers(axis.xaxis)
    axis.minorticks_off()
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(len(kinds) - 0.4, -0.6)
    axis.set_xlabel("times faster than eager torch (a mark for each shape)", color=INK)
    _legend(figure, [axis])
    return figure


def _round_numbers() -> list[float]:
    return [step * 10.0**power for power in range(-4, 5) for step in (1, 2, 5)]


def png(figure: Figure) -> bytes:
    """As a picture of twice the usual resolution."""
    buffer = io.BytesIO()
    # Tight: with what lies below the axes, such as a caption.
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """As an element for a page; ``name`` is what a reader who does not see it is told."""
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
