"""Early stopping: deciding when to stop, restoring the best model, and writing it to disk.

>>> stopper = fusereg.EarlyStopping(model, patience=5)
>>> for epoch in stopper.epochs(100):
...     train(model)
...     stopper.step(validate(model), epoch=epoch)   # the loop ends by itself, with the best model

``decision`` is a pure state machine; ``metrics`` and ``smoothing`` prepare its input;
``checkpoint`` has the files, ``keeper`` manages them and the copies in memory; ``agreement`` is
between the ranks; ``stopper`` joins them all. Copies, encoding, files and locks are in
``fusereg.core``, as :class:`fusereg.TrainingRun` uses them too.
"""

from ..core.files import CheckpointError
from ..core.snapshot import Snapshot
from .decision import Decision, Metric
from .smoothing import Ema, Rolling
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
