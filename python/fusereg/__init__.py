"""fusereg: regularization for PyTorch as hand-written fused C++/CUDA kernels.

>>> import fusereg
>>> penalty = fusereg.WeightPenalty(model, l1=1e-5, l2=1e-4)
>>> loss.backward()
>>> penalty.add_grad_()          # every gradient in one pass
>>> optimizer.step()

``fusereg info`` on the command line tells what this build and this machine offer.
"""

from .core import interpreter as _interpreter  # noqa: F401, I001  # before torch is imported
from .core import dispatch as _dispatch  # noqa: F401  # it refuses a torch that is too old
from . import _C as _C
from . import augment, cpu, early_stopping, functional, nn, optim
from .batch_norm.decompositions import decompositions
from .batch_norm.fold import fold_into_conv
from .compact import compact, groups_of
from .convert.model import convert, revert
from .core import aliases as _aliases
from .core import hints as _hints
from .core.version import __version__
from .early_stopping import EarlyStopping
from .functional import dropout_mask
from .path import PathPoint, RegularizationPath, path, shrink_budget
from .penalty import (
    AttachedPenalty,
    PenaltyGroup,
    WeightPenalty,
    add_penalty_grad_,
    prox,
    sparsity,
)
from .run import TrainingRun

_aliases.install(__name__)
_hints.install(__name__)

__all__ = [
    "AttachedPenalty",
    "EarlyStopping",
    "PathPoint",
    "PenaltyGroup",
    "RegularizationPath",
    "TrainingRun",
    "WeightPenalty",
    "__version__",
    "add_penalty_grad_",
    "augment",
    "compact",
    "convert",
    "cpu",
    "decompositions",
    "dropout_mask",
    "early_stopping",
    "fold_into_conv",
    "functional",
    "groups_of",
    "nn",
    "optim",
    "path",
    "prox",
    "revert",
    "shrink_budget",
    "sparsity",
]
