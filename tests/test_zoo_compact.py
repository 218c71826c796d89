"""Compaction of models of timm and torchvision: outputs, and further training."""

from __future__ import annotations

import pytest

from compact_models import LIBRARIES
from test_compact import check_model
from test_compact import double as double  # in float64 from one seed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_model_computes_and_trains_the_same(name: str) -> None:
    check_model(name, 20)
