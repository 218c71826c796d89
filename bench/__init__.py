"""Benchmarks of fusereg's kernels: a shared harness, and one module for each technique.

In the repository this package is ``bench/``; installed, it is ``fusereg.bench``, and ``fusereg
bench`` is its command line. To add a technique, write ``bench/suites/<stem>.py`` with a function
``cases(options)``, which returns a list of :class:`Case`, and ``PROVIDERS``, the names of the ways
to do the work, if they are not those of :func:`.harness.layers.providers`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from fusereg.cli.errors import choose

from . import suites as _suites
from .harness import Case, Options, Provider, Row, Settings, Workload, run_cases
from .harness.layers import PROVIDERS as LAYER_PROVIDERS

__all__ = [
    "SUITES",
    "Case",
    "Options",
    "Provider",
    "Row",
    "Settings",
    "Workload",
    "collect_cases",
    "load_suite",
    "provider_names",
    "run_cases",
]

#: The one that takes longest runs last: a run that is ended early has the others.
_LAST = "end_to_end"

SUITES: tuple[str, ...] = tuple(
    sorted(
        (found.name for found in pkgutil.iter_modules(_suites.__path__)),
        key=lambda name: (name == _LAST, name),
    )
)
"""The techniques that have a benchmark: the modules of ``bench/suites/``."""


def load_suite(name: str) -> ModuleType:
    """Return the module of a technique.

    Raises:
        InputError: If there is no benchmark of that name.
    """
    (name,) = choose([name], SUITES, "no benchmark")
    return importlib.import_module(f".suites.{name}", __package__)


def provider_names(suite: str) -> tuple[str, ...]:
    """Return the names of the providers that a technique's cases may have."""
    names: tuple[str, ...] = getattr(load_suite(suite), "PROVIDERS", LAYER_PROVIDERS)
    return names


def collect_cases(suite: str, options: Options) -> list[Case]:
    """Return the cases of one technique, in the order in which they run.

    Raises:
        InputError: If there is no benchmark of that name.
    """
    module = load_suite(suite)
    cases: list[Case] = module.cases(options)
    name = module.__name__.rpartition(".")[2]
    return [
        replace(case, suite=name, setup=_uncompiled(case) if options.quick else case.setup)
        for case in cases
    ]


def _uncompiled(case: Case) -> Callable[[], Workload]:
    """Return the case's setup without the providers that have to be compiled first."""

    def setup() -> Workload:
        workload = case.setup()
        return replace(workload, providers=[p for p in workload.providers if not p.compiles])

    return setup
