"""The sample of cases that runs unless ``--all-cases`` is given.

Many tests run for the product of dtypes, layouts, shapes, options and backends. Of the cases of one
test, as few are kept as it takes for every value of every parameter to occur: each row of each
parametrize mark, each value of each fixture. A hash of their names decides among equals, so the
sample is the same everywhere and at each run. This holds for all tests alike; none has to ask for
it, and a test with one parameter keeps all its cases.

Left out are also tests with the mark ``all_cases``, which takes ``"host"`` if it means the CUDA
kernels on the host alone. They take much time, and say more of what others say: longer lists,
further seeds, another check of a check.

The sample is one of what -k and -m select, and a test that the command line names with ``::`` runs
in all its cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import pytest


def sampled(cases: Sequence[tuple[str, Iterable[Hashable]]]) -> list[int]:
    """Return the numbers of the cases to keep, given the name and the values of each case.

    The next case is always the one that adds the most values; a hash of the names breaks ties.
    """
    values = [frozenset(found) for _, found in cases]
    order = sorted(range(len(cases)), key=lambda i: hashlib.blake2b(cases[i][0].encode()).digest())
    missing = frozenset().union(*values)
    kept = []
    while missing:
        best = max(order, key=lambda i: len(values[i] & missing))
        kept.append(best)
        missing -= values[best]
    return sorted(kept)


def values_of(case: pytest.Function) -> list[Hashable]:
    """Return what a case was given: a row of each parametrize mark, a value of each fixture."""
    given = {name: id(value) for name, value in case.callspec.params.items()}
    found: list[Hashable] = []
    for mark in case.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.replace(",", " ").split() if isinstance(names, str) else names
        found.append(tuple((name, given.pop(name, None)) for name in names))
    return [*found, *given.items()]


def left_out(items: Iterable[pytest.Item], *, on_host: bool) -> set[pytest.Item]:
    """Return the items that are not in the sample."""
    products: dict[object, list[pytest.Function]] = {}
    found: set[pytest.Item] = set()
    for item in items:
        mark = item.get_closest_marker("all_cases")
        if mark is not None and (on_host or not mark.args):
            found.add(item)
        elif isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            products.setdefault((item.parent, item.originalname), []).append(item)
    for cases in products.values():
        kept = sampled([(case.nodeid, values_of(case)) for case in cases])
        found.update(set(cases) - {cases[i] for i in kept})
    return found
