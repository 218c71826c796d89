"""Lists run in turn: whatever joins a pass gives what it gives one after the other."""

from __future__ import annotations

from collections.abc import Callable
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
        (*_, last) = passes = chain.plan().passes
        joined += len(passes) == 1
        assert not any(p.notes for p in passes), second
        got = chain(x, sample_ids=range(6))
        wanted = in_turn(pair, x, 5)
        assert got.shape == wanted.shape
        assert float((got - wanted).abs().max()) < 1e-9, second
        # What merge=True does join is said, and so are the differences.
        merged = Compose(pair, merge=True, seed=5).plan().passes
        assert ("(merge=True joins them)" in last.reason) == (len(merged) < len(passes)), second
        assert bool(merged[-1].notes) == (len(merged) < len(passes)), second
    assert joined > 1, "nothing is joined"


@pytest.mark.parametrize("first", KINDS)
def test_bytes_are_those_of_one_after_the_other(first: str) -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (6, 3, 40, 36), dtype=torch.uint8, generator=generator)
    for second in KINDS:
        pair = [KINDS[first](v2), KINDS[second](v2)]
        got, wanted = Compose(pair, seed=5)(x, sample_ids=range(6)), in_turn(pair, x, 5)
        apart = (got.double() - wanted.double()).abs()
        if got.dtype is torch.uint8:  # a byte may be rounded the other way
            assert float(apart.max()) <= 1, second
            assert float((apart > 0).double().mean()) < 3e-3, second
        else:  # half a level, where bytes are not rounded in between
            unit = 255.0 if "to floats" in (first, second) else 255.0 * 0.2
            assert float(apart.max()) <= 0.501 / unit, second
