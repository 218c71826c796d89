"""Resizes of random size: torchvision's sizes and pixels, in passes whose images then differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from augment_peers import torchvision_module
from conftest import Backend
from fusereg.augment import AugmentParams, Compose, MixUp, RandomHorizontalFlip, recipes

SIZES = [(480, 640), (333, 500), (37, 211), (500, 374), (61, 61)]


def v2() -> Any:
    return torchvision_module("torchvision.transforms.v2")


def tv() -> Any:
    return torchvision_module("torchvision.tv_tensors")


def drawn(transform: Any, n: int, size: tuple[int, int]) -> list[AugmentParams]:
    (params,) = Compose([transform], seed=7).sample_params(n, input_size=size)
    assert isinstance(params, list)
    return params


class Numbers:
    """torch, with a given random number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def rand(self, *_: Any) -> Tensor:
        return torch.tensor([self.number], dtype=torch.float32)

    def randint(self, *_: Any) -> Tensor:
        return torch.tensor(int(self.number))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("longest", [None, 700])
def test_shortest_sizes_are_torchvisions(
    size: tuple[int, int], longest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = list(range(100, 801, 7))
    transform = v2().RandomShortestSize(sides, max_size=longest)
    module = __import__(type(transform).__module__, fromlist=["torch"])
    found = {}
    for i in range(len(sides)):
        monkeypatch.setattr(module, "torch", Numbers(i))
        factor = (
            sides[i] / min(size) if longest is None else min(sides[i] / min(size), 700 / max(size))
        )
        found[factor] = transform.make_params([torch.zeros(3, *size)])["size"]
    params = drawn(transform, 2000, size)
    for own in params:
        assert own.size == found[float(own.drawn()["scale_x"])]
    seen = {p.size for p in params}
    assert seen == set(found.values()), "every size is drawn"


@pytest.mark.parametrize("size", SIZES)
def test_scales_of_the_jitter_are_torchvisions(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_augment_distributions import assert_alike

    transform = v2().ScaleJitter((300, 400), (0.1, 2.0))
    module = __import__(type(transform).__module__, fromlist=["torch"])
    params = drawn(transform, 1500, size)
    fits = min(400 / size[0], 300 / size[1])
    numbers = []
    for own in params:
        factor = float(own.drawn()["scale_x"])
        number = (factor / fits - 0.1) / 1.9
        # The number is known up to rounding: torchvision's size with one of those beside it.
        near = {round(number * 2**24) / 2**24 + k * 2.0**-24 for k in range(-8, 9)}
        sizes = set()
        for value in near:
            monkeypatch.setattr(module, "torch", Numbers(min(max(value, 0.0), 1 - 2.0**-24)))
            sizes.add(transform.make_params([torch.zeros(3, *size)])["size"])
        assert own.size in sizes
        numbers.append(number)
    torch.manual_seed(3)
    assert_alike("scale", numbers, torch.rand(1500).tolist())


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "nearest-exact"])
@pytest.mark.parametrize("kind", ["shortest", "jitter"])
def test_pixels_boxes_and_masks_are_those_of_a_resize_to_this_size(kind: str, how: str) -> None:
    F = torchvision_module("torchvision.transforms.v2.functional")
    mode = F.InterpolationMode(how)
    make: dict[str, Any] = {
        "shortest": lambda: v2().RandomShortestSize([40, 50, 60], 90, mode),
        "jitter": lambda: v2().ScaleJitter((64, 64), (0.3, 1.5), mode),
    }
    chain = Compose([make[kind]()], seed=2)
    x = torch.nn.functional.interpolate(torch.rand(5, 3, 8, 9) * 255, (71, 83)).to(torch.uint8)
    for i, image in enumerate(x):
        box = tv().BoundingBoxes(
            torch.tensor([[3.0, 4.0, 50.0, 60.0]]), format="XYXY", canvas_size=(71, 83)
        )
        mask = tv().Mask((image[0] > 99).to(torch.int64))
        y, (moved, labels) = chain(image, (box, mask), sample_ids=[i])
        size = list(y.shape[-2:])
        wanted = F.resize(image, size, mode, antialias=True)
        level = 1 if how == "bilinear" else 12 if how == "bicubic" else 0  # its overshoot, twice
        assert int((y.int() - wanted.int()).abs().max()) <= level
        assert torch.allclose(plain(moved), plain(F.resize(box, size)), atol=1e-4)
        exact = F.resize(mask[None].to(torch.uint8), size, F.InterpolationMode("nearest-exact"))[0]
        assert torch.equal(plain(labels), exact.to(torch.int64))


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def test_a_batch_comes_to_several_sizes_and_together_again() -> None:
    steps = [
        v2().RandomShortestSize([40, 50, 60]),
        v2().RandomHorizontalFlip(),
        v2().Resize((48, 40)),
        v2().Normalize([0.5] * 3, [0.2] * 3),
        MixUp(num_classes=3),
    ]
    chain = Compose(steps, seed=3)
    assert [p.names for p in chain.plan().passes] == [
        ["RandomShortestSize", "RandomHorizontalFlip"],
        ["Resize", "Normalize"],
        ["MixUp"],
    ]
    x = torch.randint(0, 256, (6, 3, 61, 75), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    y, soft = chain(x, labels, sample_ids=range(6))
    assert y.shape == (6, 3, 48, 40)
    params = chain.sample_params(6, input_size=(61, 75), sample_ids=range(6))
    assert len({p.size for p in params[0]}) > 1  # type: ignore[union-attr]
    again, soft_again = chain(x, labels, params=params)
    assert torch.equal(again, y)
    assert torch.equal(soft_again, soft)
    out = torch.empty_like(y)
    chain(x, labels, sample_ids=range(6), out=out)
    assert torch.equal(out, y)
    # Each as in a batch of its own, up to the mixing.
    alone = Compose(steps[:-1], seed=3)
    whole = alone(x, sample_ids=range(6))
    for i in range(6):
        assert torch.equal(alone(x[i : i + 1], sample_ids=[i])[0], whole[i])
    clips = x[:, None].expand(-1, 4, -1, -1, -1)
    assert torch.equal(alone(clips, sample_ids=range(6))[:, 2], whole)
    listed = [image[:, : 61 - i] for i, image in enumerate(x)]
    assert alone.collate(listed).shape == (6, 3, 48, 40)
    boxes = [
        tv().BoundingBoxes(torch.full((i, 4), 9.0), format="XYWH", canvas_size=(61, 75))
        for i in range(6)
    ]
    _, moved = alone(x, [{"boxes": b, "labels": torch.arange(len(b))} for b in boxes])
    assert [len(m["boxes"]) for m in moved] == list(range(6))
    assert all(m["boxes"].canvas_size == (48, 40) for m in moved)
    with pytest.raises(ValueError, match="of one size in the end"):
        Compose(steps[:2])(x)
    with pytest.raises(ValueError, match="of one size in the end"):
        Compose([steps[0], MixUp(num_classes=3)])(x, labels)


def test_sizes_that_are_not_evenly_spaced_are_torchvisions_own() -> None:
    plan = str(Compose([v2().RandomShortestSize([40, 50, 70])]).plan())
    assert "RandomShortestSize (sample by sample)" in plan
    assert "its sizes are not evenly spaced" in plan


def test_large_scale_jitter_is_one_pass_as_far_as_there_are_pixels() -> None:
    chain = recipes.detection("lsj", 64, seed=1)
    first = chain.plan().passes[0]
    assert first.names == ["ScaleJitter", "RandomCrop", "RandomHorizontalFlip", "ToDtype"]
    x = torch.randint(0, 256, (4, 3, 90, 70), dtype=torch.uint8)
    boxes = [
        tv().BoundingBoxes(torch.tensor([[10.0, 20, 60, 80]]), format="XYXY", canvas_size=(90, 70))
        for _ in range(4)
    ]
    masks = [tv().Mask(torch.ones(1, 90, 70, dtype=torch.uint8)) for _ in range(4)]
    samples = zip(boxes, masks, strict=True)
    targets = [{"boxes": b, "labels": torch.ones(1).long(), "masks": m} for b, m in samples]
    y, moved = chain(x, targets, sample_ids=range(4))
    assert y.shape == (4, 3, 64, 64)
    fill = torch.tensor([123.0, 117.0, 104.0]) / 255
    for image, target in zip(y, moved, strict=True):
        outside = (plain(target["masks"]) == 0).all(0) if len(target["masks"]) else None
        if outside is not None:
            assert torch.allclose(image[:, outside], fill[:, None].expand(-1, int(outside.sum())))


def test_a_flip_between_is_joined_and_a_mix_is_not() -> None:
    chain = Compose([RandomHorizontalFlip(1.0), v2().ScaleJitter((40, 40)), v2().CenterCrop(32)])
    assert len(chain.plan().passes) == 1
    assert chain(torch.rand(3, 3, 20, 30)).shape == (3, 3, 32, 32)


def test_on_a_device_results_are_those_of_the_cpu(backend: Backend) -> None:
    x = torch.randint(0, 256, (4, 3, 22, 30), dtype=torch.uint8)
    for steps in (
        [v2().RandomShortestSize([16, 20, 24]), v2().Resize((18, 18))],
        [v2().ScaleJitter((24, 24)), v2().RandomCrop(20, pad_if_needed=True, fill=9)],
        [v2().AugMix()],
        [v2().Resize((18, 18), interpolation=3), v2().Normalize([0.5] * 3, [0.2] * 3)],
    ):
        chain = Compose(steps, seed=2)
        y = chain(x.to(backend.device), sample_ids=range(4))
        assert y.device.type == torch.device(backend.device).type
        torch.testing.assert_close(y.cpu(), chain(x, sample_ids=range(4)), rtol=0, atol=1e-5)
