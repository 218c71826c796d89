"""Hugging Face's Trainer: a weight penalty, early stopping that restores the best, optimizers.

>>> from transformers import Trainer
>>> from fusereg.integrations.transformers import EarlyStoppingCallback, optimizer_of
>>> trainer = Trainer(
...     model, args, train_dataset=train, eval_dataset=test,
...     optimizer_cls_and_kwargs=optimizer_of(args, "AdamW", l1=1e-5),
...     callbacks=[EarlyStoppingCallback("eval_loss", patience=5)],
... )

Hugging Face's Trainer saves its own callbacks' states only on request and builds them anew from
them; these here keep their state in ``TrainerState`` and take it up when a run is resumed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import optim
from ..core.params import Key
from ..early_stopping import EarlyStopping
from ..early_stopping.snapshot import Stateful
from ..penalty.weight_penalty import AttachedPenalty, Rule, WeightPenalty
from ._needed import library
from ._stopping import Monitored

__all__ = ["EarlyStoppingCallback", "PenaltyCallback", "optimizer_of"]

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = library("transformers", "transformers").TrainerCallback

_OP = "integrations.transformers"


class PenaltyCallback(TrainerCallback):
    r"""Adds the gradient of a :class:`fusereg.WeightPenalty` before each optimizer step.

    Once a step, after the last accumulated batch, scaled as the gradients are where a
    ``GradScaler`` is at work. The Trainer has no event between backward and clipping, so the
    penalty's gradient is not clipped, as a decoupled weight decay is not.

    The value is in the log entries beside the loss (in ``state.log_history`` and for callbacks that
    come after this one). The schedule counts optimizer steps. Strengths and count are saved and
    resumed with the Trainer's state.

    Args:
        l1, l2, group, half, exclude, rules, schedule: as :class:`fusereg.WeightPenalty`; names are
            those of the model's parameters.
        name: the name in the log, and that of the state; several penalties need several names.

    Attributes:
        penalty: the :class:`fusereg.WeightPenalty` during and after training, else None.
        value: the penalty at the last step, a 0-d tensor; None before.

    Raises:
        RuntimeError: when training begins, with DeepSpeed, which keeps the gradients to itself.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[PenaltyCallback(l1=1e-5)], ...)
    """

    def __init__(
        self,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        group: float = 0.0,
        half: bool = True,
        exclude: Iterable[Key] | Key = ("bias", "norm"),
        rules: Mapping[Key, Rule] | None = None,
        schedule: Callable[[int], float] | None = None,
        name: str = "penalty",
    ) -> None:
        self.penalty: WeightPenalty | None = None
        self._name = name
        self._key = f"fusereg.WeightPenalty {name}"
        self._attached: AttachedPenalty | None = None
        self._arguments: dict[str, Any] = {
            "l1": l1,
            "l2": l2,
            "group": group,
            "half": half,
            "exclude": exclude,
            "rules": rules,
            "schedule": schedule,
        }
        WeightPenalty(nn.Module(), l1=l1, l2=l2, group=group)  # wrong strengths: told now

    @property
    def value(self) -> Tensor | None:
        """The penalty at the last step."""
        return None if self._attached is None else self._attached.value

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Looks the parameters up and attaches to the optimizer."""
        if getattr(args, "deepspeed", None):
            raise RuntimeError(
                f"fusereg.{_OP}.PenaltyCallback: DeepSpeed keeps the gradients to itself; give the "
                "strengths to a fusereg optimizer or add the penalty to the loss"
            )
        if self._attached is not None:  # of a run that an exception ended
            self._attached.remove()
        self.penalty = WeightPenalty(others["model"], **self._arguments)
        if state.global_step > 0 and self._key in state.stateful_callbacks:
            self.penalty.load_state_dict(state.stateful_callbacks[self._key])
        self._attached = self.penalty.attach(others["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leaves the state where a save that follows finds it."""
        self._store(state, control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leaves the state where a save that follows finds it."""
        self._store(state, control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leaves the state where a save that follows finds it."""
        self._store(state, True)

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Adds the value to the entry."""
        logs = others.get("logs") or {}
        if "loss" in logs and self.value is not None:
            logs[self._name] = float(self.value)
            if state.log_history:
                state.log_history[-1][self._name] = logs[self._name]

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leaves the optimizer."""
        if self._attached is not None:
            self._attached.remove()

    def _store(self, state: Any, wanted: bool) -> None:
        if wanted and self.penalty is not None:
            state.stateful_callbacks[self._key] = self.penalty.state_dict()


class EarlyStoppingCallback(TrainerCallback):
    """:class:`fusereg.EarlyStopping` for the Trainer: stops, and restores the best weights.

    Each evaluation in training is a check, and what :class:`fusereg.EarlyStopping` calls its epoch
    is the number of optimizer steps (``stopper.best_epoch`` is the best step, and
    ``patience_unit="epochs"`` would count steps). Neither ``load_best_model_at_end`` nor
    ``metric_for_best_model`` is needed; where both are given, this callback's best comes last. The
    best weights are back when ``trainer.train()`` returns. If it may raise::

        try:
            trainer.train()
        finally:
            stopping.restore()

    The records are saved and resumed with the Trainer's state, always. Tensors have no place there:
    to go back, after resuming, to a best from before, give ``folder=...`` and ``resume=True``.

    Args:
        monitor: the metric's name as the Trainer has it, e.g. ``"eval_loss"``; None with
            ``metrics=`` or ``weights=``.
        patience: as :class:`fusereg.EarlyStopping`.
        strict: whether a missing metric is an error; else there is no check then, as is right for
            several evaluation sets, which are evaluated one by one.
        also: a function of the optimizer and the scheduler that gives what else to keep and
            restore, by name.
        arguments: the other arguments of :class:`fusereg.EarlyStopping`.

    Attributes:
        stopper: the :class:`fusereg.EarlyStopping` during and after training, else None.

    Raises:
        TypeError, ValueError: as :class:`fusereg.EarlyStopping`, at once.

    Example:
        >>> stopping = EarlyStoppingCallback("eval_accuracy", patience=3, mode="max")
        >>> Trainer(model, args, callbacks=[stopping], ...).train()
        >>> stopping.stopper.explain()
    """

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
        self._monitored = Monitored(op, monitor, {"patience": patience, **arguments})
        self._key = f"fusereg.EarlyStopping {','.join(self._monitored.names)}"
        self.stopper: EarlyStopping | None = None
        self._strict = strict
        self._also = also
        self._restores = bool(arguments.get("restore_best", True))
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begins anew, or goes on from the Trainer's state."""
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
        """One check."""
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
        """Restores the best weights."""
        self._training = False
        if self._restores:
            self.restore()

    def restore(self) -> int | None:
        """Brings the best weights back; gives their step, None if there are none."""
        self._training = False
        return None if self.stopper is None else self.stopper.restore()


class _OptimizerFactory:
    """What the Trainer calls with the model: biases and norms get neither decay nor penalty."""

    def __call__(
        self, model: nn.Module, *, optimizer: str, weight_decay: float, **options: Any
    ) -> torch.optim.Optimizer:
        strengths = {k: options.pop(k) for k in ("l1", "l2", "group") if k in options}
        groups = optim.param_groups_weight_decay(model, weight_decay, **strengths)
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        made: torch.optim.Optimizer = getattr(optim, optimizer)(
            [group for group in groups if group["params"]], **options
        )
        return made


def optimizer_of(
    args: Any, optimizer: str = "AdamW", **options: Any
) -> tuple[type[_OptimizerFactory], dict[str, Any]]:
    """A fusereg optimizer for the Trainer's ``optimizer_cls_and_kwargs``.

    Learning rate, weight decay, betas and epsilon are those of the arguments; the Trainer drives
    the rate. Biases and parameters of normalization layers get neither decay nor penalty.

    Args:
        args: ``TrainingArguments``.
        optimizer: ``"AdamW"``, ``"Adam"``, ``"SGD"``, ``"Adagrad"`` or ``"FTRL"``.
        options: of :mod:`fusereg.optim`'s class: ``l1``, ``l2``, ``group``, ``prox``,
            ``max_grad_norm`` (with ``TrainingArguments(max_grad_norm=0)``) and so on; they come
            before those of ``args``.

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
    parameters = inspect.signature(getattr(optim, optimizer)).parameters
    unknown = [name for name in options if name not in parameters or name == "params"]
    if unknown:
        raise TypeError(
            f"fusereg.{_OP}.optimizer_of: {optimizer} has no option {', '.join(unknown)}"
        )
    found = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if optimizer in ("Adam", "AdamW"):
        found["betas"] = (args.adam_beta1, args.adam_beta2)
        found["eps"] = args.adam_epsilon
    return _OptimizerFactory, {"optimizer": optimizer, **found, **options}
