"""Reads of modules that no class can override, and a check of them."""

from __future__ import annotations

from typing import Any

from torch import nn


def forward_of(module: nn.Module) -> Any:
    """Return the forward of a module's class; None where a class has none, as of scripts."""
    return getattr(type(module), "forward", None)


def check_materialized(module: nn.Module, where: str) -> None:
    """Raise ValueError if a lazy module has not got its parameters' shapes yet."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{where}: {name} is an uninitialized parameter of a lazy module; call the model "
                "once first"
            )


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Return a module in another; ``get_submodule``, which a class may override."""
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = child
    return module
