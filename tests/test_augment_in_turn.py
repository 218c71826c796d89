"""Lists run in turn: whatever joins a pass gives what it gives one after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from augment_peers import torchvision_module
from fusereg.augment import Compose, RandomAffine, RandomCrop, RandomPerspective, RandomRotation
from fusereg.augment.chain import Pipeline, Unit
from fusereg.augment.steps import encode


def in_turn(transforms: list[Any], x: Tensor, seed: int) -> Tensor:
    """Each transform by itself, with the numbers that it has in the list."""
    seen: dict[str, int] = {}
    for transform in transforms:
        alone = Compose([transform], seed=seed)
        (one,) = alone.plan().passes
        steps = encode([step for stage in one.stages for step in stage.steps], seen)
        unit = Unit(steps, one.settings(), None, one.program(seen))
        alone._training = Pipeline([unit], (one,))
        x = alone(x, sample_ids=range(len(x)))
    return x


#: 40 x 36 images come to these.
KINDS: dict[str, Callable[[Any], Any]] = {
    "flip": lambda v2: v2.RandomHorizontalFlip(0.5),
    "flip down": lambda v2: v2.RandomVerticalFlip(0.5),
    "rotation": lambda v2: RandomRotation(30, "bilinear"),
    "rotation, filled": lambda v2: RandomRotation(30, "bilinear", fill=0.6),
    "rotation by a half": lambda v2: v2.RandomRotation(30),
    "rotation, bicubic": lambda v2: RandomRotation(30, "bicubic", p=0.5),
    "rotation, reflected": lambda v2: RandomRotation(30, "bilinear", fill_mode="reflect"),
    "rotation, edge": lambda v2: RandomRotation(30, "bilinear", fill_mode="border"),
    "shear": lambda v2: v2.RandomAffine(0, shear=20),
    "zoom": lambda v2: RandomAffine(0, (0.1, 0.1), (0.7, 1.3), interpolation="bilinear"),
    "perspective": lambda v2: RandomPerspective(0.4, 0.7, fill=0.2),
    "crop": lambda v2: v2.RandomCrop(30),
    "padded crop": lambda v2: v2.RandomCrop(36, padding=4, fill=0.3),
    "reflected crop": lambda v2: RandomCrop(36, 4, padding_mode="reflect"),
    "larger crop": lambda v2: v2.RandomCrop(44, pad_if_needed=True, fill=0.6),
    "center": lambda v2: v2.CenterCrop((30, 31)),
    "larger center": lambda v2: v2.CenterCrop(44),
    "pad": lambda v2: v2.Pad([1, 2, 3, 4], fill=0.3),
    "pad edge": lambda v2: v2.Pad(3, padding_mode="edge"),
    "pad reflect": lambda v2: v2.Pad(3, padding_mode="reflect"),
    "resize": lambda v2: v2.Resize((33, 50)),
    "resize at points": lambda v2: v2.Resize((50, 33), antialias=False),
    "resize by corners": lambda v2: v2.Resize((50, 50), interpolation=0),
    "shorter side": lambda v2: v2.Resize(42),
    "resized crop": lambda v2: v2.RandomResizedCrop(32, (0.3, 0.9)),
    "resized crop at points": lambda v2: v2.RandomResizedCrop(48, (0.3, 0.9), antialias=False),
    "normalize": lambda v2: v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
    "to floats": lambda v2: v2.ToDtype(torch.float64, scale=True),
    "erase": lambda v2: v2.RandomErasing(0.8, value=0.25),
}


@pytest.mark.parametrize("first", KINDS)
def test_two_transforms_are_one_after_the_other(first: str) -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    x = torch.rand(6, 3, 40, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    joined = 0
    for second in KINDS:
        pair = [KINDS[first](v2), KINDS[second](v2)]
        chain = Compose(pair, seed=5)
        joined += len(chain.plan().passes) == 1
        assert not any(p.notes for p in chain.plan().passes), second
        wanted = in_turn(pair, x, 5)
        got = chain(x, sample_ids=range(6))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9, msg=lambda m: f"{second}: {m}")
    assert joined > 1, "nothing is joined"
