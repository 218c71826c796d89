"""Make contact sheets of the recipes beside torchvision's: `python docs/scripts/recipes.py FOLDER`.

Each sheet has photographs of scikit-learn's in ten draws: above by the recipe, below by the
transforms of its own library. Classification and evaluation have the same draws. One sheet has a
digit for each recipe that takes images without targets.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_images
from timm.data import create_transform
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fusereg.augment import recipes

COUNT, SIZE = 10, 128
MEAN, STD = (torch.tensor(v)[:, None, None] for v in (recipes.IMAGENET_MEAN, recipes.IMAGENET_STD))


def photographs() -> Tensor:
    """Return two photographs in turn."""
    images = [torch.tensor(i).permute(2, 0, 1) for i in load_sample_images().images]
    return torch.stack([images[i % 2] for i in range(COUNT)])


def shown(y: Tensor) -> Tensor:
    """Return a normalized image as bytes."""
    return ((y * STD + MEAN).clamp(0, 1) * 255).round().to(torch.uint8)


def _boxes(image: Tensor, boxes: Tensor) -> Tensor:
    """Draw boxes into an image."""
    for x0, y0, x1, y1 in boxes.round().long().tolist():
        for rows, columns in (
            (slice(y0, y0 + 2), slice(x0, x1)),
            (slice(y1 - 2, y1), slice(x0, x1)),
            (slice(y0, y1), slice(x0, x0 + 2)),
            (slice(y0, y1), slice(x1 - 2, x1)),
        ):
            image[:, rows, columns] = torch.tensor([255, 255, 0], dtype=torch.uint8)[:, None, None]
    return image


def classification() -> list[list[Tensor]]:
    """Return RandomResizedCrop and flip, by the same windows."""
    chain, x = recipes.torchvision_classification(SIZE, seed=1), photographs()
    (params,) = chain.sample_params(COUNT, input_size=x.shape[2:], sample_ids=range(COUNT))
    theirs = []
    for i, image in enumerate(x):
        drawn = {k: int(v[i]) for k, v in params.drawn().items()}
        top, left = drawn["window_y0"], drawn["window_x0"]
        height, width = drawn["window_y1"] - top, drawn["window_x1"] - left
        one = F.resized_crop(image, top, left, height, width, [SIZE, SIZE], antialias=True)
        theirs.append(one.flip(2) if drawn["flip_x"] else one)
    return [[shown(y) for y in chain(x, params=[params])], theirs]


def evaluation() -> list[list[Tensor]]:
    """Return Resize and CenterCrop."""
    chain, x = recipes.torchvision_classification(SIZE, train=False), photographs()
    resize = v2.Compose([v2.Resize(int(SIZE / 0.875), antialias=True), v2.CenterCrop(SIZE)])
    return [[shown(y) for y in chain(x)], [resize(image) for image in x]]


def _policy(ours: Any, theirs: Any) -> list[list[Tensor]]:
    x = photographs()
    y = ours(x, sample_ids=range(COUNT))
    torch.manual_seed(0)
    return [[shown(v) for v in y], [theirs(image) for image in x]]


def trivial() -> list[list[Tensor]]:
    """Return torchvision's newer recipe, with draws of each library's own."""
    ours = recipes.torchvision_classification(SIZE, policy="ta_wide", erase=0.5, seed=1)
    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
    steps += [v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]
    means = [round(255 * m) for m in recipes.IMAGENET_MEAN]
    return _policy(ours, v2.Compose([*steps, v2.RandomErasing(0.5, value=means)]))


def timm() -> list[list[Tensor]]:
    """Return timm's recipe, with draws of each library's own."""
    string = "rand-m9-mstd0.5-inc1-mmax9"  # Pillow refuses what level 10 asks for
    ours = recipes.timm_imagenet(string, SIZE, reprob=0.5, remode="pixel", seed=1)
    theirs = create_transform(
        SIZE, is_training=True, auto_augment=string, re_prob=0.5, re_mode="pixel"
    )
    rows = _policy(ours, lambda image: theirs(F.to_pil_image(image)))
    return [rows[0], [shown(y) for y in rows[1]]]


def digits() -> list[list[Tensor]]:
    """Return digits, and the draws of four recipes."""
    data, labels = load_digits(return_X_y=True)
    first = [int((labels == k).nonzero()[0][0]) for k in range(COUNT)]
    small = torch.tensor(data[first]).reshape(COUNT, 1, 8, 8) * 15.9
    x = small.to(torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3).repeat(1, 3, 1, 1)
    gentle: Any = {"scale": (0.6, 1.0), "hflip": 0.0, "seed": 1}
    made = [
        recipes.torchvision_classification(64, policy="ta_wide", erase=0.3, **gentle),
        recipes.timm_imagenet("rand-m9-mstd0.5-inc1", 64, reprob=0.3, remode="pixel", **gentle),
        recipes.segmentation(64, base=64, seed=1),
        recipes.simclr(64, seed=1),
    ]
    return [list(x), *([shown(y) for y in chain(x, sample_ids=range(COUNT))] for chain in made)]


def simclr() -> list[list[Tensor]]:
    """Return SimCLR's two views, and those of torchvision's transforms."""
    chain, x = recipes.simclr(SIZE, seed=1), photographs()[:1].expand(COUNT, -1, -1, -1)
    views = chain(x, sample_ids=[0] * COUNT, view=range(COUNT))
    jitter = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.RandomApply([jitter], 0.8)]
    steps += [v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(13, (0.1, 2))], 0.5)]
    torch.manual_seed(0)
    theirs = v2.Compose(steps)
    return [[shown(y) for y in views], [theirs(image) for image in x]]


def segmentation() -> list[list[Tensor]]:
    """Return crops with their masks (of what is bright) in red, and the unknown in white."""
    x = photographs()
    mask = (x.float().mean(1) > 150).long()

    def overlaid(image: Tensor, labels: Tensor) -> Tensor:
        image = image.clone()
        image[0][labels == 1] = 255
        image[:, labels == 255] = 255
        return image

    chain = recipes.segmentation(SIZE, base=140, seed=1)
    y, moved = chain(tv_tensors.Image(x), tv_tensors.Mask(mask), sample_ids=range(COUNT))
    fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: 255, "others": 0}
    steps = [v2.RandomResize(70, 280), v2.RandomHorizontalFlip()]
    theirs = v2.Compose([*steps, v2.RandomCrop(SIZE, pad_if_needed=True, fill=fill)])
    torch.manual_seed(0)
    pairs = [theirs(tv_tensors.Image(a), tv_tensors.Mask(b)) for a, b in zip(x, mask, strict=True)]
    return [
        [overlaid(shown(a.as_subclass(Tensor)), b) for a, b in zip(y, moved, strict=True)],
        [overlaid(a.as_subclass(Tensor), b) for a, b in pairs],
    ]


def detection() -> list[list[Tensor]]:
    """Return SSD's and large-scale jitter's draws with their boxes, each above torchvision's."""
    image, rows = tv_tensors.Image(photographs()[0]), []
    places = torch.tensor([[20.0, 60.0, 260.0, 400.0], [330.0, 120.0, 600.0, 330.0]])
    boxes = tv_tensors.BoundingBoxes(places, format="XYXY", canvas_size=(427, 640))  # type: ignore[call-arg]
    for policy in ("ssd", "lsj"):
        chain = recipes.detection(policy, SIZE, seed=1)
        target = {"boxes": boxes, "labels": torch.tensor([0, 1])}
        made = [chain(image, target, sample_ids=[i]) for i in range(COUNT)]
        rows.append([_boxes((y * 255).to(torch.uint8), t["boxes"]) for y, t in made])
        torch.manual_seed(0)
        theirs = v2.Compose(_DETECTION[policy]())
        own = {"boxes": boxes, "labels": torch.tensor([0, 1])}
        made = [theirs(image, own) for _ in range(COUNT)]
        rows.append([_boxes(y.as_subclass(Tensor).clone(), t["boxes"]) for y, t in made])
    return rows


