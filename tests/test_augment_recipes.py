"""The recipes: what their own libraries give for the drawn parameters, on photographs."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_peers
from augment_peers import torchvision_module
from conftest import Backend
from fusereg.augment import (
    Augment,
    Compose,
    Mix,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    WithIds,
    mix_labels,
    recipes,
)
from fusereg.augment import (
    op as _ops,
)

MEAN, STD = recipes.IMAGENET_MEAN, recipes.IMAGENET_STD


_source = augment_peers.SOURCES[0]


@pytest.fixture(params=augment_peers.SOURCES)
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose photographs the test is run with."""
    monkeypatch.setattr(sys.modules[__name__], "_source", request.param)
    return str(request.param)


def photographs() -> list[Tensor]:
    return augment_peers.photographs(_source)


def functional() -> Any:
    return torchvision_module("torchvision.transforms.v2.functional")


def normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def levels(y: Tensor, want: Tensor) -> float:
    """The largest difference of normalized images, in levels of bytes."""
    std = torch.tensor(STD)[:, None, None]
    return float(((y - want) * std * 255).abs().max())


# --- what torchvision gives for the same draws ---


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("source")
def test_the_crop_of_the_recipe_is_that_of_torchvision(
    interpolation: str, layout: torch.memory_format
) -> None:
    F = functional()
    chain = recipes.torchvision_classification(96, interpolation=interpolation, seed=5)
    x = torch.stack([photographs()[i % 2] for i in range(6)]).contiguous(memory_format=layout)
    (params,) = chain.sample_params(6, input_size=(427, 640), sample_ids=range(6))
    y = chain(x, params=[params])
    drawn = params.drawn()
    assert 0 < int(drawn["flip_x"].sum()) < 6
    for i in range(6):
        x0, y0, x1, y1 = (int(drawn[f"window_{k}"][i]) for k in ("x0", "y0", "x1", "y1"))
        how = F.InterpolationMode(interpolation)
        window = (y0, x0, y1 - y0, x1 - x0, [96, 96], how, True)
        want = F.resized_crop(x[i].float(), *window)
        bytes_ = F.resized_crop(x[i], *window)
        if drawn["flip_x"][i]:
            want, bytes_ = want.flip(2), bytes_.flip(2)
        # Of floats up to rounding, the rim of the window included: no pixel outside it is read.
        # What bytes are made of is cut to them.
        assert levels(y[i], normalized(want.clamp(0, 255))) < 0.01
        # Of bytes torchvision rounds after each of the two filters, and cuts bicubic's overshoot.
        assert levels(y[i], normalized(bytes_)) <= (1.0 if interpolation == "bilinear" else 6.0)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_pixel_outside_a_resized_crop_is_read(antialias: bool, dtype: torch.dtype) -> None:
    for interpolation in ("bilinear", "bicubic"):
        crop = RandomResizedCrop(7, interpolation=interpolation, antialias=antialias, seed=1)
        chain = Compose([crop, RandomHorizontalFlip(seed=1)], seed=1)
        x = torch.rand(5, 2, 24, 31, dtype=dtype, requires_grad=True)
        (params,) = chain.sample_params(5, input_size=(24, 31), sample_ids=range(5))
        y = chain(x, params=[params])
        (grad,) = torch.autograd.grad(y.sum(), x)
        drawn = params.drawn()
        for i in range(5):
            x0, y0, x1, y1 = (int(drawn[f"window_{k}"][i]) for k in ("x0", "y0", "x1", "y1"))
            window = x[i : i + 1, :, y0:y1, x0:x1].detach().requires_grad_()
            want = torch.nn.functional.interpolate(
                window, (7, 7), mode=interpolation, antialias=antialias, align_corners=False
            )
            want = want.flip(3) if drawn["flip_x"][i] else want
            torch.testing.assert_close(y[i : i + 1], want, rtol=1e-4, atol=1e-5)
            # The gradient of the window, and nothing around it.
            (inner,) = torch.autograd.grad(want.sum(), window)
            full = torch.zeros_like(grad[i : i + 1])
            full[:, :, y0:y1, x0:x1] = inner
            torch.testing.assert_close(grad[i : i + 1], full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("size", [(50, 40), (64, 64), (200, 300)])
@pytest.mark.usefixtures("source")
def test_nearest_resizes_take_torchvisions_pixels(mode: str, size: tuple[int, int]) -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    F = functional()
    how = v2.InterpolationMode(mode)
    x = torch.stack(photographs()[:1] * 6)[:, :, :150, :200]
    chain = Compose([v2.RandomResizedCrop(size, interpolation=how), v2.RandomHorizontalFlip(0.5)])
    assert len(chain.plan().passes) == 1
    (params,) = chain.sample_params(6, input_size=(150, 200), sample_ids=range(6))
    y = chain(x, params=[params])
    for i in range(6):
        drawn = {k: int(v[i]) for k, v in params.drawn().items()}
        top, left = drawn["window_y0"], drawn["window_x0"]
        window = (top, left, drawn["window_y1"] - top, drawn["window_x1"] - left)
        want = F.resized_crop(x[i], *window, list(size), how)
        assert torch.equal(y[i], want.flip(2) if drawn["flip_x"] else want)
    resize = v2.Resize(list(size), how)
    assert torch.equal(Compose([resize])(x), resize(x))


def test_nearest_columns_are_torchs_but_where_a_place_is_the_edge_of_two_pixels() -> None:
    """There torch's product of float32 numbers is above or below it."""
    v2 = torchvision_module("torchvision.transforms.v2")
    nearest = v2.InterpolationMode("nearest")
    others = 0
    for side in range(5, 700, 29):
        row = torch.arange(side, dtype=torch.float32).reshape(1, 1, 1, side)
        for size in (7, 31, 64, 96, 224, 333, 480):
            resize = v2.Resize((1, size), nearest)
            want, y = resize(row).flatten(), Compose([resize])(row).flatten()
            place = torch.arange(size) * side
            # The pixel that the place is in, in whole numbers.
            assert torch.equal(y.long(), torch.div(place, size, rounding_mode="floor"))
            other = want != y
            assert bool((place[other] % size == 0).all())
            assert bool((want - y)[other].eq(-1).all())
            others += int(other.sum())
    assert others < 20, "of 40,000 columns"


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (64, 80), (224, 232)])
@pytest.mark.usefixtures("source")
def test_evaluation_is_torchvisions_resize_and_central_crop(size: int, resize: int) -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    chain = recipes.torchvision_classification(size, train=False, resize=resize)
    assert len(chain.plan().passes) == 1
    theirs = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])
    batch = chain.collate(photographs())
    for image, y in zip(photographs(), batch, strict=True):
        assert levels(y, normalized(theirs(image.float()))) < 0.01
        assert levels(y, normalized(theirs(image))) <= 1.0
        assert torch.equal(chain(image), y)


