"""Pictures made of small images: first-layer weights, and what augmentation does to digits."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from fusereg.augment import Augment, Erase, Mix
from fusereg.core.pictures import new_figure
from fusereg.demo.data import CLASSES, DataSet
from fusereg.demo.techniques import linear_weights, make_augment
from fusereg.demo.train import Result

UNITS = 9
DRAWS = 4
# In none of the color maps, so that an exact zero cannot be taken for a small weight.
ZERO_COLOR = "#9a9a9a"

Floats = npt.NDArray[np.floating]


def _shade(values: Floats, colors: str, low: float, high: float) -> Floats:
    """Return RGBA colors of an image's values, exact zeros in a color of their own."""
    shades = colormaps[colors].with_extremes(bad=ZERO_COLOR)
    rgba: Floats = shades((np.ma.masked_equal(values, 0.0) - low) / ((high - low) or 1.0))
    return rgba


def _mosaic(
    rows: Sequence[tuple[str, Sequence[Floats]]],
    columns: Sequence[str],
    cell: float,
    title: str,
    subtitle: str,
) -> Figure:
    """Return a figure of rows of equally large RGBA images, each row with its label."""
    height, width = rows[0][1][0].shape[:2]
    gap = max(1, width // 14)
    # White between the images; the last gap on either side is cut off again.
    padding = ((0, gap), (0, gap), (0, 0))
    lines = [
        np.hstack([np.pad(image, padding, constant_values=1.0) for image in images])
        for _, images in rows
    ]
    count = len(rows[0][1])
    size = (2.1 + cell * count, 1.4 + cell * len(rows))
    figure = new_figure(*size, title, subtitle, "compressed")
    axes = figure.subplots()
    axes.imshow(np.vstack(lines)[:-gap, :-gap], interpolation="nearest")
    axes.set_yticks(
        [(height - 1) / 2 + i * (height + gap) for i in range(len(rows))],
        [label for label, _ in rows],
    )
    axes.set_xticks([(width - 1) / 2 + i * (width + gap) for i in range(len(columns))], columns)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def _first_layer(result: Result) -> Floats:
    weights: Floats = linear_weights(result.fused.model)[0].detach().cpu().double().numpy()
    return weights


def filters(results: Sequence[Result], data: DataSet) -> Figure:
    """Return a row for each technique: the norm of each pixel's weights, then some hidden units."""
    shape, pixels = (data.height, data.width), data.pixels
    subtitle = (
        "Blue: positive, red: negative, gray: exactly zero. The same units in every row; each row "
        "has its own scale."
    )
    shown = [r for r in results if not r.fused.diverged]
    if not shown:
        return new_figure(6.0, 1.5, "First-layer filters: every training diverged", "")
    # The units that the first row uses most: those with the largest weights.
    units = np.argsort(-np.linalg.norm(_first_layer(shown[0]), axis=1), kind="stable")[:UNITS]
    rows, unused = [], {}
    for result in shown:
        weights, label = _first_layer(result), result.technique.label
        norms = np.linalg.norm(weights, axis=0)
        unused[label] = int((norms == 0).sum())
        reach = float(np.quantile(np.abs(weights[units]), 0.995)) or float(np.abs(weights).max())
        images = [_shade(norms.reshape(shape), "cividis", 0.0, float(norms.max()))]
        images += [_shade(weights[u].reshape(shape), "RdBu", -reach, reach) for u in units]
        label_lines = textwrap.fill(label, 22)
        rows.append((f"{label_lines}\n{pixels - unused[label]} pixels used", images))
    most = max(unused, key=lambda label: unused[label])
    title = "First-layer filters: every input pixel is used"
    if unused[most]:
        title = f"First-layer filters: {most} leaves {unused[most]} of {pixels} pixels unused"
    columns = ["norm of each\npixel's weights", *(f"unit {unit + 1}" for unit in units)]
    return _mosaic(rows, columns, 0.95, title, subtitle)


def augmentation(data: DataSet) -> Figure:
    """Return a digit of each label across; down: as it is, and what augmentation makes of it."""
    first = [(data.train_labels == label).nonzero()[:1, 0] for label in range(CLASSES)]
    size = (data.height, data.width)
    images = data.train_images[torch.cat(first)].view(-1, 1, *size).cpu()
    chain, ids = make_augment(size), range(len(images))
    made = {"original": images}
    for epoch in range(DRAWS):
        made[f"epoch {epoch + 1}"] = chain(images, sample_ids=ids, epoch=epoch)
    for name, augment in {
        "resized crop": Augment(size, crop="resized", crop_scale=(0.5, 0.9)),
        "erasing": Augment(size, erase=Erase(1.0, (0.05, 0.2), value=0.5), crop="center"),
        "MixUp": Augment(size, mix=Mix(mixup=1.0), crop="center"),
        "CutMix": Augment(size, mix=Mix(cutmix=1.0), crop="center"),
    }.items():
        made[name], _ = augment(images, torch.arange(len(images)), sample_ids=ids)
    rows = [(name, list(colormaps["gray"](x[:, 0].numpy()))) for name, x in made.items()]
    return _mosaic(
        rows,
        [],
        0.62,
        "Augmentation: turned, zoomed, shifted, sheared in one pass",
        "A digit of each label. Each is changed anew in every epoch, by numbers keyed by its id.",
    )