_FILL: Any = {tv_tensors.Image: (123, 117, 104), "others": 0}
#: Those of torchvision's references/detection/presets.py, without the conversions at their end.
_DETECTION: dict[str, Any] = {
    "ssd": lambda: [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill=_FILL),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(0.5),
        v2.Resize((SIZE, SIZE)),
        v2.SanitizeBoundingBoxes(),
    ],
    "lsj": lambda: [
        v2.ScaleJitter((SIZE, SIZE), antialias=True),
        v2.RandomCrop((SIZE, SIZE), pad_if_needed=True, fill=_FILL),
        v2.RandomHorizontalFlip(0.5),
        v2.SanitizeBoundingBoxes(),
    ],
}


def main(folder: Path) -> None:
    """Write a sheet for each recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = (classification, evaluation, trivial, timm, segmentation, simclr, detection, digits)
    for make in sheets:
        rows = make()
        figure = Figure(figsize=(COUNT * 1.3, len(rows) * 1.35))
        axes = figure.subplots(len(rows), COUNT, squeeze=False)
        for line, images in zip(axes, rows, strict=True):
            for place, image in zip(line, images, strict=True):
                place.imshow(image.as_subclass(Tensor).permute(1, 2, 0).numpy())
                place.axis("off")
        figure.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
        figure.savefig(folder / f"{make.__name__}.png", dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
