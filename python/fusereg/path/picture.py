"""Pictures of a path. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.pictures import COLORS, GRAY, new_figure, tidy
from .point import PathPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the panels below the metric: the point's field, the axis's label, the factor.
_PANELS = (
    ("zeros", "zeros, %", 100.0),
    ("groups", "groups used", 1.0),
    ("operations", "operations,\nmillions", 1e-6),
    ("milliseconds", "milliseconds", 1.0),
)
_MARKERS = "osD^v"


def _positions(strengths: list[float]) -> list[float]:
    """Return places on a logarithmic axis; 0, which has none, left of the weakest."""
    positive = sorted(s for s in strengths if s > 0)
    if not positive:
        return [1.0 for _ in strengths]
    step = positive[1] / positive[0] if len(positive) > 1 else 2.0
    return [s if s > 0 else positive[0] / max(step, 1.5) for s in strengths]


def draw_path(
    points: Sequence[PathPoint], best: PathPoint, chosen: PathPoint | None, samples: int | None
) -> Figure:
    """Draw a panel for each quantity over the strength."""
    points = sorted(points, key=lambda p: p.strength)
    values: dict[str, list[Any]] = {
        name: [getattr(p, name, None) for p in points] for name, _, _ in _PANELS
    }
    values["groups"] = [sum(p.used) if p.used else None for p in points]
    panels = [panel for panel in _PANELS if any(v is not None for v in values[panel[0]])]
    x = _positions([p.strength for p in points])
    metric = next(iter(points[0].metrics))
    title, subtitle = _words(metric, best, chosen, samples)
    figure = new_figure(8.0, 2.7 + 1.35 * len(panels), title, subtitle)
    axes = figure.subplots(
        len(panels) + 1, 1, sharex=True, squeeze=False, height_ratios=[1.6] + [1.0] * len(panels)
    )[:, 0]

    style: dict[str, Any] = {"markersize": 5, "linewidth": 1.5}
    shown = [p.value for p in points]
    axes[0].plot(x, shown, color=COLORS[6], marker=_MARKERS[0], **style)
    if best.standard_error is not None:
        low, high = best.value - best.standard_error, best.value + best.standard_error
        axes[0].axhspan(low, high, color=COLORS[6], alpha=0.12, linewidth=0)
    axes[0].set_ylabel(metric)
    for i, (name, label, factor) in enumerate(panels):
        own = [math.nan if v is None else factor * v for v in values[name]]
        # Colors and markers of their own: no line of one panel is taken for another's.
        axes[i + 1].plot(x, own, color=COLORS[i + 1], marker=_MARKERS[i + 1], **style)
        axes[i + 1].set_ylabel(label)
        top = max((v for v in own if not math.isnan(v)), default=0.0)
        axes[i + 1].set_ylim(0, 1.12 * top or 1.0)
    for one in axes:
        tidy(one)
        for point, line in ((best, ":"), (chosen, "--")):
            if point is not None:
                one.axvline(x[points.index(point)], color=GRAY, linestyle=line, linewidth=1.2)
    if any(p.strength > 0 for p in points):
        axes[-1].set_xscale("log")
        if points[0].strength == 0:
            _label_zero(axes[-1], x[0])
    axes[-1].set_xlabel("strength")
    figure.align_ylabels()
    return figure


def _label_zero(axes: Any, at: float) -> None:
    """Write 0 below the point without a penalty, in place of the ticks there."""
    axes.annotate(
        "0", (at, 0), xycoords=("data", "axes fraction"), xytext=(0, -4),
        textcoords="offset points", ha="center", va="top", size=10,
    )  # fmt: skip
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def text(value: float, _: Any) -> str:
        return f"{value:g}" if value > 1.3 * at else ""

    axes.set_xlim(left=at / 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(text))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _words(
    metric: str, best: PathPoint, chosen: PathPoint | None, samples: int | None
) -> tuple[str, str]:
    """Return title and subtitle, with the figures of the choice."""
    text = f"{metric.capitalize()} {best.value:.4g} at best (dotted, strength {best.strength:.3g})"
    if chosen is None:
        return f"Best {metric} at strength {best.strength:.3g}", text + "."
    kept = f"{100 * chosen.zeros:.0f} % of the weights are zero"
    if chosen.used:
        kept = f"{sum(chosen.used)} of {len(chosen.used)} groups are used"
    how = f" = √(p(1−p)/{samples:,})" if samples else ""
    return (
        f"One standard error of {metric} allows strength {chosen.strength:.3g}: {kept}",
        f"{text}, {chosen.value:.4g} at the chosen strength (dashed). Band: one standard "
        f"error{how} of the validation split around the best.",
    )


def draw_groups(points: Sequence[PathPoint], leaves_at: Mapping[str, float], most: int) -> Figure:
    """Draw a bar for each group up to the strength at which it leaves."""
    if not leaves_at:
        raise ValueError("fusereg.path: there are no groups to draw; pass penalized= to path")
    left = list(leaves_at.items())
    shown = left[:most]
    strengths = sorted({p.strength for p in points if p.strength > 0})
    if not strengths:
        raise ValueError("fusereg.path: a picture of the groups needs a strength > 0")
    low, high = min(strengths[-1], *(s for _, s in shown)) / 1.5, strengths[-1] * 1.5
    more = f"; the first {len(left) - len(shown)} to leave are not shown" if left[most:] else ""
    figure = new_figure(
        8.0,
        1.5 + 0.24 * len(shown),
        f"The last to leave: {', '.join(name for name, _ in shown[:3])}",
        f"Bars end at the strength from which on all weights of a group are zero{more}. "
        "Hatched: still used at the strongest.",
    )
    axes = figure.subplots()
    for i, (_, strength) in enumerate(shown):
        stays = math.isinf(strength)
        end = high if stays else max(strength, low)
        axes.barh(
            i, end - low, left=low, height=0.7, color=COLORS[2] if stays else COLORS[6],
            hatch="///" if stays else None, edgecolor="white", linewidth=0,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("strength at which it leaves")
    tidy(axes)
    axes.grid(False, axis="y")
    return figure
