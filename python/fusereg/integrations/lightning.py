"""Callbacks for Lightning's Trainer: a weight penalty, and early stopping with restoring.

>>> import lightning as L
>>> from fusereg.integrations.lightning import EarlyStoppingCallback, PenaltyCallback
>>> trainer = L.Trainer(
...     callbacks=[PenaltyCallback(l1=1e-5), EarlyStoppingCallback("val_loss", patience=5)]
... )

fusereg's optimizers need no callback: return one from ``configure_optimizers``. With
``precision="16-mixed"`` clip by their ``max_grad_norm=`` instead of the Trainer's
``gradient_clip_val``: they unscale the gradients inside the step, and Lightning then refuses to
clip before it.
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import EarlyStopping
from ..core import dispatch, distributed
from ..core.snapshot import Stateful
from ..optim.averages import averages_of
from ..penalty.weight_penalty import add_for, skips_step
from ._shared import Monitored, PenaltyArguments, explains_stopping, library

__all__ = ["EarlyStoppingCallback", "PenaltyCallback"]

_log = logging.getLogger(__name__)

# The library has two names: use the one that is imported already, else the installed one.
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_USED = [name for name in _NAMES if sys.modules.get(name) is not None]
_INSTALLED = [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None]
_NAME = [*_USED, *_INSTALLED, *_NAMES][0]

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.callbacks import EarlyStopping as LightningsOwn
else:
    _callbacks = library(f"{_NAME}.callbacks", "lightning")
    Callback, LightningsOwn = _callbacks.Callback, _callbacks.EarlyStopping


class PenaltyCallback(PenaltyArguments, Callback):
    r"""Adds the gradient of a :class:`fusereg.WeightPenalty` before each optimizer step.

    The result is that of adding the penalty to the loss, in one pass over the weights: once a step
    after the last accumulated batch, before gradients are clipped, multiplied by a ``GradScaler``'s
    scale if there is one. With several optimizers, each one's parameters are penalized when it
    steps. Nothing is added in a skipped step (``training_step`` returned None).

    The penalty's value is logged, and the schedule counts optimizer steps. Strengths and step count
    are part of Lightning's checkpoints.

    Args:
        l1, l2, group, half, exclude, rules, schedule: as :class:`fusereg.WeightPenalty`; names are
            those of the LightningModule's parameters.
        name: the value's name in the log; None: it is not logged. Several penalties need different
            names.

    Attributes:
        penalty: the :class:`fusereg.WeightPenalty` during and after training, else None; its
            strengths may be changed.

    Raises:
        RuntimeError: when training begins, with the DeepSpeed strategy, which does not expose the
            gradients.

    Example:
        >>> trainer = L.Trainer(callbacks=[PenaltyCallback(l1=1e-5, rules={"head.*": None})])
    """

    _loaded: dict[str, Any] | None = None  # a state that was loaded before the fit starts
    _pending: Any = None  # the hook that counts the step

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints."""
        key: str = self._generate_state_key(name=self._name)
        return key

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Discard the penalty of an earlier fit."""
        if stage == "fit":
            self.penalty = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the penalty, as the strategy replaces no parameter from now on."""
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise RuntimeError(
                "fusereg.integrations.lightning.PenaltyCallback: the DeepSpeed strategy keeps the "
                "gradients to itself; add WeightPenalty.penalty() to the loss instead"
            )
        self.penalty = self._make(pl_module)
        if self._loaded is not None:
            self.penalty.load_state_dict(self._loaded)
            self._loaded = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        penalty = self.penalty
        assert penalty is not None
        value = add_for(penalty, optimizer, _scale(trainer, optimizer))
        if value is None:
            return
        self._count_after(optimizer, penalty)
        if self._name is not None:
            pl_module.log(self._name, value)

    def _count_after(self, optimizer: Any, penalty: Any) -> None:
        """Advance the schedule after the step, unless a scaler skips it."""
        if self._pending is not None:
            self._pending.remove()  # of a step that never was

        def count(stepped: Any, *_: Any) -> None:
            handle.remove()
            if not skips_step(stepped):
                penalty.step()

        self._pending = handle = optimizer.register_step_post_hook(count)

    def state_dict(self) -> dict[str, Any]:
        """Return strengths and step count."""
        if self.penalty is not None:
            return self.penalty.state_dict()
        return self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load strengths and step count, before or after the fit starts, as strategies differ."""
        if self.penalty is None:
            self._loaded = state_dict
        else:
            self.penalty.load_state_dict(state_dict)


def _scale(trainer: Any, optimizer: Any) -> Tensor | None:
    """Return the scale of the gradients at this point of the step, on their device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not dispatch.unscales_in_step(optimizer):
        return None  # Lightning has unscaled the gradients just before
    device = optimizer.param_groups[0]["params"][0].device
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


