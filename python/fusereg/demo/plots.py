"""The demo's pictures, made in memory. Titles are computed from the figures, for any data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fusereg.core.pictures import (
    FUSED_COLOR,
    GRAY,
    PLAIN_COLOR,
    Style,
    new_figure,
    png,
    styles,
    tidy,
)
from fusereg.demo import mosaics
from fusereg.demo.data import DataSet
from fusereg.demo.techniques import TECHNIQUES, linear_weights
from fusereg.demo.train import Result, Run

COLUMNS = 4  # of small panels

Floats = npt.NDArray[np.float64]

# Of the control; no other technique has this color.
CONTROL: Style = ("#000000", "o")


def style_of(result: Result) -> Style:
    """Return a technique's color and marker: the same in every picture, whatever else is drawn."""
    names = [technique.name for technique in TECHNIQUES]
    return styles([*names, result.technique.name], {"none": CONTROL})[result.technique.name]


def _converged(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if not result.fused.diverged]


def _control(results: Sequence[Result]) -> Result | None:
    return next((r for r in _converged(results) if r.technique.name == "none"), None)


def _panels(figure: Figure, results: Sequence[Result], label: str) -> list[Axes]:
    """Add a small panel for each technique, titled by it; label the x axes of the lowest."""
    columns = min(COLUMNS, max(len(results), 1))
    rows = _rows(results)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, result in zip(panels, results, strict=False):
        axes.set_title(result.technique.label, size=10, loc="left")
        axes.tick_params(which="both", labelsize=9)
        tidy(axes)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(results) - columns) : len(results)]:
        axes.tick_params(labelbottom=True)  # also above an empty place
        axes.set_xlabel(label, size=9)
    return panels


