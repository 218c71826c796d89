"""torch's default device and dtype are for what a caller makes, not for what fusereg does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
import other_libraries  # noqa: F401  # repairs torchvision
from fusereg import augment
from fusereg.augment import policies, recipes

IMAGES = torch.randint(256, (4, 3, 12, 12), dtype=torch.uint8)
LABELS = torch.arange(4)
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
INPUT = torch.randn(2, 3, 8, 8)


def _augmented(transform: Any) -> list[Tensor]:
    return [transform(IMAGES, sample_ids=range(4))]


def _mixed(path: Path) -> list[Tensor]:
    mix = augment.Mix(mixup=0.2, cutmix=1.0, num_classes=4)
    x, labels = augment.Augment(12, mix=mix, seed=1)(IMAGES, LABELS)
    return [x, labels]


def _compacted(path: Path) -> list[Tensor]:
    pytest.importorskip("torch_pruning")
    groups = fusereg.groups_of(NET, INPUT)
    fusereg.compact(NET, INPUT, dry_run=True)
    weights = [1.0] * len(groups)
    return [fusereg.functional.group_lasso_penalty(groups, 0.1, weights=weights).detach()]


def _saved(path: Path) -> list[Tensor]:
    run = fusereg.TrainingRun(path, model=NET, keep_best=1)
    run.save(metric=0.5)
    return [p.detach().clone() for p in NET.parameters()]


CALLS: dict[str, Callable[[Path], list[Tensor]]] = {
    "RandAugment": lambda path: _augmented(augment.RandAugment(seed=1)),
    "recipe": lambda path: _augmented(
        recipes.torchvision_classification(12, policy="ta_wide", seed=1)
    ),
    "mixing": _mixed,
    "orthogonality": lambda path: [
        fusereg.functional.orthogonality_penalty(NET.parameters(), 0.1).detach()
    ],
    "spectral norm": lambda path: [
        fusereg.functional.spectral_norm_penalty(NET.parameters(), 0.1).detach()
    ],
    "compact": _compacted,
    "TrainingRun": _saved,
}


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_another_default_changes_nothing(name: str, default: Any, tmp_path: Path) -> None:
    def fresh(folder: str) -> list[Tensor]:
        policies._magnitudes.cache_clear()
        torch.manual_seed(0)
        return CALLS[name](tmp_path / folder)

    wanted = fresh("wanted")
    with ExitStack() as stack:
        if default == "meta":
            stack.enter_context(torch.device("meta"))
        else:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(default)
        came = fresh("came")
    for a, b in zip(came, wanted, strict=True):
        assert (a.device, a.dtype) == (b.device, b.dtype)
        assert torch.equal(a, b)
