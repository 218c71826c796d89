"""Which cases of a test run without --all-cases."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

import conftest
from conftest import Backend
from sample_of_cases import sampled, values_of

MODULE = """
import pytest
slow = [pytest.param(letter, marks=pytest.mark.slow) for letter in "bc"]

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("letter", ["a", *slow])
def test_product(number, letter): ...

@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_single(number): ...

@pytest.mark.all_cases
def test_marked(): ...

@pytest.mark.all_cases("host")
def test_but_on_host(): ...
"""
Case = tuple[str, list[tuple[str, int]]]


def product(*sizes: int) -> list[Case]:
    """Return the cases of a test with parameters of so many values."""
    return [
        (str(numbers), [(f"parameter {i}", n) for i, n in enumerate(numbers)])
        for numbers in itertools.product(*map(range, sizes))
    ]


@pytest.mark.parametrize("sizes", [(3,), (4, 5), (2, 4, 7), (2, 3, 2, 16), (1, 1, 1)])
def test_every_value_occurs_and_no_case_more_than_that_needs(sizes: tuple[int, ...]) -> None:
    cases = product(*sizes)
    kept = [cases[i] for i in sampled(cases)]
    assert {value for _, values in kept for value in values} == {
        value for _, values in cases for value in values
    }
    assert len(kept) == max(sizes)


def test_the_sample_depends_on_names_alone() -> None:
    cases = product(4, 5, 3)
    names = {cases[i][0] for i in sampled(cases)}
    shuffled = random.Random(0).sample(cases, len(cases))
    assert {shuffled[i][0] for i in sampled(shuffled)} == names
    others = [(f"another test {name}", values) for name, values in cases]
    assert {others[i][0].removeprefix("another test ") for i in sampled(others)} != names


def test_values_that_occur_in_few_cases_are_not_lost() -> None:
    cases = product(3, 3)
    for i in range(9):
        only = [cases[i], ("with a value of its own", [("parameter 0", 0), ("parameter 1", 9)])]
        assert sampled(only) == [0, 1]


@pytest.mark.parametrize(("one", "two"), [(1, "a"), (1, "b"), (2, "a"), (2, "b")])
@pytest.mark.parametrize("three", [None])
def test_a_row_is_one_value(
    one: int, two: str, three: None, backend: Backend, request: pytest.FixtureRequest
) -> None:
    case = request.node
    assert isinstance(case, pytest.Function)
    assert set(values_of(case)) == {
        (("one", id(one)), ("two", id(two))),
        (("three", id(three)),),
        ("backend", id(backend)),
    }


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([""], "3 from product, 4 from single, 1 from but_on_host"),
        (["", "--all-cases"], "6 from product, 4 from single, 1 from marked, 1 from but_on_host"),
        (["", "-m", "not slow"], "2 from product, 4 from single, 1 from but_on_host"),
        (["", "-k", "product and 1"], "3 from product"),
        (["::test_product"], "6 from product"),
        (["::test_marked"], "1 from marked"),
    ],
)
def test_the_command_line(
    arguments: list[str], wanted: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    module = tmp_path / "test_cases.py"
    module.write_text(MODULE)
    found: list[str] = []

    class Collected:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(item.name.partition("[")[0] for item in session.items)

    command = [f"{module}{arguments[0]}", *arguments[1:], "--collect-only", "-q", "-c", "/dev/null"]
    command += ["-p", "no:cacheprovider", "--import-mode", "importlib"]
    try:
        assert pytest.main(command, [Collected(), conftest]) == 0
    finally:
        conftest.pytest_configure(pytestconfig)
    names = ("product", "single", "marked", "but_on_host")
    counts = {name: found.count(f"test_{name}") for name in names}
    assert ", ".join(f"{n} from {name}" for name, n in counts.items() if n) == wanted
