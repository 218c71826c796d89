"""TrainingRun: what would have trained, saved or restored nothing is said in words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusereg import TrainingRun
from fusereg.run import CheckpointError

pytest.importorskip("safetensors")


# --- restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "keep_best", "metrics", "why"),
    [
        ("last", 0, (), "none has been saved yet"),
        ("best", 1, (), "none has been saved yet"),
        ("best", 0, (1.0,), "keep_best is 0"),
        ("best", 1, (None,), "none was saved with a finite metric"),
        ("best", 2, (float("nan"), None), "none was saved with a finite metric"),
    ],
)
@pytest.mark.filterwarnings("ignore:fusereg.TrainingRun.save")
def test_restoring_what_is_not_there_is_refused_and_changes_nothing(
    tmp_path: Path, which: Any, keep_best: int, metrics: tuple[float | None, ...], why: str
) -> None:
    model = nn.Linear(1, 1)
    run = TrainingRun(tmp_path, model=model, keep_best=keep_best)
    for metric in metrics:
        run.save(metric)
    nn.init.constant_(model.weight, 3.0)
    text = rf"^fusereg.TrainingRun.restore: there is no {which} checkpoint: {why}"
    with pytest.raises(CheckpointError, match=text):
        run.restore(which)
    assert float(model.weight.detach()) == 3.0
    run.save(metric=1.0)
    nn.init.constant_(model.weight, 4.0)
    if keep_best or which == "last":
        assert run.restore(which) == 0
        assert float(model.weight.detach()) == 3.0


def test_a_new_run_begins_without_a_checkpoint(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), keep_best=1)
    assert not run.resumed
    assert list(run.epochs(1)) == [0]


@pytest.mark.parametrize(("keep_best", "first", "told"), [(1, None, 1), (1, 2.0, 0), (0, None, 0)])
def test_saving_without_a_metric_while_the_best_are_kept_is_told_once(
    tmp_path: Path, keep_best: int, first: float | None, told: int
) -> None:
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), keep_best=keep_best)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in run.epochs(3):
            run.save(first)
            run.save()
    texts = [str(w.message) for w in caught if "metric" in str(w.message)]
    assert len(texts) == told
    assert all("keep_best is 1, but a checkpoint without metric= is not among" in t for t in texts)