@pytest.mark.usefixtures("source")
def test_the_default_evaluation_has_the_sides_of_its_library() -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    image = photographs()[0]
    for chain, side, how in (
        (recipes.torchvision_classification(train=False), 256, "bilinear"),
        (recipes.timm_imagenet(train=False, crop_pct=0.95), 235, "bicubic"),
        (recipes.simclr(96, train=False), 109, "bicubic"),
    ):
        size = 96 if side == 109 else 224
        resize = v2.Resize(side, v2.InterpolationMode(how), antialias=True)
        want = v2.CenterCrop(size)(resize(image.float())).clamp(0, 255)
        assert levels(chain(image), normalized(want)) < 0.01


@pytest.mark.usefixtures("source")
def test_segmentation_is_one_pass_and_torchvisions_for_the_same_draws() -> None:
    F = functional()
    tv = torchvision_module("torchvision.tv_tensors")
    chain = recipes.segmentation(160, base=140, seed=2, fill=7)
    assert len(chain.plan().passes) == 1, str(chain.plan())
    x = torch.stack([photographs()[i % 2] for i in range(8)])
    mask = (x[:, 0] > 128).long()
    (params,) = chain.sample_params(8, input_size=(427, 640), sample_ids=range(8))
    y, moved = chain(tv.Image(x), tv.Mask(mask), params=[params])
    sides = []
    for i in range(8):
        drawn = {k: float(v[i]) for k, v in params.drawn().items()}
        m = params.matrices[i]
        side = round(427 / float(m[1, 1]))
        sides.append(side)
        resized = F.resize(x[i].float(), [side], antialias=True)
        labels = F.resize(mask[i][None], [side], F.InterpolationMode.NEAREST_EXACT)
        h, w = resized.shape[1:]
        if drawn["flip_x"]:
            resized, labels = resized.flip(2), labels.flip(2)
        left, top = int(drawn["window_x0"]), int(drawn["window_y0"])
        padded = torch.nn.functional.pad(resized, [160] * 4, value=7.0)
        around = torch.nn.functional.pad(labels, [160] * 4, value=255)
        rows, columns = slice(top + 160, top + 320), slice(left + 160, left + 320)
        assert levels(y[i].as_subclass(Tensor), normalized(padded[:, rows, columns])) < 0.02
        # Where a place is the edge of two pixels (368 of 640), torch rounds either way.
        other = moved[i].as_subclass(Tensor) != around[0, rows, columns]
        assert float(other.double().mean()) < 0.01
        assert min(h, w) == side
    assert 70 <= min(sides) < max(sides) < 280
    assert len(set(sides)) > 4


