"""Lists of torchvision's geometry: fused only where the result is that of one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from augment_peers import torchvision_module
from fusereg.augment import Compose, WithIds

RAMP = torch.arange(40, dtype=torch.uint8).mul(6).view(1, 1, 40).expand(3, 40, 40).contiguous()
NOISE = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)

LISTS: dict[str, Callable[[Any], list[Any]]] = {
    "pad pad symmetric": lambda v2: [
        v2.Pad(3, padding_mode="symmetric"),
        v2.Pad(6, padding_mode="symmetric"),
    ],
    "pad pad reflect": lambda v2: [
        v2.Pad(1, padding_mode="reflect"),
        v2.Pad(3, padding_mode="reflect"),
    ],
    "pad, larger": lambda v2: [v2.Pad(4, fill=200), v2.Resize([84, 84])],
    "pad reflect, smaller": lambda v2: [v2.Pad(5, padding_mode="reflect"), v2.Resize([30, 30])],
    "smaller, pad edge": lambda v2: [v2.Resize([20, 20]), v2.Pad(4, padding_mode="edge")],
    "smaller, pad reflect": lambda v2: [v2.Resize([20, 20]), v2.Pad(4, padding_mode="reflect")],
    "smaller, crop with a pad": lambda v2: [
        v2.Resize([20, 20]),
        v2.RandomCrop(28, padding=4, padding_mode="reflect"),
    ],
    "crop, larger": lambda v2: [v2.CenterCrop(20), v2.Resize([60, 60])],
    "crop, shorter side": lambda v2: [v2.CenterCrop((20, 30)), v2.Resize(50)],
    "smaller, larger": lambda v2: [v2.Resize([10, 10]), v2.Resize([40, 40])],
    "crop, pad": lambda v2: [v2.CenterCrop(20), v2.Pad(3, fill=9)],
    "crop, pad edge": lambda v2: [v2.CenterCrop(20), v2.Pad(3, padding_mode="edge")],
    "crop, pad reflect": lambda v2: [v2.CenterCrop((20, 31)), v2.Pad(3, padding_mode="reflect")],
    "crop larger than the image, pad": lambda v2: [v2.CenterCrop(50), v2.Pad(3, fill=9)],
    "crop larger, pad edge": lambda v2: [v2.CenterCrop((50, 20)), v2.Pad(3, padding_mode="edge")],
    "smaller, crop larger, pad": lambda v2: [v2.Resize(20), v2.CenterCrop(28), v2.Pad(2, fill=9)],
    "smaller, crop": lambda v2: [v2.Resize([20, 20]), v2.CenterCrop(30)],
}


@pytest.mark.parametrize("image", [RAMP, NOISE], ids=["ramp", "noise"])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_gives_what_torchvision_gives_one_after_the_other(name: str, image: Tensor) -> None:
    transforms = LISTS[name](torchvision_module("torchvision.transforms.v2"))
    wanted = image
    for transform in transforms:
        wanted = transform(wanted)
    for chain in (Compose(transforms), Compose(transforms, merge=True)):
        if any(p.notes for p in chain.plan().passes):
            continue  # merged, and the plan says that it differs
        got = chain(image)
        assert got.shape == wanted.shape
        assert int((got.int() - wanted.int()).abs().max()) <= 1


def test_collate_refuses_what_has_no_common_scale_or_channels() -> None:
    compose = Compose([])
    byte = torch.full((3, 6, 6), 100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="images must have one dtype"):
        compose.collate([byte, byte / 255])
    with pytest.raises(ValueError, match="one number of channels, got 3, and 1 of sample 1"):
        compose.collate([byte, byte[:1]])
    with pytest.raises(ValueError, match="samples must not be empty"):
        compose.collate([])
    with pytest.raises(TypeError, match="must be a list of samples, got Tensor"):
        compose.collate(byte[None])
    with pytest.raises(TypeError, match="must be of WithIds, or none"):
        compose.collate([WithIds([byte])[0], byte])
    with pytest.raises(TypeError, match=r"must be made: Compose\(\), not the class"):
        Compose([Compose])
