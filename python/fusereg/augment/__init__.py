"""Data augmentation: a chain of transforms in one pass over the batch.

:class:`Augment` is the whole chain; :class:`Compose` fuses a list of transforms, which have
torchvision's names. augment.py holds the module, chain.py the passes that it and Compose run,
program.py the programs of single images, policies.py what draws them, params.py the drawn
parameters, steps.py the steps that draw them, render.py the call of the kernel,
loop.py transforms without a kernel, inputs.py the forms of images, targets.py what moves with them,
tree.py nestings of it, labels.py labels, seeded.py sample ids and epochs, loading.py loaders,
transforms.py, compose.py and fuse.py the transforms and their fusion, torchvision.py the conversion
of torchvision's, conventions.py the conventions of other libraries.
"""

from . import recipes as recipes
from . import torchvision as torchvision  # adds itself to compose.converters
from .augment import Augment
from .compose import Compose, Transform
from .functional import crop_flip_normalize, erase, mix, resize, warp_affine, warp_perspective
from .fuse import Plan
from .labels import MixedLabels, mix_labels
from .loading import WithIds
from .loop import CallParams
from .params import AugmentParams
from .program import ProgramParams
from .render import Erase, Mix
from .transforms import (
    CenterCrop,
    ColorJitter,
    CutMix,
    MixUp,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    TimmAugment,
    TrivialAugmentWide,
)

__all__ = [
    "Augment",
    "AugmentParams",
    "CallParams",
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "CutMix",
    "Erase",
    "Mix",
    "MixUp",
    "MixedLabels",
    "Normalize",
    "Plan",
    "ProgramParams",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomPerspective",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
    "TimmAugment",
    "Transform",
    "TrivialAugmentWide",
    "WithIds",
    "crop_flip_normalize",
    "erase",
    "mix",
    "mix_labels",
    "recipes",
    "resize",
    "warp_affine",
    "warp_perspective",
]