def test_sides_of_random_resizes_are_uniform() -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    chain = Compose([v2.RandomResize(20, 24), RandomCrop(20, seed=0)], seed=3)
    assert len(chain.plan().passes) == 1, str(chain.plan())
    (params,) = chain.sample_params(4000, input_size=(40, 40))
    sides = (40 / params.matrices[:, 0, 0]).round().long()
    counts = torch.bincount(sides, minlength=25)[20:24]
    assert int(counts.sum()) == 4000
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 21.1  # chi-square, 3 degrees, 1e-4


# --- images of several sizes ---


def classes() -> list[tuple[Tensor, int]]:
    return [(image, i) for i, image in enumerate(photographs())]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Augment(64, hflip=0.5, crop="resized", mean=0.5, std=0.2, seed=1),
        lambda: Augment(64, degrees=20, crop="center", erase=1.0, seed=1),
        lambda: Augment(64, crop="none", brightness=0.4, interpolation="bicubic", seed=1),
        lambda: recipes.torchvision_classification(64, erase=0.5, seed=1),
        lambda: recipes.segmentation(64, base=60, seed=1),
        lambda: recipes.torchvision_classification(64, train=False),
    ],
)
@pytest.mark.usefixtures("source")
def test_images_of_several_sizes_are_as_each_by_itself(make: Any) -> None:
    chain = make()
    dataset = WithIds(classes())
    y, labels = chain.collate([dataset[i] for i in range(5)])
    assert labels.tolist() == list(range(5))
    for i, image in enumerate(photographs()):
        assert torch.equal(y[i], chain(image[None], sample_ids=[i], view=0)[0])
    # In any layout, and of floats.
    last = [(image.permute(1, 2, 0).contiguous().permute(2, 0, 1), i) for image, i in classes()]
    chain = make()
    chain.memory_format = torch.contiguous_format
    again, _ = chain.collate([WithIds(last)[i] for i in range(5)])
    torch.testing.assert_close(again, y)
    chain = make()
    mixed = [last[i] if i % 2 else classes()[i] for i in range(5)]
    again, _ = chain.collate([WithIds(mixed)[i] for i in range(5)])
    torch.testing.assert_close(again, y)


