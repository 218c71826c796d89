"""Converted models whose forward asks Python something of a value; see asking_models.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import asking_models
import fusereg
from asking_models import ASKING
from reading_models import agree


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a change takes away."""
    monkeypatch.setattr(asking_models.helper, "enabled", True, raising=False)


@pytest.mark.parametrize(
    ("cls", "change", "reason"), ASKING, ids=[cls.__name__ for cls, *_ in ASKING]
)
def test_what_a_stand_in_would_answer_wrongly_is_not_asked_of_it(
    cls: Callable[[], Any],
    change: Callable[[Any], object],
    reason: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(3)
    plain: nn.Module = cls()
    with caplog.at_level("INFO", "fusereg"):
        converted = fusereg.convert(copy.deepcopy(plain))
    assert hasattr(converted, "fusereg_plans") == (reason is None), caplog.text
    assert reason is None or f"not fused: {reason}" in caplog.text
    agree(plain, converted)
    for m in (plain, converted):
        if cls is not asking_models.HasAttributeOfFunction or m is plain:
            change(m)
    agree(plain, converted)
    fusereg.revert(converted)
    agree(plain, converted)
