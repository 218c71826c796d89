"""What the tests of the backend share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fusereg.backend import fusereg_backend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget what earlier tests compiled and counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def fused() -> dict[str, int]:
    """Return what was fused since the test began, without the number of graphs."""
    return {what: n for what, n in counters["fusereg"].items() if what != "graphs"}


def left() -> str:
    return "; ".join(counters["fusereg left"])


def compiled(f: Any, fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(f, backend=fusereg_backend, fullgraph=fullgraph, options=options or None)
