"""The demo's pictures, made in memory: losses, accuracies, weights, filters, augmentation, times.

Titles are worked out from the figures, so that they hold for any data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fusereg.demo.contact_sheet import contact_sheet
from fusereg.demo.data import DataSet
from fusereg.demo.filters import filters
from fusereg.demo.style import FUSED_COLOUR, PLAIN_COLOUR, colour, dashes, new_figure, png, tidy
from fusereg.demo.techniques import linear_weights
from fusereg.demo.train import Result

Floats = npt.NDArray[np.float64]


def _curve(result: Result, what: str) -> Floats:
    return np.array([getattr(epoch, what) for epoch in result.fused.epochs], dtype=np.float64)


def _loss_title(results: Sequence[Result]) -> str:
    control = next((r for r in results if r.technique.name == "none"), None)
    if control is None or control.fused.diverged or len(control.fused.epochs) < 3:
        return "Cross-entropy of every epoch"
    test = _curve(control, "test_loss")
    best = int(np.argmin(test))
    if test[-1] > 1.03 * test[best]:
        title = f"Without a penalty the test loss rises after epoch {best + 1}"
        others = [r for r in results if r is not control and not r.fused.diverged]
        if others and all(r.fused.last.test_loss < test[-1] for r in others):
            title += ", with each one it ends lower"
        return title
    return "Cross-entropy of every epoch: without a penalty the test loss does not rise"


def loss_curves(results: Sequence[Result]) -> Figure:
    """Cross-entropy after each epoch, training and test images."""
    compared = any(r.plain is not None for r in results)
    subtitle = "Cross-entropy without the penalty's own term."
    if compared:
        subtitle += " Lines: fusereg. Dots: plain PyTorch, same weights and batches."
    figure = new_figure(10.5, 4.9, _loss_title(results), subtitle)
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.83, bottom=0.12, top=0.80, wspace=0.22)
    for axes, what, name in (
        (panels[0], "train_loss", "Training images"),
        (panels[1], "test_loss", "Test images"),
    ):
        for index, result in enumerate(results):
            values = _curve(result, what)
            epochs = np.arange(1, len(values) + 1)
            axes.plot(
                epochs,
                values,
                color=colour(index),
                linestyle=dashes(index),
                linewidth=1.8,
                label=result.technique.label,
            )
            back = result.fused.restored
            if back is not None:  # the model is this epoch's, whatever came after
                axes.plot(back + 1, values[back], "D", markersize=6, color=colour(index))
            if result.plain is not None:
                dots = [getattr(epoch, what) for epoch in result.plain.epochs]
                every = max(1, len(dots) // 8)
                start = (index * every) // max(len(results), 1)  # so that dots do not pile up
                axes.plot(
                    range(1 + start, len(dots) + 1, every),
                    dots[start::every],
                    linestyle="none",
                    marker="o",
                    markersize=4,
                    color=colour(index),
                    markerfacecolor="white",
                )
        axes.set_yscale("log")
        axes.set_title(name, size=10.5, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        plain_number = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain_number)
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(plain_number if high / low < 12 else NullFormatter())
        axes.tick_params(which="both", labelsize=9)
        tidy(axes)
    panels[0].set_ylabel("mean cross-entropy (log scale)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(0.845, 0.5), frameon=False)
    return figure


def accuracy(results: Sequence[Result], data: DataSet) -> Figure:
    """Training and test accuracy of each technique as the ends of a bar: its length is the gap."""
    shown = [r for r in results if not r.fused.diverged]
    control = next((r for r in shown if r.technique.name == "none"), None)
    others = [r for r in shown if r is not control]
    title = "Accuracy on training and test images"
    if control is not None and others:
        narrow = min(others, key=lambda r: r.fused.gap)
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
    bottom = 0.62 / figure.get_figheight()
    figure.subplots_adjust(
        left=0.2, right=0.86, bottom=bottom, top=1 - 0.95 / figure.get_figheight()
    )
    for index, result in enumerate(shown):
        end, tint = result.fused.last, colour(results.index(result))
        train, test = 100 * end.train_accuracy, 100 * end.test_accuracy
        axes.plot([test, train], [index, index], color=tint, linewidth=3, zorder=2)
        axes.plot(test, index, "o", color=tint, markersize=9, zorder=3)
        axes.plot(train, index, "o", color=tint, markersize=9, markerfacecolor="white", zorder=3)
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
        "accuracy, %  (filled: test images, hollow: training images, figure: gap in points)"
    )
    tidy(axes)
    axes.grid(False, axis="y")
    return figure


def _all_weights(result: Result) -> Floats:
    parts = [w.detach().cpu().double().numpy().ravel() for w in linear_weights(result.fused.model)]
    return np.concatenate(parts)


def weight_histograms(results: Sequence[Result]) -> Figure:
    """Histogram of each network's weights, exact zeros apart."""
    shown = [r for r in results if not r.fused.diverged]
    sparse = [
        f"{100 * r.fused.zeros:.0f} % with {r.technique.label}"
        for r in shown
        if r.fused.zeros >= 0.01
    ]
    title = f"Weights that are exactly zero: {', '.join(sparse) or 'none'}"
    columns = min(3, max(len(shown), 1))
    rows = -(-max(len(shown), 1) // columns)
    figure = new_figure(
        10.5,
        1.2 + 2.35 * rows,
        title,
        "All weights of both layers; bars: weights that are not zero. The same scales everywhere.",
    )
    panels = np.atleast_1d(np.asarray(figure.subplots(rows, columns, sharex=True, sharey=True)))
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.08,
        right=0.985,
        bottom=0.55 / height,
        top=1 - 1.05 / height,
        hspace=0.32,
        wspace=0.08,
    )
    values = [_all_weights(r) for r in shown]
    # The few largest weights (second layer) would squeeze all others into two bars.
    reach = max((float(np.quantile(np.abs(v), 0.998)) for v in values), default=1.0) or 1.0
    bins = np.linspace(-reach, reach, 82)
    for axes, result, weights in zip(panels.flat, shown, values, strict=False):
        tint = colour(results.index(result))
        nonzero = weights[weights != 0]
        axes.hist(np.clip(nonzero, -reach, reach), bins=bins, color=tint, log=True)
        axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
        axes.set_title(result.technique.label, size=10.5, loc="left")
        note = f"{100 * result.fused.zeros:.1f} % exactly 0"
        axes.text(
            0.99,
            0.95,
            f"{note}\nRMS {float(np.sqrt(np.mean(weights**2))):.3f}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            size=9,
        )
        tidy(axes)
        axes.tick_params(labelsize=9)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("weight (the outermost bars hold all beyond)", size=10, y=0.1 / height)
    figure.supylabel("weights per bar (log scale)", size=10, x=0.012)
    return figure


