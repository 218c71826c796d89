"""Helpers for tests of early stopping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fusereg import EarlyStopping
from fusereg.early_stopping import Decision


def run(stopper: EarlyStopping, values: Sequence[Any], first: int = 0) -> list[Decision]:
    """Return the decisions for the values, one value an epoch, up to the one that stops."""
    made = []
    for epoch, value in enumerate(values, first):
        made.append(stopper.step(value, epoch=epoch))
        if made[-1].stop:
            break
    return made


def fill(model: nn.Module, value: float) -> None:
    """Set all parameters to a value."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
