"""Handlers for ignite's engines: a weight penalty, and early stopping that restores the best model.

>>> from fusereg.integrations.ignite import EarlyStoppingHandler, PenaltyHandler
>>> PenaltyHandler(fusereg.WeightPenalty(model, l1=1e-5), optimizer).attach(trainer)
>>> EarlyStoppingHandler(model, trainer, "loss", patience=5).attach(evaluator)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import AttachedPenalty, EarlyStopping, WeightPenalty
from ..core.hints import explains
from ._shared import Monitored, explains_stopping, library

__all__ = ["EarlyStoppingHandler", "PenaltyHandler"]

_engine = library("ignite.engine", "ignite")


@explains("fusereg.integrations.ignite.PenaltyHandler")
class PenaltyHandler:
    """Adds a :class:`fusereg.WeightPenalty`'s gradient before each step of an optimizer.

    An ignite update function calls both backward and step, so the gradient is added by a hook of
    the optimizer (:meth:`fusereg.WeightPenalty.attach`) while the trainer runs: once a step, after
    the last accumulated batch, multiplied by a ``GradScaler``'s scale. The value is in
    ``trainer.state.metrics``. With ``to_save={"penalty": handler, ...}`` ignite's ``Checkpoint``
    saves strengths and step count.

    Args:
        penalty: the penalty.
        optimizer: the optimizer that the trainer steps.
        name: the value's name among the metrics.

    Example:
        >>> PenaltyHandler(fusereg.WeightPenalty(model, l1=1e-5), optimizer).attach(trainer)
    """

    def __init__(
        self, penalty: WeightPenalty, optimizer: torch.optim.Optimizer, *, name: str = "penalty"
    ) -> None:
        self.penalty = penalty
        self._optimizer = optimizer
        self._name = name
        self._attached: AttachedPenalty | None = None

    def attach(self, trainer: Any) -> None:
        """Add the handlers to the trainer; they work in all of its later runs."""
        trainer.add_event_handler(_engine.Events.STARTED, self._start)
        trainer.add_event_handler(_engine.Events.ITERATION_COMPLETED, self._report)
        trainer.add_event_handler(_engine.Events.COMPLETED, self._end)

    def _start(self) -> None:
        self._end()  # which has not run if an exception ended the last run
        self._attached = self.penalty.attach(self._optimizer)

    def _report(self, trainer: Any) -> None:
        if self._attached is not None and self._attached.value is not None:
            trainer.state.metrics[self._name] = self._attached.value

    def _end(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def state_dict(self) -> dict[str, Any]:
        """Return the penalty's state."""
        return self.penalty.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the penalty's state."""
        self.penalty.load_state_dict(state_dict)


class EarlyStoppingHandler:
    """:class:`fusereg.EarlyStopping` for ignite: stops the trainer and restores the best weights.

    Each run of the evaluator while the trainer runs is a check, at the trainer's epoch. The best
    weights are restored when the trainer has completed. To restore them after an exception or
    Ctrl-C too, for which ignite has no event that lets the exception pass, use a ``with`` block::

        with handler:
            trainer.run(loader, max_epochs=100)

    With ``to_save={"early_stopping": handler, ...}`` ignite's ``Checkpoint`` saves the records and
    the best weights. A run of the trainer that begins anew begins with new records; one that is
    resumed goes on with the old ones. With several processes there is one decision for all.

    Args:
        model: as :class:`fusereg.EarlyStopping`.
        trainer: the engine to stop.
        monitor: the name among the evaluator's metrics; None with ``metrics=`` or ``weights=``.
        patience: as :class:`fusereg.EarlyStopping`.
        arguments: its other arguments.

    Attributes:
        stopper: the :class:`fusereg.EarlyStopping`.

    Raises:
        TypeError, ValueError: as :class:`fusereg.EarlyStopping`; at a check, a missing metric.

    Example:
        >>> handler = EarlyStoppingHandler(model, trainer, "accuracy", mode="max", patience=5)
        >>> handler.attach(evaluator)
        >>> trainer.run(loader, max_epochs=100)
        >>> handler.stopper.best_epoch
    """

    @explains_stopping
    def __init__(
        self,
        model: nn.Module,
        trainer: Any,
        monitor: str | None = None,
        *,
        patience: int,
        **arguments: Any,
    ) -> None:
        op = "integrations.ignite.EarlyStoppingHandler"
        self._monitored = Monitored(op, monitor, patience=patience, **arguments)
        self.stopper: EarlyStopping = self._monitored.stopper(model)
        self._trainer = trainer
        self._running = False
        self._ran = False  # whether the stopper's records are those of an earlier run
        trainer.add_event_handler(_engine.Events.STARTED, self._start)
        trainer.add_event_handler(_engine.Events.COMPLETED, self._end)

    def attach(self, evaluator: Any, event: Any = None) -> None:
        """Check whenever the evaluator fires this event, by default when it has completed."""
        evaluator.add_event_handler(event or _engine.Events.COMPLETED, self._check)

    def _start(self) -> None:
        if self._ran and self._trainer.state.iteration == 0:
            self.stopper.reset()
        self._running = self._ran = True

    def _check(self, evaluator: Any) -> None:
        if not self._running:
            return
        found = self._monitored.find(evaluator.state.metrics)
        if self.stopper.step(found, epoch=self._trainer.state.epoch).stop:
            self._trainer.terminate()

    def _end(self) -> None:
        self._running = False
        self.stopper.finish()

    def __enter__(self) -> EarlyStoppingHandler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return the stopper's state, with the best weights."""
        return self.stopper.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the stopper's state."""
        self.stopper.load_state_dict(state_dict)
        self._ran = False