def epoch_times(results: Sequence[Result]) -> Figure:
    """Median time of an epoch, fusereg and plain PyTorch, with the middle 60 % of the epochs."""
    shown = [(r, r.plain) for r in results if r.plain is not None]
    ratios = [
        plain.seconds_per_epoch / r.fused.seconds_per_epoch
        for r, plain in shown
        if r.technique.name != "none"
    ]
    title = "Time of a training epoch"
    if ratios:
        middle = float(np.median(ratios))
        title = f"An epoch in plain PyTorch takes {middle:.2f} times as long as in fusereg"
    figure = new_figure(
        9.5,
        1.7 + 0.55 * max(len(shown), 2),
        title,
        "Title: median of the techniques. Bars: median epoch (forward, backward, step); "
        "whiskers: middle 60 %.",
    )
    axes = figure.subplots()
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.2, right=0.9, bottom=0.62 / height, top=1 - 1.1 / height)
    for offset, name, tint in ((-0.19, "fusereg", FUSED_COLOUR), (0.19, "PyTorch", PLAIN_COLOUR)):
        for index, (result, plain) in enumerate(shown):
            run = result.fused if name == "fusereg" else plain
            times = 1e3 * np.array([epoch.seconds for epoch in run.epochs])
            low, middle, high = np.quantile(times, (0.2, 0.5, 0.8))
            axes.barh(
                index + offset,
                middle,
                height=0.36,
                color=tint,
                xerr=[[middle - low], [high - middle]],
                error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "#333333"},
                label=name if index == 0 else None,
            )
            axes.annotate(
                f"{middle:.1f} ms",
                (high, index + offset),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                size=8.5,
            )
    axes.set_yticks(range(len(shown)), [r.technique.label for r, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("milliseconds an epoch")
    axes.margins(x=0.1)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    tidy(axes)
    axes.grid(False, axis="y")
    return figure


def make_all(results: Sequence[Result], data: DataSet) -> dict[str, bytes]:
    """All pictures, by file name."""
    figures = {
        "loss_curves.png": loss_curves(results),
        "accuracy.png": accuracy(results, data),
        "weight_histograms.png": weight_histograms(results),
        "filters.png": filters(results, data),
    }
    if any(result.technique.name == "augmentation" for result in results):
        figures["augmentation.png"] = contact_sheet(data)
    if any(result.plain is not None for result in results):
        figures["epoch_times.png"] = epoch_times(results)
    return {name: png(figure) for name, figure in figures.items()}
