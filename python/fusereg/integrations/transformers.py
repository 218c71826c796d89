"""Callbacks for Hugging Face's Trainer, for a weight penalty and early stopping, and optimizers.

>>> from transformers import Trainer
>>> from fusereg.integrations.transformers import EarlyStoppingCallback, optimizer_of
>>> trainer = Trainer(
...     model, args, train_dataset=train, eval_dataset=test,
...     optimizer_cls_and_kwargs=optimizer_of(args, "AdamW", l1=1e-5),
...     callbacks=[EarlyStoppingCallback("eval_loss", patience=5)],
... )

The Trainer saves the states of its own callbacks only on request, and makes new callbacks from
them; these callbacks keep their state in ``TrainerState`` and load it when a run is resumed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import AttachedPenalty, EarlyStopping, optim
from ..core.hints import check_names, explains
from ..core.snapshot import Stateful
from ._shared import Monitored, PenaltyArguments, explains_stopping, library

__all__ = ["EarlyStoppingCallback", "PenaltyCallback", "optimizer_of"]

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = library("transformers", "transformers").TrainerCallback

_OP = "integrations.transformers"


def _claim(state: Any, key: str, owner: TrainerCallback, advice: str) -> None:
    """Raise if another callback of this run has the same key: its state would be overwritten."""
    if vars(state).setdefault("_fusereg_owners", {}).setdefault(key, owner) is not owner:
        raise ValueError(
            f"fusereg.{_OP}.{type(owner).__name__}: two callbacks keep their states under the "
            f'name "{key}"; {advice}'
        )


class PenaltyCallback(PenaltyArguments, TrainerCallback):
    r"""Adds the gradient of a :class:`fusereg.WeightPenalty` before each optimizer step.

    Once a step, after the last accumulated batch, multiplied by a ``GradScaler``'s scale if there
    is one. The Trainer has no event between backward and clipping, so the penalty's gradient is not
    clipped; neither is decoupled weight decay.

    The value is in the log entries that contain the loss (in ``state.log_history`` and for
    callbacks that come after this one). The schedule counts optimizer steps. Strengths and step
    count are saved and resumed with the Trainer's state.

    Args:
        l1, l2, group, half, exclude, rules, schedule: as :class:`fusereg.WeightPenalty`; names are
            those of the model's parameters.
        name: the name of the value in the log, and of the state; None: it is not logged. Several
            penalties need different names.

    Attributes:
        penalty: the :class:`fusereg.WeightPenalty` during and after training, else None.
        value: the penalty at the last step, a 0-d tensor; None before.

    Raises:
        RuntimeError: when training begins, with DeepSpeed, which does not expose the gradients.
        ValueError: when training begins, if another penalty has the same name.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[PenaltyCallback(l1=1e-5)], ...)
    """

    _attached: AttachedPenalty | None = None

    @property
    def _key(self) -> str:
        """The key of the state in the Trainer's."""
        return f"fusereg.WeightPenalty {self._name}"

    @property
    def value(self) -> Tensor | None:
        """The penalty at the last step; None before."""
        return None if self._attached is None else self._attached.value

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Make the penalty and attach it to the optimizer."""
        if getattr(args, "deepspeed", None):
            raise RuntimeError(
                f"fusereg.{_OP}.PenaltyCallback: DeepSpeed keeps the gradients to itself; give the "
                "strengths to a fusereg optimizer or add the penalty to the loss"
            )
        _claim(state, self._key, self, "give each a name= of its own")
        self.on_train_end()  # which has not run if an exception ended the last run
        self.penalty = self._make(others["model"])
        if state.global_step > 0 and self._key in state.stateful_callbacks:
            self.penalty.load_state_dict(state.stateful_callbacks[self._key])
        self._attached = self.penalty.attach(others["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Store the state in the Trainer's, which is saved next."""
        if control.should_save:
            self.on_evaluate(args, state, control)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Store the state in the Trainer's, which may be saved next."""
        if self.penalty is not None:
            state.stateful_callbacks[self._key] = self.penalty.state_dict()

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Add the value to the log entry."""
        logs = others.get("logs") or {}
        if "loss" in logs and self.value is not None and self._name is not None:
            logs[self._name] = float(self.value)
            if state.log_history:
                state.log_history[-1][self._name] = logs[self._name]

    def on_train_end(self, *_: Any, **others: Any) -> None:
        """Detach the penalty from the optimizer."""
        if self._attached is not None:
            self._attached.remove()


class EarlyStoppingCallback(TrainerCallback):
    """:class:`fusereg.EarlyStopping` for the Trainer: stops, and restores the best weights.

    Each evaluation during training is a check, and :class:`fusereg.EarlyStopping`'s epoch is the
    number of optimizer steps (``stopper.best_epoch`` is the best step, and
    ``patience_unit="epochs"`` would count steps). Neither ``load_best_model_at_end`` nor
    ``metric_for_best_model`` is needed; if they are given, this callback still restores its best
    weights last, when ``trainer.train()`` returns. If that may raise::

        try:
            trainer.train()
        finally:
            stopping.restore()

    The records are always saved and resumed with the Trainer's state, which cannot hold tensors: to
    restore, after resuming, a best from before, give ``folder=...`` and ``resume=True``.

    Args:
        monitor: the Trainer's name of the metric, e.g. ``"eval_loss"``; None with ``metrics=`` or
            ``weights=``.
        patience: as :class:`fusereg.EarlyStopping`.
        strict: whether a missing metric is an error; otherwise the check is skipped, as is right
            for several evaluation sets, which are evaluated one by one.
        also: a function of the optimizer and the scheduler that returns further objects to keep and
            restore, by name.
        arguments: the other arguments of :class:`fusereg.EarlyStopping`.

    Attributes:
        stopper: the :class:`fusereg.EarlyStopping` during and after training, else None.

    Raises:
        TypeError, ValueError: as :class:`fusereg.EarlyStopping`, at once; and when training begins,
            if another callback watches the same metrics.

    Example:
        >>> stopping = EarlyStoppingCallback("eval_accuracy", patience=3, mode="max")
        >>> Trainer(model, args, callbacks=[stopping], ...).train()
        >>> stopping.stopper.explain()
    """

    @explains_stopping
    def __init__(
        self,
        monitor: str | None = "eval_loss",
        *,
        patience: int,
        strict: bool = True,
        also: Callable[[Any, Any], Mapping[str, Stateful]] | None = None,
        **arguments: Any,
    ) -> None:
        op = f"{_OP}.EarlyStoppingCallback"
        self._monitored = Monitored(op, monitor, patience=patience, **arguments)
        self._key = f"fusereg.EarlyStopping {','.join(self._monitored.names)}"
        self.stopper: EarlyStopping | None = None
        self._strict = strict
        self._also = also
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Make the stopper, and resume it from the Trainer's state."""
        _claim(state, self._key, self, "one of them is enough for these metrics")
        also = {}
        if self._also is not None:
            also = {"also": self._also(others["optimizer"], others["lr_scheduler"])}
        stopper = self._monitored.stopper(others["model"], **also)
        if state.global_step > 0 and self._key in state.stateful_callbacks:
            stopper.load_state_dict(state.stateful_callbacks[self._key])
            if stopper.best_epoch is not None and not stopper.restorable:
                warnings.warn(
                    f"fusereg.{_OP}.EarlyStoppingCallback: the best weights so far, of step "
                    f"{stopper.best_epoch}, are not in the Trainer's checkpoint; unless a later "
                    "step is better, training will end with its last ones (give folder= and "
                    "resume=True to keep them)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self.stopper = stopper
        self._training = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Check the metric."""
        if not self._training or self.stopper is None:
            return
        found = self._monitored.find(others.get("metrics") or {}, self._strict)
        if found is None:
            return
        decision = self.stopper.step(found, epoch=state.global_step)
        state.stateful_callbacks[self._key] = self.stopper.state_dict(snapshot=False)
        if decision.stop:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Restore the best weights."""
        self._training = False
        if self.stopper is not None:
            self.stopper.finish()

    def restore(self) -> int | None:
        """Restore the best weights and return their step; None if there are none."""
        self._training = False
        return None if self.stopper is None else self.stopper.restore()


class _OptimizerFactory:
    """Factory that the Trainer calls with the model; excludes biases and norms from decay."""

    def __call__(
        self, model: nn.Module, *, optimizer: str, weight_decay: float, **options: Any
    ) -> torch.optim.Optimizer:
        strengths = {k: options.pop(k) for k in ("l1", "l2", "group") if k in options}
        groups = optim.param_groups_weight_decay(model, weight_decay, **strengths)
        made: torch.optim.Optimizer = getattr(optim, optimizer)(groups, **options)
        return made


@explains("fusereg.integrations.transformers.optimizer_of")
def optimizer_of(
    args: Any, optimizer: str = "AdamW", **options: Any
) -> tuple[type[_OptimizerFactory], dict[str, Any]]:
    """Return a fusereg optimizer for the Trainer's ``optimizer_cls_and_kwargs``.

    Learning rate, weight decay, betas and epsilon are those of ``args``; the Trainer schedules the
    rate. Biases and parameters of normalization layers get neither decay nor penalty.

    Args:
        args: ``TrainingArguments``.
        optimizer: ``"AdamW"``, ``"Adam"``, ``"SGD"``, ``"Adagrad"`` or ``"FTRL"``.
        options: of :mod:`fusereg.optim`'s class: ``l1``, ``l2``, ``group``, ``prox``,
            ``max_grad_norm`` (with ``TrainingArguments(max_grad_norm=0)``) and so on; they take
            precedence over those of ``args``.

    Raises:
        TypeError, ValueError: there is no such optimizer, or it has no such option.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=optimizer_of(args, l1=1e-5, prox=True))
    """
    known = ("AdamW", "Adam", "SGD", "Adagrad", "FTRL")
    if optimizer not in known:
        raise ValueError(
            f"fusereg.{_OP}.optimizer_of: optimizer must be one of {', '.join(known)}, "
            f"got {optimizer!r}"
        )
    _, *has = inspect.signature(getattr(optim, optimizer)).parameters
    check_names(f"fusereg.{_OP}.optimizer_of({optimizer})", options, ["optimizer", *has])
    found = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if optimizer in ("Adam", "AdamW"):
        found["betas"] = (args.adam_beta1, args.adam_beta2)
        found["eps"] = args.adam_epsilon
    return _OptimizerFactory, {"optimizer": optimizer, **found, **options}