def test_a_list_on_a_device_is_as_on_the_cpu(backend: Backend) -> None:
    """By one call of the kernel on the CPU, image by image on a device."""
    sizes = ((19, 23), (16, 40), (31, 17))
    pictures = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in sizes]

    def run(images: list[Tensor]) -> Tensor:
        chain = recipes.torchvision_classification(16, erase=0.5, seed=1)
        y, labels = chain.collate([WithIds([(x, 3) for x in images])[i] for i in range(3)])
        assert labels.tolist() == [3, 3, 3]
        return y

    y = run([x.to(backend.device) for x in pictures])
    assert y.device.type == torch.device(backend.device).type
    assert torch.equal(y.cpu(), run(pictures))


def test_images_of_several_sizes_are_mixed_in_the_same_pass() -> None:
    chain = recipes.torchvision_classification(
        48, mixup=0.4, cutmix=1.0, num_classes=5, erase=0.5, seed=4
    )
    assert len(chain.plan().passes) == 1
    alone = recipes.torchvision_classification(48, erase=0.5, seed=4)
    dataset = WithIds(classes())
    y, labels = chain.collate([dataset[i] for i in range(5)])
    single, plain = alone.collate([dataset[i] for i in range(5)])
    (params,) = chain.sample_params(5, input_size=(427, 640), sample_ids=range(5))
    assert torch.equal(labels, mix_labels(plain, params, 5))
    kinds = set()
    for i in range(5):
        x0, y0, x1, y1 = params.mix_boxes[i].tolist()
        lam, other = float(params.records[i, 15]), int(params.partners[i])
        want = single[i].clone()
        if other >= 0:
            kinds.add(lam != 0.0)
            box = (slice(None), slice(y0, y1), slice(x0, x1))
            want[box] = lam * single[i][box] + (1 - lam) * single[other][box]
        torch.testing.assert_close(y[i], want, rtol=1e-5, atol=1e-5)
    assert kinds == {True, False}  # MixUp and CutMix


def test_targets_move_with_images_of_several_sizes() -> None:
    tv = torchvision_module("torchvision.tv_tensors")
    chain = recipes.segmentation(64, base=60, seed=1)
    samples = [
        {"image": tv.Image(image), "mask": tv.Mask((image[0] > 128).long()), "name": str(i)}
        for i, image in enumerate(photographs())
    ]
    dataset = WithIds(samples)
    batch = chain.collate([dataset[i] for i in range(5)])
    assert type(batch["image"]) is tv.Image
    assert type(batch["mask"]) is tv.Mask
    assert batch["name"] == [str(i) for i in range(5)]
    for i, sample in enumerate(samples):
        y, mask = chain(
            sample["image"][None], tv.Mask(sample["mask"][None]), sample_ids=[i], view=0
        )
        assert torch.equal(batch["image"][i], y[0])
        assert torch.equal(batch["mask"][i], mask[0])
    mixing = Compose([RandomResizedCrop(32, seed=0), Mixing()], seed=0)
    with pytest.raises(ValueError, match="one size to be mixed"):
        mixing.collate([(s["image"], s["mask"]) for s in samples])


def Mixing() -> Any:
    return recipes.torchvision_classification(32, mixup=1.0).transforms[-1]


def test_images_that_stay_of_several_sizes_are_refused() -> None:
    flip = Compose([RandomHorizontalFlip(seed=0), Normalize(0.5, 0.5)], seed=0)
    with pytest.raises(ValueError, match="images must be of one size"):
        flip.collate(photographs())


# --- the orders, and what the recipes are made of ---


