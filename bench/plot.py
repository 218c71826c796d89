"""The plot: how near each provider comes to a copy's speed, over the bytes that it must move."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine as machine_facts
from .harness import COPY, Row
from .report import write_atomically

# Colour-blind safe (Okabe and Ito), and a marker each, so that a print in grey tells them apart.
STYLES: dict[str, tuple[str, str]] = {
    "fusereg": ("#D55E00", "o"),
    "WeightPenalty": ("#E69F00", "D"),
    "torch.compile": ("#0072B2", "s"),
    "foreach": ("#009E73", "^"),
    "eager": ("#666666", "v"),
}
OTHERS = (("#CC79A7", "P"), ("#56B4E9", "X"), ("#F0E442", "*"))
GOAL = 85.0


def _bytes_text(value: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def write_plot(path: str | Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Draws a panel for each dtype and mode, a mark for each shape and provider. PNG, PDF or SVG.

    Raises:
        ValueError: If no row has a bandwidth to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [
        row
        for row in rows
        if row.provider != COPY and row.percent_of_copy is not None and row.bytes > 0
    ]
    if not drawn:
        raise ValueError("fusereg bench: nothing to plot: no row has a bandwidth")
    panels = list(dict.fromkeys((row.suite, row.op, row.mode) for row in drawn))
    dtypes = list(dict.fromkeys(row.dtype for row in drawn))
    providers = list(dict.fromkeys(row.provider for row in drawn))
    providers.sort(key=lambda name: [*STYLES, name].index(name))
    spare = iter(OTHERS * len(providers))
    styles = {name: STYLES.get(name) or next(spare) for name in providers}

    # Figure without pyplot: no global state, no display needed.
    figure = Figure(
        figsize=(max(7.5, 1.5 + 4.3 * len(panels)), 1.9 + 3.9 * len(dtypes)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), len(panels), sharey=True, squeeze=False)
    lowest = min(row.percent_of_copy or 100.0 for row in drawn)
    highest = max(row.percent_of_copy or 100.0 for row in drawn)
    floor = 10.0
    while floor > lowest * 0.8:
        floor /= 10.0
    for line, dtype in enumerate(dtypes):
        for column, panel in enumerate(panels):
            here = [
                row
                for row in drawn
                if row.dtype == dtype and (row.suite, row.op, row.mode) == panel
            ]
            axis = axes[line][column]
            _panel(axis, here, providers, styles)
            axis.set_title(f"{panel[1]}: {panel[2]}, {dtype}", fontsize=11, loc="left", pad=8)
            axis.set_ylim(floor, max(200.0, 1.6 * highest))
            if column == 0:
                axis.set_ylabel("% of the copy's bandwidth")
            if line == len(dtypes) - 1:
                axis.set_xlabel("bytes moved, by contract", labelpad=6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "copy" or labels[i].endswith("%"))
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel(machine_facts.summary(machine), fontsize=8, color="#555555")
    buffer = io.BytesIO()
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    figure.savefig(buffer, format=kind, dpi=150)
    write_atomically(path, buffer.getvalue())


def _panel(
    axis: Any, rows: Sequence[Row], providers: Sequence[str], styles: dict[str, tuple[str, str]]
) -> None:
    """One dtype and mode. The axis is matplotlib's, which does not type its own well."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axhspan(GOAL, 100.0, color="#0072B2", alpha=0.12, lw=0, label=f"{GOAL:.0f} to 100 %")
    axis.axhline(100.0, color="black", lw=1.2, label="copy")
    for provider in providers:
        own = sorted((row for row in rows if row.provider == provider), key=lambda row: row.bytes)
        if not own:
            continue
        colour, marker = styles[provider]
        main = provider == "fusereg"
        axis.plot(
            [row.bytes for row in own],
            [row.percent_of_copy for row in own],
            color=colour,
            marker=marker,
            # Two names of the same kernel lie on each other: the larger one shows from behind.
            markersize=8 if main else 11 if provider == "WeightPenalty" else 6.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            # The marks are what was measured; a thin line only helps to follow a provider.
            lw=0.8,
            label=provider,
            zorder=4 if main else 3,
        )
        for row in own if main else []:
            axis.annotate(
                f"{row.percent_of_copy:.0f}",
                (row.bytes, row.percent_of_copy),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                fontweight="bold",
                color=colour,
                zorder=5,
                path_effects=_white_edge(),
            )
    shapes = {row.bytes: row.shape for row in sorted(rows, key=lambda row: row.bytes)}
    positions = list(shapes)
    for position in positions:
        axis.axvline(position, color="#E6E6E6", lw=0.8, zorder=0)
    span = math.log10(positions[-1] / positions[0]) or 1.0
    axis.set_xlim(positions[0] / 10 ** (0.14 * span), positions[-1] * 10 ** (0.14 * span))
    labels = []
    low_before = True
    for index, position in enumerate(positions):
        near = index > 0 and math.log10(position / positions[index - 1]) < 0.2 * span
        # Names that would run into their neighbour go one storey down, every other one.
        low = near and not low_before
        labels.append(("\n\n" if low else "") + f"{shapes[position]}\n{_bytes_text(position)}")
        low_before = low
    axis.xaxis.set_major_locator(FixedLocator(positions))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels(labels, fontsize=8)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="y", color="#E6E6E6", lw=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _white_edge() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]
