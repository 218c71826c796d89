"""Imports of the libraries that the integrations are for."""

from __future__ import annotations

import importlib
from typing import Any


def library(module: str, extra: str) -> Any:
    """The module, or ModuleNotFoundError with what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the library is there, and lacks something itself
        raise ModuleNotFoundError(
            f"fusereg.integrations.{extra} needs the package {package}, which is not installed; "
            f'do: pip install "fusereg[{extra}]"',
            name=package,
        ) from error
