"""Data augmentation: a whole chain in one pass over the batch.

:class:`Augment` is the whole chain; the names of torchvision's transforms and :class:`Compose`,
which fuses a list of them, are there for those who have them. augment.py holds the module,
params.py what is drawn, steps.py what is drawn from, render.py the way to the kernel, labels.py
targets, keyed.py sample ids and epochs, transforms.py, compose.py and fuse.py the drop-in names,
conventions.py what other libraries mean by their arguments.
"""

from .augment import Augment, WithIds
from .compose import Compose, Transform
from .functional import crop_flip_normalize, erase, mix, resize, warp_affine
from .fuse import Plan
from .labels import MixedLabels, mix_labels
from .params import AugmentParams
from .render import Erase, Mix
from .transforms import (
    CenterCrop,
    CutMix,
    MixUp,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
)

__all__ = [
    "Augment",
    "AugmentParams",
    "CenterCrop",
    "Compose",
    "CutMix",
    "Erase",
    "Mix",
    "MixUp",
    "MixedLabels",
    "Normalize",
    "Plan",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
    "Transform",
    "WithIds",
    "crop_flip_normalize",
    "erase",
    "mix",
    "mix_labels",
    "resize",
    "warp_affine",
]
