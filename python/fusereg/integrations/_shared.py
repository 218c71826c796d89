"""Code that the integrations share: importing a library, and the callbacks' arguments."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import EarlyStopping, WeightPenalty
from ..core.hints import explains, public_class
from ..core.params import Key
from ..early_stopping.stopper import ELSEWHERE
from ..penalty.names import SPARED
from ..penalty.strengths import UNSET
from ..penalty.weight_penalty import Rule, check_given

#: Arguments of EarlyStopping that concern a model or a folder, of which a new callback has none.
_LATER = {
    *("also", "rng", "snapshot", "restore_best", "folder", "resume", "on_save_error"),
    *("agreement", "process_group"),
}


def library(module: str, extra: str) -> Any:
    """Import the module, or raise ModuleNotFoundError that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the library is installed, but something that it needs is not
        raise ModuleNotFoundError(
            f"fusereg.integrations.{extra} needs the package {package}, which is not installed; "
            f'do: pip install "fusereg[{extra}]"',
            name=package,
        ) from error


def _public_name(callback: object) -> str:
    cls = public_class(callback)
    return f"{cls.__module__}.{cls.__name__}"


#: Of the callbacks of early stopping, which have EarlyStopping's arguments besides their own.
explains_stopping = explains(_public_name, ELSEWHERE, inspect.signature(EarlyStopping).parameters)


class PenaltyArguments:
    """Base of the penalty callbacks: takes WeightPenalty's arguments before there is a model."""

    @explains(_public_name)
    def __init__(
        self,
        *,
        l1: float = UNSET,
        l2: float = UNSET,
        group: float = UNSET,
        half: bool = True,
        exclude: Iterable[Key] | Key = SPARED,
        rules: Mapping[Key, Rule] | None = None,
        schedule: Callable[[int], float] | None = None,
        name: str | None = "penalty",
    ) -> None:
        super().__init__()
        self.penalty: WeightPenalty | None = None
        self._name = name
        make = functools.partial(
            WeightPenalty, l1=l1, l2=l2, group=group, half=half, schedule=schedule
        )
        check_given((l1, l2, group), rules)
        if any(s is not UNSET for s in (l1, l2, group)):
            # So that invalid ones are reported now; of the model, which is not known yet, by then.
            make(nn.ParameterList([torch.zeros(())]), exclude=())
        self._make = functools.partial(make, exclude=exclude, rules=rules)


class Monitored:
    """EarlyStopping's arguments and the names of the metrics to watch.

    Args:
        op: the callback's name, for errors.
        monitor: the metric's name; None if ``metrics`` or ``weights`` among the arguments name
            several.
        arguments: EarlyStopping's, without the model.
    """

    def __init__(self, op: str, monitor: str | None, **arguments: Any) -> None:
        several = arguments.get("metrics") or arguments.get("weights")
        if (monitor is None) != bool(several):
            raise ValueError(
                f"fusereg.{op}: give the name of one metric as monitor, or several by metrics= or "
                f"weights=, got monitor={monitor!r} and {'' if several else 'no '}several"
            )
        if "model" in arguments:
            raise TypeError(f"fusereg.{op}: the model is the one in training; leave model out")
        # So that invalid arguments are reported now, not when training begins.
        EarlyStopping(None, **{k: v for k, v in arguments.items() if k not in _LATER})
        self.op = op
        self.monitor = monitor
        self.names = (monitor,) if monitor is not None else tuple(several or ())
        self._arguments = arguments

    def stopper(self, model: nn.Module, **others: Any) -> EarlyStopping:
        """Make the EarlyStopping for a model."""
        return EarlyStopping(model, **{**self._arguments, **others})

    def find(self, available: Mapping[str, Any], strict: bool = True) -> Any:
        """Return the metric, or a mapping of several; None if one is missing, unless strict."""
        missing = [name for name in self.names if name not in available]
        if missing:
            if not strict:
                return None
            raise ValueError(
                f"fusereg.{self.op}: no metric {', '.join(missing)}; "
                f"there are {', '.join(map(str, available)) or 'none'}"
            )
        if self.monitor is not None:
            return available[self.monitor]
        return {name: available[name] for name in self.names}