def test_torchvision_erases_and_then_mixes_in_one_pass() -> None:
    chain = recipes.torchvision_classification(erase=0.1, mixup=0.2, cutmix=1.0)
    assert str(chain.plan()) == (
        "1. RandomResizedCrop + RandomHorizontalFlip + Normalize + RandomErasing + MixUp or CutMix"
    )
    chain = recipes.torchvision_classification(policy="ta_wide", erase=0.1, mixup=0.2)
    names = [name for p in chain.plan().passes for name in p.names]
    assert names == [
        *("RandomResizedCrop", "RandomHorizontalFlip", "TrivialAugmentWide"),
        *("Normalize", "RandomErasing", "MixUp"),
    ]


@pytest.mark.usefixtures("source")
def test_timm_mixes_then_normalizes_then_erases() -> None:
    chain = recipes.timm_imagenet(None, mixup=0.8, reprob=1.0, remode="const", seed=1)
    names = [name for p in chain.plan().passes for name in p.names]
    assert names == [
        *("RandomResizedCrop", "RandomHorizontalFlip", "MixUp", "Normalize", "RandomErasing")
    ]
    x = torch.stack([photographs()[i % 2] for i in range(4)])
    y, labels = chain(x, torch.tensor([0, 1, 2, 3]), sample_ids=range(4))
    # Erased boxes are zero: nothing was mixed into them.
    boxes = chain.sample_params(4, input_size=(427, 640), sample_ids=range(4))[-1].erase_boxes
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        assert x1 > x0
        assert y1 > y0
        assert bool((y[i, :, y0:y1, x0:x1] == 0).all())
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_has_timms_modes_pairs_and_smoothed_labels(mode: str) -> None:
    mix = Mix(0.7, 1.0, p=0.6, num_classes=10, label_smoothing=0.1, mode=mode)
    augment = Augment(16, mix=mix, seed=3, crop="none")
    labels = torch.arange(8)
    x = torch.rand(8, 3, 16, 16)
    draws = set()
    for epoch in range(40):
        params = augment.sample_params(8, input_size=16, sample_ids=range(8), epoch=epoch)
        own = params.records[:, 10:16]
        paired = params.partners >= 0
        assert (params.partners[paired] == 7 - torch.arange(8)[paired]).all()
        mirrored = own.clone()
        mirrored[paired, 4] = (7 - params.partners[paired]).double()
        if mode == "batch":
            assert bool(paired.all()) or not bool(paired.any())
            assert len({tuple(r) for r in own[:, [0, 1, 2, 3, 5]].tolist()}) == 1
        elif mode == "pair":
            assert torch.equal(own[:, [0, 1, 2, 3, 5]], own.flip(0)[:, [0, 1, 2, 3, 5]])
        draws |= {tuple(r) for r in own[:, [0, 1, 2, 3, 5]].tolist()}
        _y, soft = augment(x, labels, params=params)
        # timm.data.mixup.mixup_target
        off, on = 0.1 / 10, 1 - 0.1 + 0.1 / 10
        hot = torch.full((8, 10), off).scatter_(1, labels[:, None], on)
        w = params.weights.float()[:, None]
        torch.testing.assert_close(soft, hot * w + hot.flip(0) * (1 - w))
    assert len(draws) > {"batch": 15, "pair": 60, "elem": 120}[mode]
    # The order of a batch changes no draw of it.
    back = augment.sample_params(8, input_size=16, sample_ids=range(7, -1, -1), epoch=39)
    if mode == "batch":
        assert torch.equal(back.records[:, 10:14], params.records[:, 10:14].flip(0))


def test_smoothing_needs_classes_and_modes_have_names() -> None:
    with pytest.raises(ValueError, match="label_smoothing needs num_classes"):
        Mix(0.2, label_smoothing=0.1)
    with pytest.raises(ValueError, match="mode must be one of"):
        Mix(0.2, mode="batches")


