"""Style of the package's pictures: colors, titles, axes.

matplotlib is imported when a picture is made.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe, Ito 2008, told apart with any color vision; without its yellow, too pale on white.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
FUSED_COLOR, PLAIN_COLOR = COLORS[6], COLORS[1]
GRAY = "#666666"

# The same colors and four more, readable on white and on black, for what also has a marker. Their
# number and that of the markers have no common divisor: cycling through both gives each pair once.
STYLE_COLORS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#7B61C9",
    "#C2185B", "#7A9A01",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "h", "P", "X")
Style = tuple[str, str]  # color and marker


def styles(names: Iterable[str], fixed: Mapping[str, Style] | None = None) -> dict[str, Style]:
    """Return a color and a marker for each name, no two names with the same color and marker.

    Args:
        names: What is drawn.
        fixed: Styles of some names, which no other name gets.
    """
    found = dict(fixed or {})
    taken = set(found.values())
    pairs = zip(STYLE_COLORS * len(MARKERS), MARKERS * len(STYLE_COLORS), strict=True)
    spare = (pair for pair in pairs if pair not in taken)
    for name in names:
        if name not in found:
            found[name] = next(spare)
    return found


def new_figure(
    width: float,
    height: float,
    title: str,
    subtitle: str,
    layout: Literal["constrained", "compressed"] | None = "constrained",
) -> Figure:
    """Return a figure of this size in inches, with a title and a line below it at the left.

    Both are wrapped to the width. matplotlib lays out everything else below them ("compressed"
    suits images), unless `layout` is None: then the caller leaves the uppermost 0.75 inch free.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    top = 0.14
    for text, size, color, weight in (
        (textwrap.fill(title, int(8.5 * width)), 13.0, "black", "bold"),
        (textwrap.fill(subtitle, int(13 * width)), 9.5, GRAY, "normal"),
    ):
        at = (0.15 / width, 1 - top / height)
        figure.text(*at, text, size=size, color=color, weight=weight, va="top", in_layout=False)
        top += 0.06 + (text.count("\n") + 1) * size * 1.2 / 72
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        edge = 0.12  # inches left free
        inner = (1 - 2 * edge / width, 1 - (top + 0.05 + edge) / height)
        engine.set(rect=(edge / width, edge / height, inner[0], inner[1]))
    return figure


def tidy(axes: Axes) -> None:
    """Leave out the upper and the right frame, and draw a pale grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
