"""torch's own databases of samples and errors, run against fusereg; what differs is documented."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
from test_docs import DOCS, script

pytestmark = [
    pytest.mark.skipif(not DOCS.is_dir(), reason="no documents beside these tests"),
    pytest.mark.skipif(
        not torch.__version__.startswith("2.13."),
        reason="the table of differences is that of torch 2.13; others have other databases",
    ),
]

#: Names that fusereg shares with torch and that torch's databases have. Importing those takes
#: seconds, so it is left to the tests.
NAMES = [
    *("functional.alpha_dropout", "functional.batch_norm", "functional.cross_entropy"),
    *("functional.dropout", "functional.dropout2d", "functional.dropout3d"),
    "functional.feature_alpha_dropout",
    *("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d", "nn.CrossEntropyLoss"),
    *("optim.Adagrad", "optim.Adam", "optim.AdamW", "optim.NAdam", "optim.RMSprop", "optim.SGD"),
]


@functools.cache
def databases() -> Any:
    pytest.importorskip("expecttest")  # which torch's databases import
    return script("databases")


@functools.cache
def found(name: str) -> list[Any]:
    differences: list[Any] = databases().differences(name)
    return differences


@pytest.mark.parametrize("name", NAMES)
def test_what_differs_from_torch_is_listed(name: str) -> None:
    assert databases().unlisted(found(name)) == []


def test_what_is_listed_differs_and_the_page_says_so() -> None:
    differences = [difference for name in NAMES for difference in found(name)]
    assert set(databases().REASONS) == {d.key for d in differences}
    page = (DOCS / "migration.md").read_text(encoding="utf-8")
    assert databases().table(differences) in page, "run: python docs/scripts/databases.py"


def test_the_databases_have_the_names_that_fusereg_shares_with_torch() -> None:
    assert sorted(databases().runs()) == NAMES


# --- the comparison finds faults ------------------------------------------------------------------

FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda y: y * 1.1,
    "a dtype": lambda y: y.double() if y.dtype is torch.float32 else y.float(),
    "a shape": lambda y: y.unsqueeze(0),
    "an error": lambda y: y.no_such_attribute,  # type: ignore[attr-defined]
    "a stride": lambda y: (
        torch.empty_strided(y.shape, y.stride()[::-1]).copy_(y) if y.dim() > 1 else y * 2
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "batch_norm"])
def test_a_fault_is_found(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(fusereg.functional, name)
    monkeypatch.setattr(fusereg.functional, name, lambda *a, **k: FAULTS[fault](right(*a, **k)))
    entry = next(e for e in databases().OPS if e.name == f"nn.functional.{name}")
    differences = list(databases().op_differences(entry, torch.float32))
    assert databases().unlisted(differences) != []


def test_a_missing_warning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusereg.functional, "dropout2d", fusereg.functional.dropout)
    entry = next(e for e in databases().OPS if e.name == "nn.functional.dropout2d")
    differences = databases().op_differences(entry, torch.float32)
    assert any("warnings" in d.key for d in differences)


def test_a_wrong_optimizer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusereg.optim, "Adam", fusereg.optim.AdamW)
    info = next(o for o in databases().OPTIMIZERS if o.optim_cls is torch.optim.Adam)
    differences = databases().optimizer_differences(info, torch.float64)
    assert databases().unlisted(differences) != []
