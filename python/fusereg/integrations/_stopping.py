"""What the early-stopping callbacks share: an EarlyStopping that is made when training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..early_stopping import EarlyStopping

#: Arguments that concern a model or a folder: there is none yet when a callback is made.
_LATER = frozenset(
    [
        *("also", "rng", "snapshot", "restore_best", "folder", "resume", "on_save_error"),
        *("agreement", "process_group"),
    ]
)


class Monitored:
    """EarlyStopping's arguments and the names of the metrics that it is fed with.

    Args:
        op: the callback's name, for errors.
        monitor: the metric's name; None with ``metrics`` or ``weights`` among the arguments, whose
            names are taken then.
        arguments: EarlyStopping's, without the model.
    """

    def __init__(self, op: str, monitor: str | None, arguments: Mapping[str, Any]) -> None:
        several = arguments.get("metrics") or arguments.get("weights")
        if (monitor is None) != bool(several):
            raise ValueError(
                f"fusereg.{op}: give the name of one metric as monitor, or several by metrics= or "
                f"weights=, got monitor={monitor!r} and {'' if several else 'no '}several"
            )
        if "model" in arguments:
            raise TypeError(f"fusereg.{op}: the model is the one in training; leave model out")
        # Whatever is wrong with them is better known now than when training begins.
        EarlyStopping(None, **{k: v for k, v in arguments.items() if k not in _LATER})
        self.op = op
        self.monitor = monitor
        self.names = (monitor,) if monitor is not None else tuple(several or ())
        self._arguments = dict(arguments)

    def stopper(self, model: nn.Module, **others: Any) -> EarlyStopping:
        """The object itself."""
        return EarlyStopping(model, **{**self._arguments, **others})

    def find(self, available: Mapping[str, Any], strict: bool) -> Any:
        """The metric, or a mapping of them; None if one is missing and that is allowed."""
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
