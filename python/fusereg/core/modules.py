"""Reads of modules that no class can override."""

from __future__ import annotations

from typing import Any

from torch import nn


def forward_of(module: nn.Module) -> Any:
    """Return the forward of a module's class; None where a class has none, as of scripts."""
    return getattr(type(module), "forward", None)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Return a module in another; ``get_submodule``, which a class may override."""
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = child
    return module
