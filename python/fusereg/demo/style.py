"""How the demo's pictures look: colours, titles, axes.

Colours are Okabe and Ito's, told apart with any colour vision; neighbours that may coincide (L1 by
gradient and by prox) also differ in their dashes.
"""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe, Ito 2008, without its yellow, which is too pale for lines on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-",
    "-",
    "-",
    "-",
    (0, (3, 1.5)),
    "-.",
    ":",
)
# Rows beyond the palette take its colours again, but never the black of the control, dashed anew.
LATER_DASHES = ((0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (6, 3)))
GREY = "#666666"
FUSED_COLOUR, PLAIN_COLOUR = "#0072B2", "#E69F00"


def colour(index: int) -> str:
    """The colour of a row of the table."""
    return COLOURS[index if index == 0 else 1 + (index - 1) % (len(COLOURS) - 1)]


def dashes(index: int) -> str | tuple[int, tuple[float, ...]]:
    """The line style of a row of the table."""
    if index < len(DASHES):
        return DASHES[index]
    return LATER_DASHES[(index - len(DASHES)) // (len(COLOURS) - 1) % len(LATER_DASHES)]


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure with a title and a line below it at the left; they take the uppermost 0.75 inch."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.15 / width, 1 - 0.14 / height, title, size=13, weight="bold", va="top")
    figure.text(0.15 / width, 1 - 0.42 / height, subtitle, size=9.5, color=GREY, va="top")
    return figure


def tidy(axes: Axes) -> None:
    """Fewer frames, a pale grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
