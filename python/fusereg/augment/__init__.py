"""Data augmentation: a chain of transforms in one pass over the batch.

:class:`Augment` is the whole chain; :class:`Compose` fuses a list of transforms, which have
torchvision's names. augment.py holds the module, chain.py the passes that it and Compose run,
params.py the drawn parameters, steps.py the steps that draw them, render.py the call of the kernel,
loop.py transforms without a kernel, inputs.py the forms of images, targets.py what moves with them,
tree.py nestings of it, labels.py labels, seeded.py sample ids and epochs, loading.py loaders,
transforms.py, compose.py and fuse.py the transforms and their fusion, torchvision.py the conversion
of torchvision's, conventions.py the conventions of other libraries.
"""

from . import recipes as recipes
from . import torchvision as torchvision  # adds itself to compose.converters
from .augment import Augment
from .compose import Compose, Transform
from .functional import crop_flip_normalize, erase, mix, resize, warp_affine
from .fuse import Plan
from .labels import MixedLabels, mix_labels
from .loading import WithIds
from .loop import CallParams
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
    "CallParams",
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
    "recipes",
    "resize",
    "warp_affine",
]