def test_policies_of_both_libraries_are_given_to_the_chain() -> None:
    pytest.importorskip("timm")
    torchvision_module("torchvision.transforms.v2")
    x = torch.stack([photographs()[0][:, :200, :200]] * 3)
    for chain in (
        recipes.timm_imagenet("rand-m9-mstd0.5-inc1", 32, seed=0),
        recipes.timm_imagenet("original", 32, seed=0),
        recipes.torchvision_classification(32, policy="ra", seed=0),
        recipes.torchvision_classification(32, policy="imagenet", seed=0),
        recipes.timm_imagenet("ta_wide", 32, reprob=1.0, remode="rand", recount=3, seed=0),
    ):
        y = chain(x, sample_ids=range(3))
        assert y.dtype is torch.float32
        assert y.shape == (3, 3, 32, 32)
        assert torch.equal(y[1:2], chain(x[1:2], sample_ids=[1]))
        assert not torch.equal(y[0], y[1])


def test_timms_strings_need_no_timm_and_draw_as_its_transforms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.stack([photographs()[0][:, :200, :200]] * 6)
    auto = pytest.importorskip("timm.data.auto_augment")
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m15-n3-p0.9", "original-mstd0.5", "v0r"):
        make = auto.rand_augment_transform if "rand" in policy else auto.auto_augment_transform
        theirs = make(policy, {"translate_const": 100, "img_mean": (124, 116, 104)})
        wanted = recipes.timm_imagenet(theirs, 32, seed=0)(x, sample_ids=range(6))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "timm.data.auto_augment", None)
            chain = recipes.timm_imagenet(policy, 32, seed=0)
            assert torch.equal(chain(x, sample_ids=range(6)), wanted)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm.data.auto_augment", None)
        with pytest.raises(ImportError, match="needs timm"):
            recipes.timm_imagenet("augmix-m3-w3", 32)


def test_a_batch_of_detection_is_flipped_and_converted_in_one_pass() -> None:
    """Boxes are converted and filtered without a copy of the images, whose types stay theirs."""
    tv = torchvision_module("torchvision.tv_tensors")
    chain = recipes.detection("hflip", hflip=1.0, seed=1)
    assert "1. RandomHorizontalFlip + ToDtype" in str(chain.plan())
    x = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    boxes = [
        tv.BoundingBoxes(torch.tensor([[1.0, 2.0, 9.0, 8.0]]), format="XYXY", canvas_size=(20, 30))
        for _ in x
    ]
    y, moved = chain(tv.Image(x), boxes)
    assert torch.allclose(y.as_subclass(Tensor), x.flip(3) / 255, rtol=0, atol=1e-7)
    assert [b.tolist() for b in moved] == [[[21.0, 2.0, 29.0, 8.0]]] * 2


def test_what_a_transform_gives_back_in_another_order_is_copied() -> None:
    """Of the same memory and shape, and read in another way."""
    v2 = torchvision_module("torchvision.transforms.v2")
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    turned = Compose([v2.Lambda(lambda image: image.transpose(1, 2))], seed=0)
    assert torch.equal(turned(x), x.transpose(2, 3))


