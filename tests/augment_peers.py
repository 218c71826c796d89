"""Other libraries of augmentation, where they can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch

#: Operators that torchvision registers fake kernels for as it is imported: a wheel whose compiled
#: part does not fit this torch lacks them. Its transforms need none, so any signature does.
_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)
_kept: list[Any] = []


def _define_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    _kept.append(library)


def torchvision_module(name: str) -> Any:
    """A module of torchvision; the test is skipped where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module(name)
    except (RuntimeError, ImportError, AttributeError) as error:
        first = error
    for loaded in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[loaded]
    try:
        _define_operators()
        return importlib.import_module(name)
    except (RuntimeError, ImportError, AttributeError):
        pytest.skip(f"torchvision cannot be imported: {first}")
