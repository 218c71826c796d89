"""Data augmentation: a whole chain in one pass over the batch.

:class:`Augment` is the whole chain; the names of torchvision's transforms and :class:`Compose`,
which fuses a list of them, are there for those who have them. augment.py holds the module,
params.py what is drawn, steps.py what is drawn from, render.py the way to the kernel, labels.py
targets, keyed.py sample ids and epochs, transforms.py and compose.py the drop-in names,
conventions.py what other libraries mean by their arguments.
"""

from .augment import Augment, WithIds
from .labels import MixedLabels, mix_labels
from .params import AugmentParams
from .render import Erase, Mix

__all__ = [
    "Augment",
    "AugmentParams",
    "Erase",
    "Mix",
    "MixedLabels",
    "WithIds",
    "mix_labels",
]
