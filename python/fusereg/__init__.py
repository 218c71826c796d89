"""fusereg: regularization for PyTorch as hand-written fused C++/CUDA kernels.

>>> import fusereg
>>> penalty = fusereg.WeightPenalty(model, l1=1e-5, l2=1e-4)
>>> loss.backward()
>>> penalty.add_grad_()          # every gradient in one pass
>>> optimizer.step()

``fusereg info`` on the command line tells what this build and this machine offer.
"""

from . import _interpreter as _interpreter  # isort: skip  # first: before torch is imported
from . import _dispatch as _dispatch  # isort: skip  # then: it refuses a torch that is too old
from . import _C, augment, early_stopping, functional, nn, optim, prox
from ._decompositions import decompositions
from ._version import __version__
from .convert import convert, revert
from .early_stopping import EarlyStopping
from .fold import fold_into_conv
from .functional import dropout_mask
from .penalty import AttachedPenalty, PenaltyGroup, WeightPenalty, add_penalty_grad_, sparsity

__all__ = [
    "_C",
    "AttachedPenalty",
    "EarlyStopping",
    "PenaltyGroup",
    "WeightPenalty",
    "__version__",
    "add_penalty_grad_",
    "augment",
    "convert",
    "decompositions",
    "dropout_mask",
    "early_stopping",
    "fold_into_conv",
    "functional",
    "nn",
    "optim",
    "prox",
    "revert",
    "sparsity",
]
