"""A run of early stopping over given metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusereg import EarlyStopping
from fusereg.early_stopping import Decision


def run(stopper: EarlyStopping, values: Sequence[Any], first: int = 0) -> list[Decision]:
    """A decision for each value, one an epoch, up to the one that stops."""
    made = []
    for epoch, value in enumerate(values, first):
        made.append(stopper.step(value, epoch=epoch))
        if made[-1].stop:
            break
    return made
