"""Early stopping: when to stop, what to go back to, and how not to lose it.

>>> stopper = fusereg.EarlyStopping(model, patience=5)
>>> for epoch in stopper.epochs(100):
...     train(model)
...     stopper.step(validate(model), epoch=epoch)   # the loop ends by itself, with the best model

From the inside out: ``decision`` is the pure state machine, ``metrics`` and ``smoothing`` what
comes before it; ``snapshot`` are the copies in memory, ``encoding`` and ``checkpoint`` the files,
``keeper`` has both; ``agreement`` is between the ranks, ``stopper`` the object in front of it all.
"""

from .checkpoint import CheckpointError
from .decision import Decision, Metric
from .smoothing import Ema, Rolling
from .snapshot import Snapshot
from .stopper import EarlyStopping, load_best

__all__ = [
    "CheckpointError",
    "Decision",
    "EarlyStopping",
    "Ema",
    "Metric",
    "Rolling",
    "Snapshot",
    "load_best",
]