def test_images_of_several_sizes_are_together_again_from_a_resize_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After transforms that are called for each, and as each image is by itself."""
    v2 = torchvision_module("torchvision.transforms.v2")
    tv = torchvision_module("torchvision.tv_tensors")
    steps = [v2.RandomZoomOut(p=1.0), v2.ElasticTransform(), v2.Resize((24, 24))]
    chain = Compose([*steps, v2.RandomHorizontalFlip()], seed=0)
    x = torch.randint(0, 256, (4, 3, 20, 30), dtype=torch.uint8)
    masks = tv.Mask((x[:, 0] > 128).long())
    calls = []
    several = _ops.apply_several
    monkeypatch.setattr(_ops, "apply_several", lambda *a: (calls.append(1), several(*a))[1])
    y, moved = chain(tv.Image(x), masks, sample_ids=range(4))
    assert len(calls) == 1
    for i in range(4):
        alone, mask = chain(tv.Image(x[i]), tv.Mask(masks[i]), sample_ids=[i])
        assert torch.equal(alone, y[i])
        assert torch.equal(mask, moved[i])


@pytest.mark.usefixtures("source")
def test_detection_moves_and_filters_boxes() -> None:
    tv = torchvision_module("torchvision.tv_tensors")
    image = tv.Image(photographs()[0])
    places = torch.tensor([[10.0, 20.0, 200.0, 300.0], [300.0, 30.0, 300.0, 90.0]])
    boxes = tv.BoundingBoxes(places, format="XYXY", canvas_size=(427, 640))
    target = {"boxes": boxes, "labels": torch.tensor([3, 4])}
    for policy in ("hflip", "multiscale", "ssd", "ssdlite", "lsj"):
        chain = recipes.detection(policy, 64 if policy == "lsj" else None, hflip=1.0, seed=1)
        y, moved = chain(image, target)
        assert y.dtype is torch.float32
        assert float(y.min()) >= 0
        assert float(y.max()) <= 1
        assert len(moved["boxes"]) == len(moved["labels"]) <= 1  # the empty one has gone
        if policy == "hflip":
            assert moved["boxes"].tolist() == [[440.0, 20.0, 630.0, 300.0]]
            assert moved["labels"].tolist() == [3]
        if policy == "multiscale":
            assert min(y.shape[1:]) in range(480, 801, 32)
    chain = recipes.detection("lsj", 96, seed=1)
    y, moved = chain.collate([(image, target)] * 3)
    assert y.shape == (3, 3, 96, 96)
    assert len(moved["boxes"]) == 3


def test_views_of_simclr_differ_and_come_again() -> None:
    torchvision_module("torchvision.transforms.v2")
    chain = recipes.simclr(32, seed=1)
    x = torch.stack([photographs()[0][:, :128, :128]] * 4)
    first, second = (chain(x, sample_ids=range(4), view=v) for v in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, chain(x, sample_ids=range(4), view=0))
    names = [name for p in chain.plan().passes for name in p.names]
    assert names[:2] == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert names[-1] == "Normalize"
    assert len(names) == 6


RECIPES: dict[str, Any] = {
    "torchvision_classification": lambda train, size: recipes.torchvision_classification(
        size, train=train, policy="ta_wide", erase=1.0, mixup=0.2, seed=1
    ),
    "timm_imagenet": lambda train, size: recipes.timm_imagenet(
        "rand-m9-mstd0.5-inc1", size, train=train, mixup=0.8, reprob=1.0, crop_pct=0.9, seed=1
    ),
    "segmentation": lambda train, size: recipes.segmentation(size, train=train, base=60, seed=1),
    "simclr": lambda train, size: recipes.simclr(size, train=train, seed=1),
    **{
        policy: lambda train, size, policy=policy: recipes.detection(
            policy, size, train=train, seed=1
        )
        for policy in ("hflip", "multiscale", "lsj", "ssd", "ssdlite")
    },
}


def image_of(result: Any) -> Tensor:
    """The images of a result, with or without targets."""
    image: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return image.as_subclass(Tensor)


@pytest.mark.parametrize("name", RECIPES)
def test_eval_gives_the_recipe_of_evaluation_and_train_that_of_training(name: str) -> None:
    torchvision_module("torchvision.transforms.v2")
    both, evaluation = RECIPES[name](True, 48), RECIPES[name](False, 48)
    x = torch.stack([image[:, :60, :60] for image in photographs()[:2]])
    tv = torchvision_module("torchvision.tv_tensors")
    box = tv.BoundingBoxes([[5.0, 5, 50, 40]], format="XYXY", canvas_size=(60, 60))
    boxes = [{"boxes": box, "labels": torch.tensor([3])}] * 2
    given = (boxes,) if "SanitizeBoundingBoxes" in str(evaluation.plan()) else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = image_of(evaluation(x, *given, sample_ids=range(2)))
        assert torch.equal(image_of(both.eval()(x, *given, sample_ids=range(2))), want)
        assert torch.equal(image_of(both(x, *given, sample_ids=range(2), epoch=1)), want)
        assert str(both.plan()) == str(evaluation.plan())
        samples = list(zip(x, *given, strict=True)) if given else list(x)
        assert torch.equal(image_of(both.collate(samples)), want)
        assert len(both.sample_params(2, input_size=(60, 60))) == len(evaluation.plan().passes)
    assert str(both.train().plan()) != str(evaluation.plan())
    assert str(both.plan()) == str(RECIPES[name](True, 48).plan())


def test_arguments_of_recipes_are_checked() -> None:
    for call, match in (
        *[
            (lambda r=recipe, k=key, v=value: r(**{k: v}), f"{recipe.__name__}: {key} must")
            for recipe, key, *values in (
                (recipes.torchvision_classification, "resize", 0, -3, 2.5),
                (recipes.torchvision_classification, "train", "no"),
                (recipes.segmentation, "base", 0, 10.5),
                (recipes.segmentation, "scale", (0, 0), (2, 0.5)),
                (recipes.timm_imagenet, "crop_pct", 0, -1, 100),
                (recipes.timm_imagenet, "reprob", -1, 2.0),
                (recipes.timm_imagenet, "recount", 0, -2, 1.5),
                (recipes.timm_imagenet, "mix_mode", "foo"),
                (recipes.detection, "hflip", 3),
                (recipes.detection, "fill", "red"),
                (recipes.simclr, "strength", -1, 9),
                (recipes.simclr, "blur", 2),
                (recipes.simclr, "solarize", -0.5),
            )
            for value in values
        ],
        (
            lambda: recipes.torchvision_classification(policy="ra", magnitude=99),
            "magnitude one of at least 2 bins",
        ),
        (lambda: recipes.detection("coco"), "policy must be one of"),
        (lambda: recipes.timm_imagenet(None, reprob=0.1, remode="color"), "remode must be one of"),
        (lambda: recipes.segmentation(scale=(1,)), "scale must be"),
        (lambda: recipes.torchvision_classification(hflip=2), "p must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()  # type: ignore[no-untyped-call]


# --- what it is for ---


@pytest.mark.slow
def test_a_network_learns_as_well_with_the_fused_recipe_as_with_torchvisions() -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    datasets = pytest.importorskip("sklearn.datasets")
    x, labels = datasets.load_digits(return_X_y=True)
    images = (torch.tensor(x).reshape(-1, 1, 8, 8) * 15.9).to(torch.uint8)
    images, y = images.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.tensor(labels)
    ours = recipes.torchvision_classification(
        16, scale=(0.5, 1.0), hflip=0.0, erase=0.2, mean=0.3, std=0.35, seed=0
    )
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(16, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.3], [0.35]),
            v2.RandomErasing(0.2),
        ]
    )
    evaluate = Compose([Normalize(0.3, 0.35)], seed=0)

    def accuracy(fused: bool, seed: int) -> float:
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        train, test = order[:800], order[800:]
        net = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 12, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(12, 24, 3, 2)),
            *(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(216, 10)),
        )
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for epoch in range(6):
            for batch in train[torch.randperm(800)].split(50):
                if fused:
                    seen = ours(images[batch], sample_ids=batch, epoch=100 * seed + epoch)
                else:
                    seen = torch.stack([theirs(image) for image in images[batch]])
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(seen), y[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            return float((net(evaluate(images[test])).argmax(1) == y[test]).float().mean())

    runs = torch.tensor([[accuracy(fused, seed) for fused in (True, False)] for seed in range(4)])
    difference = runs[:, 0] - runs[:, 1]
    assert float(runs.mean()) > 0.85
    # Four pairs of runs: four standard errors, and at least a point.
    spread = float(difference.std()) / 4**0.5
    assert abs(float(difference.mean())) < max(4 * spread, 0.01), runs