class EarlyStoppingCallback(LightningsOwn):
    """:class:`fusereg.EarlyStopping` in place of Lightning's: stops, and restores the best weights.

    The best weights are restored when ``trainer.fit`` returns (after the last checkpoints were
    written, which therefore hold the last weights), and also when an exception or Ctrl-C ended it.
    Records and the best weights in memory are part of Lightning's checkpoints, so
    ``fit(..., ckpt_path=...)`` decides as an uninterrupted run would. With several processes there
    is one decision for all.

    Args:
        monitor: the name of the logged metric; None with ``metrics=`` or ``weights=``.
        patience: as :class:`fusereg.EarlyStopping`.
        check_on_train_epoch_end: whether to check at the end of a training epoch instead of that of
            validation; by default as Lightning's own: if there is one validation in each epoch.
        strict: whether a missing metric is an error; otherwise the check is skipped.
        snapshot_in_checkpoint: whether checkpoints include the best weights besides the current
            ones. If not, a best from before resuming can be restored only from ``folder``. Never
            for parameters that are sharded over processes.
        also: a function of the trainer that returns further objects to keep and restore, by name,
            e.g. ``lambda trainer: {"optimizer": trainer.optimizers[0]}``.
        averaged: whether to validate, keep and restore the averages of the weights that fusereg's
            optimizers make with ``ema_decay``, in place of the weights. Checkpoints hold both:
            weights in the model, averages in the optimizer's state.
        arguments: the other arguments of :class:`fusereg.EarlyStopping`.

    Attributes:
        stopper: the :class:`fusereg.EarlyStopping` during and after training, else None. Another
            fit by the same trainer goes on with it; one by another trainer starts anew.
        stopped_epoch, wait_count, best_score: as Lightning's.

    Raises:
        TypeError, ValueError: as :class:`fusereg.EarlyStopping`, at once.
        RuntimeError: when the fit begins, with Lightning's ``WeightAveraging``, whose averages it
            validates but neither keeps nor restores; and with ``averaged`` when no optimizer has
            averages.

    Example:
        >>> stopping = EarlyStoppingCallback("val_loss", patience=5, min_delta=1e-3)
        >>> L.Trainer(callbacks=[stopping]).fit(model, loader)
        >>> stopping.stopper.best_epoch
    """

    @explains_stopping
    def __init__(
        self,
        monitor: str | None = None,
        *,
        patience: int,
        check_on_train_epoch_end: bool | None = None,
        strict: bool = True,
        snapshot_in_checkpoint: bool = True,
        also: Callable[[Any], Mapping[str, Stateful]] | None = None,
        averaged: bool = False,
        **arguments: Any,
    ) -> None:
        op = "integrations.lightning.EarlyStoppingCallback"
        self._monitored = Monitored(op, monitor, patience=patience, **arguments)
        super().__init__(
            ",".join(self._monitored.names),
            patience=patience,
            mode=arguments.get("mode", "min"),
            strict=strict,
            check_on_train_epoch_end=check_on_train_epoch_end,
        )
        self.stopper: EarlyStopping | None = None
        self._in_checkpoint = snapshot_in_checkpoint
        self._also = also
        self._averaged = averaged
        self._shown = ExitStack()
        self._run: tuple[Any, Any] | None = None  # the trainer and model of the stopper
        self._loaded: dict[str, Any] | None = None
        self._fitting = False
        self._stops = False  # whether it was this callback that asked the trainer to stop

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Discard the stopper of another trainer or model."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        run = (weakref.ref(trainer), weakref.ref(pl_module))
        if self._run != run:
            self.stopper, self._run = None, run

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the stopper, as the strategy replaces no parameter from now on."""
        if self.stopper is None:
            also = {} if self._also is None else {"also": self._also(trainer)}
            self.stopper = self._monitored.stopper(pl_module, **also)
        if any(distributed.is_dtensor(value) for value in pl_module.state_dict().values()):
            self._in_checkpoint = False
        if self._loaded is not None:
            self.stopper.load_state_dict(self._loaded)
            self._loaded = None
            if self.stopper.best_epoch is not None and not self.stopper.restorable:
                warnings.warn(
                    "fusereg.integrations.lightning.EarlyStoppingCallback: the best weights so "
                    f"far, of epoch {self.stopper.best_epoch}, are not in the checkpoint; unless a "
                    "later epoch is better, training will end with its last ones (give folder= "
                    "and resume=True to keep them)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._fitting, self._stops = True, False

    def _run_early_stopping_check(self, trainer: Any) -> None:
        """Check the metric; Lightning's hooks call this when it is due."""
        stopper = self.stopper
        if stopper is None or trainer.fast_dev_run:
            return
        found = self._monitored.find(trainer.callback_metrics, self.strict)
        if found is None:
            return
        decision = stopper.step(found, epoch=trainer.current_epoch)
        self.wait_count = stopper.misses
        if stopper.best is not None:
            self.best_score = torch.tensor(stopper.best, dtype=torch.float32, device="cpu")
        if self._stops and not decision.stop:  # min_epochs let training go on, and it improved
            trainer.should_stop = self._stops = False
        if decision.stop:
            self._stops = not trainer.should_stop or self._stops
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = stopper.explain()
            if trainer.is_global_zero:
                _log.info(stopper.explain())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse averages that this callback could not keep."""
        super().on_train_start(trainer, pl_module)
        names = [base.__name__ for c in trainer.callbacks for base in type(c).__mro__]
        if "WeightAveraging" in names:
            raise RuntimeError(
                "fusereg.integrations.lightning.EarlyStoppingCallback: Lightning's WeightAveraging "
                "shows its averages in validation only, so that others would be kept; use "
                "averaged=True and an optimizer of fusereg with ema_decay= instead"
            )
        if self._averaged and not averages_of(trainer.optimizers):
            raise RuntimeError(
                "fusereg.integrations.lightning.EarlyStoppingCallback: averaged=True needs an "
                "optimizer of fusereg with ema_decay="
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the averages."""
        super().on_validation_start(trainer, pl_module)
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Check the metric, and show the weights again."""
        with self._shown:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Check the metric if it is due here, with the averages shown."""
        if self._check_on_train_epoch_end:
            self._show(trainer, pl_module)
        with self._shown:
            super().on_train_epoch_end(trainer, pl_module)

    def _show(self, trainer: Any, pl_module: Any) -> None:
        if self._averaged and self._fitting:
            for optimizer in averages_of(trainer.optimizers):
                self._shown.enter_context(optimizer.averaged(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the best weights."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the best weights, also after Ctrl-C."""
        self._restore()

    def _restore(self) -> None:
        self._shown.close()  # an exception may have come while the averages were shown
        if self._fitting and self.stopper is not None:
            self.stopper.finish()
        self._fitting = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # for strategies that start processes by pickle

    def state_dict(self) -> dict[str, Any]:
        """Return the records, and the best weights."""
        if self.stopper is not None:
            return self.stopper.state_dict(snapshot=self._in_checkpoint)
        return self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the records, before or after the fit starts, as strategies differ."""
        if self._fitting and self.stopper is not None:
            self.stopper.load_state_dict(state_dict)
        else:
            self._loaded = state_dict
