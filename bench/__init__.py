"""Benchmarks of fusereg's kernels: one shared harness, one module for each technique.

In the repository this package lies in ``bench/``; installed, it is ``fusereg.bench``, and
``fusereg bench`` is its command line. To add a technique, write ``bench/<stem>.py`` with a function
``cases(options) -> list[Case]`` and add its name to :data:`SUITES`.
"""

from __future__ import annotations

import importlib

from .harness import Case, Options, Provider, Row, Settings, Workload, run_cases

__all__ = [
    "SUITES",
    "Case",
    "Options",
    "Provider",
    "Row",
    "Settings",
    "Workload",
    "collect_cases",
    "run_cases",
]

SUITES: tuple[str, ...] = (
    "augment",
    "batch_norm",
    "drop_block",
    "dropout",
    "dropout_norm",
    "fused_dropout",
    "gaussian_dropout",
    "optimizer",
    "penalty",
    "end_to_end",
)
"""The techniques that have a benchmark, each the name of a module of this package.

Last is all of them together, which takes longest: a run that is ended early has the others.
"""


def collect_cases(suite: str, options: Options) -> list[Case]:
    """The cases of one technique, in the order in which they run.

    Raises:
        ValueError: If there is no benchmark of that name.
    """
    if suite not in SUITES:
        raise ValueError(
            f"fusereg bench: no benchmark named {suite!r}; there are: {', '.join(SUITES)}"
        )
    module = importlib.import_module(f".{suite}", __package__)
    cases: list[Case] = module.cases(options)
    return cases
