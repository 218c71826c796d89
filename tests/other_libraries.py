"""Workaround for importing the libraries that the integrations are for.

torchvision is not needed. But some of these libraries import it if it is installed, and fail if its
compiled operators do not match this torch: its operators are then declared without code, which is
enough to import it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys

import torch

_kept: list[torch.library.Library] = []


def repair_torchvision() -> None:
    """Declare the operators that torchvision lacks, one after the other, until it imports."""
    if importlib.util.find_spec("torchvision") is None:
        return
    for _ in range(30):
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            lacking = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if lacking is None:
                return
        declared = torch.library.Library("torchvision", "FRAGMENT")
        declared.define(f"{lacking[1]}() -> ()")
        _kept.append(declared)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


repair_torchvision()
