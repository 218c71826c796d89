"""The first layer as pictures: what hidden units look at, which input pixels are used at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusereg.demo.data import DataSet
from fusereg.demo.style import GREY, new_figure
from fusereg.demo.techniques import linear_weights
from fusereg.demo.train import Result

UNITS = 9
# In neither colour map, so that an exact zero cannot be taken for a small weight.
ZERO_COLOUR = "#9a9a9a"

Floats = npt.NDArray[np.float64]


def _first_layer(result: Result) -> Floats:
    weights: Floats = linear_weights(result.fused.model)[0].detach().cpu().double().numpy()
    return weights


def _image(axes: Axes, values: Floats, colours: str, low: float, high: float) -> None:
    shades = colormaps[colours].with_extremes(bad=ZERO_COLOUR)
    axes.imshow(
        np.ma.masked_equal(values, 0.0),
        cmap=shades,
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _title(results: Sequence[Result], pixels: int) -> str:
    dead = {r.technique.label: int((_first_layer(r) == 0).all(axis=0).sum()) for r in results}
    most = max(dead, key=lambda label: dead[label], default="")
    if most and dead[most]:
        return f"First-layer filters: {most} leaves {dead[most]} of {pixels} input pixels unused"
    return "First-layer filters: every input pixel is used"


def filters(results: Sequence[Result], data: DataSet) -> Figure:
    """A row a technique: the norm of each input pixel's weights, then some hidden units."""
    shown = [r for r in results if not r.fused.diverged]
    cell = 0.95
    width, height = 2.05 + cell * (UNITS + 1), 1.35 + cell * max(len(shown), 1)
    figure = new_figure(
        width,
        height,
        _title(shown, data.pixels),
        "Blue: positive, red: negative, grey: exactly zero. The same units in every row; "
        "each row has its own scale.",
    )
    if not shown:
        return figure
    panels = figure.subplots(len(shown), UNITS + 1, squeeze=False)
    figure.subplots_adjust(
        left=1.65 / width,
        right=1 - 0.1 / width,
        bottom=0.08 / height,
        top=1 - 1.15 / height,
        wspace=0.07,
        hspace=0.07,
    )
    # The units that the first row uses most: those with the largest weights.
    units = np.argsort(-np.linalg.norm(_first_layer(shown[0]), axis=1), kind="stable")[:UNITS]
    shape = (data.height, data.width)
    for row, result in zip(panels, shown, strict=True):
        weights = _first_layer(result)
        norms = np.linalg.norm(weights, axis=0)
        _image(row[0], norms.reshape(shape), "cividis", 0.0, float(norms.max()) or 1.0)
        reach = (
            float(np.quantile(np.abs(weights[units]), 0.995)) or float(np.abs(weights).max()) or 1.0
        )
        for axes, unit in zip(row[1:], units, strict=False):
            _image(axes, weights[unit].reshape(shape), "RdBu", -reach, reach)
        used = int((norms > 0).sum())
        row[0].text(
            -0.1,
            0.5,
            f"{result.technique.label}\n",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            size=10,
        )
        row[0].text(
            -0.1,
            0.42,
            f"{used} pixels used",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            size=8,
            color=GREY,
        )
    panels[0][0].set_title("norm of each\npixel's weights", size=8.5)
    for axes, unit in zip(panels[0][1:], units, strict=False):
        axes.set_title(f"unit {unit + 1}", size=8.5)
    return figure
