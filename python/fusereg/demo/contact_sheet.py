"""What augmentation does to the digits, as one picture."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fusereg.augment import Augment, Erase, Mix
from fusereg.demo.data import CLASSES, DataSet
from fusereg.demo.style import new_figure
from fusereg.demo.techniques import make_augment

DRAWS = 4


def _rows(images: Tensor) -> list[tuple[str, Tensor]]:
    """(label, [CLASSES, height, width]) from top to bottom; every call draws the same."""
    size = (images.shape[2], images.shape[3])
    chain = make_augment(size)
    ids = range(len(images))
    rows = [("as they are", images)]
    rows += [
        (f"epoch {epoch + 1}", chain(images, sample_ids=ids, epoch=epoch)) for epoch in range(DRAWS)
    ]
    others = {
        "resized crop": Augment(size, crop="resized", crop_scale=(0.5, 0.9)),
        "erasing": Augment(size, erase=Erase(1.0, (0.05, 0.2), value=0.5), crop="center"),
        "MixUp": Augment(size, mix=Mix(mixup=1.0), crop="center"),
        "CutMix": Augment(size, mix=Mix(cutmix=1.0), crop="center"),
    }
    rows += [(name, augment(images, sample_ids=ids)) for name, augment in others.items()]
    return [(name, made[:, 0]) for name, made in rows]


def contact_sheet(data: DataSet) -> Figure:
    """A digit of each label across; down: as it is, and what augmentation makes of it."""
    chosen = []
    for label in range(CLASSES):
        found = (data.train_labels == label).nonzero()[:, 0]
        chosen += found[:1].tolist()
    images = data.train_images[torch.tensor(chosen, device=data.train_images.device)]
    rows = _rows(images.view(-1, 1, data.height, data.width).cpu())
    cell, left, top = 0.62, 1.35, 0.8
    width, height = left + cell * len(chosen) + 0.1, top + cell * len(rows) + 0.1
    figure = new_figure(
        width,
        height,
        "Augmentation: turned, zoomed, shifted, sheared in one pass",
        "A digit of each label. Each is changed anew in every epoch, by numbers keyed by its id.",
    )
    panels = figure.subplots(len(rows), len(chosen), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.1 / width,
        bottom=0.1 / height,
        top=1 - top / height,
        wspace=0.06,
        hspace=0.06,
    )
    for line, (name, made) in zip(panels, rows, strict=True):
        for axes, image in zip(line, made, strict=True):
            axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", size=9)
    return figure
