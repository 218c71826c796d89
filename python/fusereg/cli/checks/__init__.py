"""Real calls of every kernel, held against torch in float64: `fusereg info` and `fusereg verify`.

A technique is a file of this package, named as its folder in csrc/. It holds functions that take
:class:`Inputs`, run a kernel on them, and give pairs (what came, what torch gives in float64), each
under the decorator :func:`kernel_check`. Every such file is found by itself.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import fusereg
from fusereg.cli.checks._base import (
    CHECKS,
    TOLERANCES,
    CheckResult,
    Inputs,
    KernelCheck,
    Pairs,
    kernel_check,
    run_check,
)
from fusereg.cli.checks._places import Place, places, run_checks

__all__ = [
    "CHECKS",
    "TECHNIQUES",
    "TOLERANCES",
    "CheckResult",
    "Inputs",
    "KernelCheck",
    "Pairs",
    "Place",
    "kernel_check",
    "places",
    "run_check",
    "run_checks",
]

TECHNIQUES: tuple[str, ...] = tuple(
    sorted(path.parent.name for path in Path(fusereg.__file__).parent.glob("*/check.py"))
)
"""The techniques that have checks: the packages with a file check.py."""

for _name in TECHNIQUES:
    importlib.import_module(f"fusereg.{_name}.check")
