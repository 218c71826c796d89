"""Collects the rows of all techniques."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import fusereg

from ...core.inventory import Operation

TECHNIQUES: tuple[str, ...] = tuple(
    sorted(path.parent.name for path in Path(fusereg.__file__).parent.glob("*/check.py"))
)
"""The techniques that have operations to check: the packages with a file check.py."""

OPERATIONS: list[Operation] = [
    replace(operation, technique=technique)
    for technique in TECHNIQUES
    for operation in importlib.import_module(f"fusereg.{technique}.check").OPERATIONS
]