def _rows(results: Sequence[Result]) -> int:
    return -(-max(len(results), 1) // COLUMNS)


def _values(run: Run, what: str) -> Floats:
    return np.array([getattr(epoch, what) for epoch in run.epochs], dtype=np.float64)


def _plot(axes: Axes, run: Run, what: str, every: int = 1, **style: Any) -> None:
    """Plot a figure of every so many epochs."""
    values = _values(run, what)
    axes.plot(range(1, len(values) + 1, every), values[::every], **style)


def _loss_title(results: Sequence[Result]) -> str:
    control = _control(results)
    if control is None or len(control.fused.epochs) < 3:
        return "Cross-entropy after every epoch"
    test = _values(control.fused, "test_loss")
    best = int(np.argmin(test))
    if test[-1] <= 1.03 * test[best]:
        return "Cross-entropy after every epoch: without regularization the test loss does not rise"
    title = f"Without regularization the test loss rises after epoch {best + 1}"
    others = [r for r in _converged(results) if r is not control]
    if others and all(r.fused.last.test_loss < test[-1] for r in others):
        title += "; with each technique it ends lower"
    return title


def loss_curves(results: Sequence[Result]) -> Figure:
    """Plot cross-entropy after each epoch on training and test images, a panel per technique."""
    subtitle = "Mean cross-entropy without the penalty's own term."
    if any(r.technique.same_steps and r.plain for r in results):
        subtitle += " Plain PyTorch has the same initial weights and batches."
    if any(r.fused.restored is not None for r in results):
        subtitle += " Diamond: the epoch that early stopping restored."
    figure = new_figure(11, 1.7 + 2.0 * _rows(results), _loss_title(results), subtitle)
    panels, control = _panels(figure, results, "epoch"), _control(results)
    style: dict[str, Any]
    for axes, result in zip(panels, results, strict=False):
        color, marker = style_of(result)
        for what, dash, name in (("train_loss", "--", "training"), ("test_loss", "-", "test")):
            if control is not None and control is not result:
                style = {"color": GRAY, "linestyle": dash, "linewidth": 0.8}
                _plot(axes, control.fused, what, label=f"{name} images, none", **style)
            style = {"color": color, "linestyle": dash, "linewidth": 1.8, "markersize": 5}
            style["marker"] = marker if name == "test" else None
            style["markevery"] = max(1, len(result.fused.epochs) // 5)
            _plot(axes, result.fused, what, label=f"{name} images, fusereg", **style)
            if result.plain is not None:
                every = max(1, len(result.plain.epochs) // 8)
                style = {"color": GRAY, "linestyle": "none", "marker": "x", "markersize": 5}
                _plot(axes, result.plain, what, every, label="PyTorch", **style)
        back = result.fused.restored
        if back is not None:  # the model is this epoch's, whatever came after
            style = {"color": color, "markerfacecolor": "white", "markersize": 8, "zorder": 4}
            axes.plot(back + 1, result.fused.last.test_loss, "D", **style)
    axes = panels[0]
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    # Where training overfits, its loss would take most of the axis.
    low, high = axes.get_ylim()
    tests = [epoch.test_loss for r in _converged(results) for epoch in r.fused.epochs]
    low = max(low, min(tests, default=low) / 4)
    axes.set_ylim(low, high)
    figure.supylabel("cross-entropy (log)", size=10)
    handles = {}
    for axes in panels[: len(results)]:
        handles.update({line.get_label(): line for line in axes.get_lines()})
    names = [str(name) for name in handles if not str(name).startswith("_")]
    lines = [handles[name] for name in names]
    legend = figure.legend(
        lines, names, loc="outside lower center", ncols=len(names), frameon=False
    )
    for line, name in zip(legend.get_lines(), names, strict=True):
        if name.endswith("fusereg"):  # each panel's own color
            line.set(color="black", marker="none")
    return figure


def accuracy(results: Sequence[Result], data: DataSet) -> Figure:
    """Plot each technique's training and test accuracy as the ends of a bar as long as the gap."""
    shown, control = _converged(results), _control(results)
    title = "Accuracy on training and test images"
    if control is not None and len(shown) > 1:
        narrow = min((r for r in shown if r is not control), key=lambda r: r.fused.gap)
        label = narrow.technique.label
        if narrow.fused.gap < control.fused.gap:
            title = (
                f"{label[:1].upper()}{label[1:]} narrows the gap between training and test from "
                f"{100 * control.fused.gap:.1f} to {100 * narrow.fused.gap:.1f} points"
            )
    figure = new_figure(
        9.5,
        1.6 + 0.5 * max(len(shown), 2),
        title,
        f"At the end; {len(data.test_labels):,} test images. Right: share of weights exactly zero.",
    )
    axes = figure.subplots()
    for index, result in enumerate(shown):
        color, marker = style_of(result)
        end = result.fused.last
        train, test = 100 * end.train_accuracy, 100 * end.test_accuracy
        axes.plot([test, train], [index, index], color=color, linewidth=3, zorder=2)
        ends: dict[str, Any] = {"marker": marker, "color": color, "markersize": 9, "zorder": 3}
        axes.plot(test, index, **ends)
        axes.plot(train, index, markerfacecolor="white", **ends)
        axes.annotate(
            f"{100 * result.fused.gap:.1f}",
            ((train + test) / 2, index),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            size=9,
        )
        axes.annotate(
            f"{100 * result.fused.zeros:.1f} % zeros",
            (1.01, index),
            xycoords=("axes fraction", "data"),
            va="center",
            size=9.5,
        )
    axes.set_yticks(range(len(shown)), [r.technique.label for r in shown])
    axes.set_ylim(len(shown) - 0.4, -0.75)
    axes.set_xlabel(
        "accuracy, %  (filled: test images, hollow: training images, number: gap in points)"
    )
    tidy(axes)
    axes.grid(False, axis="y")
    return figure


def weight_histograms(results: Sequence[Result]) -> Figure:
    """Plot a histogram of each network's weights, exact zeros apart."""
    shown = _converged(results)
    sparse = [
        f"{100 * r.fused.zeros:.0f} % with {r.technique.label}"
        for r in shown
        if r.fused.zeros >= 0.01
    ]
    figure = new_figure(
        10.5,
        1.4 + 2.0 * _rows(shown),
        f"Weights that are exactly zero: {', '.join(sparse) or 'none'}",
        "All weights of both layers; bars: weights that are not zero. The same scales everywhere.",
    )
    values = [
        np.concatenate([w.detach().cpu().double().numpy().ravel() for w in linear_weights(model)])
        for model in (r.fused.model for r in shown)
    ]
    panels = _panels(figure, shown, "weight (outermost bars: all beyond)")
    # The few largest weights (second layer) would squeeze all others into two bars.
    reach = max((float(np.quantile(np.abs(v), 0.998)) for v in values), default=1.0) or 1.0
    bins = np.linspace(-reach, reach, 82).tolist()
    for axes, result, weights in zip(panels, shown, values, strict=False):
        color, _ = style_of(result)
        nonzero = np.clip(weights[weights != 0], -reach, reach)
        axes.hist(nonzero, bins=bins, color=color, log=True, histtype="stepfilled")
        axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
        rms = float(np.sqrt(np.mean(weights**2)))
        note = f"{100 * result.fused.zeros:.1f} % exactly 0\nRMS {rms:.3f}"
        axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", size=9)
    figure.supylabel("weights per bar (log)", size=10)
    return figure


def epoch_times(results: Sequence[Result]) -> Figure:
    """Plot the median time of an epoch and the middle 60 %, with fusereg and in plain PyTorch."""
    shown = [(r, r.plain) for r in results if r.plain is not None]
    ratios = [
        plain.seconds_per_epoch / r.fused.seconds_per_epoch
        for r, plain in shown
        if r.technique.name != "none"
    ]
    title = "Time of a training epoch"
    if ratios:
        middle = float(np.median(ratios))
        title = f"An epoch in plain PyTorch takes {middle:.2f} times as long as with fusereg"
    figure = new_figure(
        9.5,
        1.7 + 0.55 * max(len(shown), 2),
        title,
        "Title: median of the techniques. Bars: median epoch (forward, backward, step); "
        "whiskers: middle 60 %.",
    )
    axes = figure.subplots()
    for offset, color in ((-0.19, FUSED_COLOR), (0.19, PLAIN_COLOR)):
        for index, (result, plain) in enumerate(shown):
            run = result.fused if offset < 0 else plain
            low, middle, high = np.quantile(1e3 * _values(run, "seconds"), (0.2, 0.5, 0.8))
            axes.barh(
                index + offset,
                middle,
                height=0.36,
                color=color,
                xerr=[[middle - low], [high - middle]],
                error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "#333333"},
                label=run.provider if index == 0 else None,
            )
            axes.annotate(
                f"{middle:.1f} ms",
                (high, index + offset),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                size=9,
            )
    axes.set_yticks(range(len(shown)), [r.technique.label for r, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("milliseconds per epoch")
    axes.margins(x=0.1)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    tidy(axes)
    axes.grid(False, axis="y")
    return figure


def figures(results: Sequence[Result], data: DataSet) -> dict[str, Figure]:
    """Return all pictures by file name."""
    made = {
        "loss_curves.png": loss_curves(results),
        "accuracy.png": accuracy(results, data),
        "weight_histograms.png": weight_histograms(results),
        "filters.png": mosaics.filters(results, data),
    }
    if any(result.technique.name == "augmentation" for result in results):
        made["augmentation.png"] = mosaics.augmentation(data)
    if any(result.plain is not None for result in results):
        made["epoch_times.png"] = epoch_times(results)
    return made


def make_all(results: Sequence[Result], data: DataSet) -> dict[str, bytes]:
    """Return the content of all picture files by name."""
    return {name: png(figure) for name, figure in figures(results, data).items()}
