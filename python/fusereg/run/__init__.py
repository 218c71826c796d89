"""A whole training run that is saved, and that a restarted script goes on with.

``training_run`` has the loops and what is due when, ``checkpoint`` the files, ``sharded`` those of
models that are sharded over ranks, ``loader`` the position in the data and the generators.
"""

from ..core.files import CheckpointError
from .training_run import Saved, TrainingRun

__all__ = ["CheckpointError", "Saved", "TrainingRun"]
