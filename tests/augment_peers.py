"""Other libraries of augmentation, where they can be imported."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest

import other_libraries  # noqa: F401  # makes a torchvision importable that does not fit this torch


def torchvision_module(name: str) -> Any:
    """A module of torchvision; the test is skipped where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module(name)
    except (RuntimeError, ImportError, AttributeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
