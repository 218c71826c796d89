"""The transforms by torchvision's names: against torchvision and kornia in their conventions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_peers
from fusereg.augment import (
    Augment,
    AugmentParams,
    CenterCrop,
    Compose,
    CutMix,
    MixUp,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
)

IDS = range(6)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 19, 26)


def run(transform: Any, x: Tensor) -> tuple[Tensor, AugmentParams]:
    """The result, and what was drawn for it."""
    params = transform.sample_params(len(x), input_size=x.shape[2:], sample_ids=range(len(x)))
    y = transform(x, sample_ids=range(len(x)))
    assert torch.equal(y, transform(x, params=params))
    return y, params[0]


def drawn(params: AugmentParams, i: int) -> dict[str, float]:
    return {name: float(column[i]) for name, column in params.drawn().items()}


def close(y: Tensor, want: Tensor, share: float = 0.0) -> None:
    """Equal up to the rounding of float32 grids; a share of pixels may have taken a neighbor."""
    wrong = ((y - want).abs() > 3e-4).double().mean()
    assert float(wrong) <= share


# --- torchvision ---


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_rotation_is_torchvisions(x: Tensor, interpolation: str) -> None:
    tv = augment_peers.torchvision_module("torchvision.transforms.v2.functional")
    mode = augment_peers.torchvision_module("torchvision.transforms.v2").InterpolationMode
    for center in (None, [5.0, 9.0]):
        y, params = run(RandomRotation((5, 60), interpolation, center=center, seed=1), x)
        for i in IDS:
            angle = drawn(params, i)["angle"]
            assert 5 <= angle <= 60
            want = tv.rotate(x[i], angle, interpolation=mode(interpolation), center=center)
            close(y[i], want, 0.01 if interpolation == "nearest" else 0.0)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_affine_is_torchvisions(x: Tensor, fill: float) -> None:
    tv = augment_peers.torchvision_module("torchvision.transforms.v2.functional")
    mode = augment_peers.torchvision_module("torchvision.transforms.v2").InterpolationMode
    transform = RandomAffine(
        (5, 40), (0.2, 0.1), (0.7, 1.4), (-10, 10, -5, 5), "bilinear", fill=fill, seed=2
    )
    y, params = run(transform, x)
    for i in IDS:
        d = drawn(params, i)
        assert -40 <= d["angle"] <= -5, "torchvision's affine turns clockwise"
        assert d["translate_x"] == round(d["translate_x"])
        want = tv.affine(
            x[i],
            angle=-d["angle"],
            translate=[int(d["translate_x"]), int(d["translate_y"])],
            scale=d["scale_x"],
            shear=[d["shear_x"], d["shear_y"]],
            interpolation=mode("bilinear"),
        )
        inside = tv.affine(
            torch.ones_like(x[i]),
            angle=-d["angle"],
            translate=[int(d["translate_x"]), int(d["translate_y"])],
            scale=d["scale_x"],
            shear=[d["shear_x"], d["shear_y"]],
            interpolation=mode("bilinear"),
        )
        # Its own fill counts twice where weights are partly outside; this is it counted once.
        close(y[i], want + (1 - inside) * fill)


@pytest.mark.parametrize("antialias", [True, False])
def test_resized_crop_is_torchvisions_inside_the_edges(x: Tensor, antialias: bool) -> None:
    tv = augment_peers.torchvision_module("torchvision.transforms.v2.functional")
    x = torch.rand(6, 3, 60, 80)
    transform = RandomResizedCrop((16, 24), scale=(0.3, 0.9), antialias=antialias, seed=3)
    y, params = run(transform, x)
    for i in IDS:
        d = drawn(params, i)
        x0, y0, x1, y1 = (int(d[f"window_{k}"]) for k in ("x0", "y0", "x1", "y1"))
        want = tv.resized_crop(x[i], y0, x0, y1 - y0, x1 - x0, [16, 24], antialias=antialias)
        close(y[i][:, 2:-2, 2:-2], want[:, 2:-2, 2:-2])
    # The whole image has no pixels beyond its edge: equal everywhere.
    whole = RandomResizedCrop((16, 24), (1, 1), (4 / 3, 4 / 3), antialias=antialias)
    y, params = run(whole, x)
    assert drawn(params, 0)["window_x1"] == 80
    close(y, tv.resize(x, [16, 24], antialias=antialias))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_random_crop_is_torchvisions(x: Tensor, mode: str) -> None:
    tv = augment_peers.torchvision_module("torchvision.transforms.v2.functional")
    y, params = run(RandomCrop((18, 20), (3, 4), fill=0.25, padding_mode=mode, seed=4), x)
    seen = set()
    for i in IDS:
        d = drawn(params, i)
        padded = tv.pad(x[i], [3, 4, 3, 4], fill=0.25, padding_mode=mode)
        left, top = int(d["window_x0"]) + 3, int(d["window_y0"]) + 4
        assert torch.equal(y[i], tv.crop(padded, top, left, 18, 20))
        seen.add((left, top))
    assert len(seen) > 1


def test_center_crop_flips_and_normalize_are_torchvisions(x: Tensor) -> None:
    tv = augment_peers.torchvision_module("torchvision.transforms.v2.functional")
    for size in ((8, 11), (7, 12), (30, 30), (25, 9), (19, 26)):
        y, _ = run(CenterCrop(size), x)
        assert torch.equal(y, tv.center_crop(x, list(size)))
    y, _ = run(RandomHorizontalFlip(1.0), x)
    assert torch.equal(y, tv.horizontal_flip(x))
    y, _ = run(RandomVerticalFlip(1.0), x)
    assert torch.equal(y, tv.vertical_flip(x))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    y, _ = run(Normalize(mean, std), x)
    torch.testing.assert_close(y, tv.normalize(x, mean, std), rtol=1e-6, atol=1e-6)
    u = (x * 255).to(torch.uint8)
    want = tv.normalize(u.float() / 255, mean, std)
    torch.testing.assert_close(Normalize(mean, std)(u), want, rtol=1e-6, atol=1e-6)


def test_a_list_of_torchvisions_transforms_is_read(x: Tensor) -> None:
    tv = augment_peers.torchvision_module("torchvision.transforms.v2")
    theirs: list[Any] = [
        tv.RandomRotation(10, tv.InterpolationMode.BILINEAR, fill=0.5),
        tv.RandomAffine(3, (0.1, 0.1), (0.9, 1.1), 4, tv.InterpolationMode.BILINEAR, fill=0.5),
        tv.RandomCrop(18, padding=(1, 2, 3, 4), fill=0.5),
        tv.RandomHorizontalFlip(0.25),
        tv.RandomVerticalFlip(),
        tv.RandomResizedCrop(12, antialias=False),
        tv.CenterCrop(9),
        tv.Normalize([0.5] * 3, [0.2] * 3),
        tv.RandomErasing(value=1),
        tv.CutMix(num_classes=4),
    ]
    ours: list[Any] = [
        RandomRotation(10, "bilinear", fill=0.5),
        RandomAffine(3, (0.1, 0.1), (0.9, 1.1), 4, "bilinear", fill=0.5),
        RandomCrop(18, padding=(1, 2, 3, 4), fill=0.5),
        RandomHorizontalFlip(0.25),
        RandomVerticalFlip(),
        RandomResizedCrop(12, antialias=False),
        CenterCrop(9),
        Normalize([0.5] * 3, [0.2] * 3),
        RandomErasing(value=1),
        CutMix(num_classes=4),
    ]
    labels = torch.arange(6) % 4
    a, b = Compose(theirs, merge=True, seed=7), Compose(ours, merge=True, seed=7)
    assert len(a.plan().passes) == 1
    assert str(a.plan()) == str(b.plan())
    for given, want in zip(a(x, labels), b(x, labels), strict=True):
        assert torch.equal(given, want)
    # What changes the size by what it draws, or writes in place, is called.
    for item in (tv.RandomRotation(10, expand=True), tv.CenterCrop(3), tv.ToPureTensor()):
        known = Compose([item]).plan().passes[0].function is None
        assert known == (not isinstance(item, tv.RandomRotation))


@pytest.mark.parametrize("angle", [-270, -90, 0, 90, 180])
@pytest.mark.parametrize("size", [(5, 8), (6, 8), (1, 7)])
def test_quarter_turns_that_expand_are_exact(size: tuple[int, int], angle: int) -> None:
    x = torch.randn(3, 2, *size)
    turned = RandomRotation((angle, angle), expand=True)(x)
    assert torch.equal(turned, torch.rot90(x, angle // 90, (2, 3)))


@pytest.mark.parametrize("degrees", [(-10, 10), (30, 30), (100, 170), (-400, -300), (40, 50)])
def test_expanded_images_lose_nothing(degrees: tuple[int, int]) -> None:
    h, w = 12, 31
    x = torch.ones(40, 1, h, w)
    transform = RandomRotation(degrees, "bilinear", expand=True, seed=3)
    y, params = run(transform, x)
    corners = torch.tensor([[0.0, 0], [w - 1, 0], [0, h - 1], [w - 1, h - 1]]).double()
    places = params.keypoints(corners.expand(len(x), 4, 2))
    height, width = y.shape[2:]
    # Half a pixel around each corner's center, turned, is up to 0.71 away from it.
    assert bool((places > -0.21).all())
    assert bool((places[..., 0] < width - 0.79).all())
    assert bool((places[..., 1] < height - 0.79).all())
    # As large as the widest of a thousand angles, up to the next whole pixel.
    angles = torch.linspace(*map(float, degrees), 1001, dtype=torch.float64).deg2rad()
    cos, sin = angles.cos().abs(), angles.sin().abs()
    assert width - 1 < float((w * cos + h * sin).max()) < width + 1e-3
    assert height - 1 < float((w * sin + h * cos).max()) < height + 1e-3
    # What comes later sees the larger canvas.
    steps = [transform, CenterCrop((height - 2, width - 1)), Normalize(0.5, 0.5)]
    for merge in (False, True):
        chain = Compose(steps, merge=merge, seed=3)
        assert len(chain.plan().passes) == 2 - merge
        assert chain(x).shape == (40, 1, height - 2, width - 1)


def test_tv_tensors_go_through() -> None:
    tv = augment_peers.torchvision_module("torchvision.tv_tensors")
    image = tv.Image(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    box = tv.BoundingBoxes([[1.0, 2, 4, 3]], format="XYXY", canvas_size=(8, 8))
    mask = tv.Mask(torch.arange(64).reshape(8, 8))
    augment = Augment(8, degrees=(90, 90), crop="center")
    targets = [{"boxes": box, "masks": mask[None], "labels": torch.tensor([i])} for i in range(2)]
    for given in targets:
        given["masks"] = tv.Mask(given["masks"])
    y, moved = augment(image, targets)
    assert type(y) is tv.Image
    want = torch.rot90(image.as_subclass(Tensor), 1, (2, 3)).float() / 255
    torch.testing.assert_close(y.as_subclass(Tensor), want)
    for i, target in enumerate(moved):
        assert type(target["boxes"]) is tv.BoundingBoxes
        assert target["boxes"].tolist() == [[2, 4, 3, 7]]
        assert target["boxes"].canvas_size == (8, 8)
        turned = torch.rot90(mask.as_subclass(Tensor), 1, (0, 1))
        assert torch.equal(target["masks"].as_subclass(Tensor)[0], turned)
        assert target["labels"].tolist() == [i]
    _, boxes = augment(image, [box, box])
    assert boxes[1].tolist() == [[2, 4, 3, 7]]
    _, both = augment(image, {"m": tv.Mask(torch.zeros(2, 8, 8)), "y": torch.arange(2)})
    assert type(both["m"]) is tv.Mask
    assert both["y"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="targets of single samples cannot be mixed"):
        Augment(8, mix="mixup")(image, targets)
    with pytest.raises(
        ValueError, match=r"one tv_tensors\.BoundingBoxes for each of the 2 samples"
    ):
        augment(image, [box])


# --- kornia ---


def test_affine_is_kornias(x: Tensor) -> None:
    kornia = pytest.importorskip("kornia")
    warp = kornia.geometry.transform
    transform = RandomAffine(
        (5, 40), (0.2, 0.1), (0.7, 1.4, 0.8, 1.2), (-10, 10, -5, 5), compat="kornia", seed=5
    )
    y, params = run(transform, x)
    given = params.drawn()
    assert bool(((given["angle"] >= -40) & (given["angle"] <= -5)).all()), "clockwise"
    forward = warp.get_affine_matrix2d(
        torch.stack([given["translate_x"], given["translate_y"]], 1),
        torch.tensor([[12.5, 9.0]], dtype=torch.float64).expand(6, 2),
        torch.stack([given["scale_x"], given["scale_y"]], 1),
        -given["angle"],
        given["shear_x"] * math.pi / 180,
        given["shear_y"] * math.pi / 180,
    )
    torch.testing.assert_close(params.inverse().matrices, forward[:, :2], rtol=1e-9, atol=1e-9)
    want = warp.warp_affine(x, forward[:, :2].float(), (19, 26), align_corners=True)
    close(y, want)


def test_rotation_is_kornias(x: Tensor) -> None:
    kornia = pytest.importorskip("kornia")
    transform = RandomRotation((20, 60), compat="kornia", seed=6)
    y, params = run(transform, x)
    theirs = kornia.augmentation.RandomRotation((20.0, 60.0), align_corners=True, p=1.0)
    given = theirs.forward_parameters(x.shape)
    given["degrees"] = params.drawn()["angle"].float()
    close(y, theirs(x, params=given))


def test_keras_zooms_out_and_repeats_the_edge(x: Tensor) -> None:
    _, params = run(RandomAffine(0, scale=(2.0, 2.0), compat="keras", seed=1), x)
    assert params.matrices[0].tolist()[0][0] == 2.0
    assert drawn(params, 0)["scale_x"] == 0.5
    stage = RandomRotation(5, compat="keras").stage
    assert stage.fill_mode == "symmetric"
    assert RandomRotation(5, fill_mode="nearest", compat="keras").stage.fill_mode == "border"
    assert RandomRotation(5, fill_mode="zeros", compat="kornia").stage.fill_mode == "constant"
    _, params = run(RandomRotation((10, 20), compat="keras", seed=1), x)
    assert float(params.drawn()["angle"].min()) >= 10, "counter-clockwise"


# --- by themselves ---


def test_one_image_is_a_batch_of_one(x: Tensor) -> None:
    transform = RandomRotation(45, "bilinear", seed=3)
    single = transform(x[0], sample_ids=[9])
    assert single.shape == (3, 19, 26)
    assert torch.equal(single, transform(x[:1], sample_ids=[9])[0])
    assert not torch.equal(transform(x[0]), transform(x[0])), "successive calls count on"


def test_seeds_come_from_torchs_generator(x: Tensor) -> None:
    torch.manual_seed(1)
    a, b = RandomRotation(45), RandomRotation(45)
    torch.manual_seed(1)
    again = RandomRotation(45)
    assert a.seed == again.seed != b.seed
    assert torch.equal(a(x), again(x))


def test_erasing(x: Tensor) -> None:
    y, params = run(RandomErasing(1.0, value=[1.0, 2.0, 3.0], seed=8), x)
    for i, (x0, y0, x1, y1) in enumerate(params.erase_boxes.tolist()):
        want = x[i].clone()
        want[:, y0:y1, x0:x1] = torch.tensor([1.0, 2, 3])[:, None, None]
        assert x1 > x0
        assert torch.equal(y[i], want)
    big = torch.zeros(4, 3, 64, 64)
    y, params = run(RandomErasing(1.0, (0.5, 0.6), (1, 1), value="random"), big)
    noise = torch.cat(
        [y[i, :, y0:y1, x0:x1].flatten() for i, (x0, y0, x1, y1) in enumerate(params.erase_boxes)]
    )
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.03


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_mixing(x: Tensor, kind: type[MixUp] | type[CutMix]) -> None:
    transform = kind(alpha=1.0, num_classes=6, seed=9)
    y, soft = transform(x, torch.arange(6), sample_ids=IDS)
    (params,) = transform.sample_params(6, input_size=(19, 26), sample_ids=IDS)
    for i, j in enumerate(params.partners.tolist()):
        weight = float(params.weights[i])
        if kind is MixUp:
            want = weight * x[i] + (1 - weight) * x[j]
        else:
            x0, y0, x1, y1 = params.mix_boxes[i].tolist()
            want = x[i].clone()
            want[:, y0:y1, x0:x1] = x[j, :, y0:y1, x0:x1]
        torch.testing.assert_close(y[i], want)
        expected = torch.zeros(6)
        expected[i] += weight
        expected[j] += 1 - weight
        torch.testing.assert_close(soft[i], expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomRotation(10, expand=True, center=(1, 1)), "expand turns about the image's"),
        (lambda: RandomRotation(10, "lanczos"), "RandomRotation: interpolation must be one of"),
        (lambda: RandomRotation(10, center=[1]), r"RandomRotation: center must be \(x, y\)"),
        (lambda: RandomAffine(1, scale=(0, 1)), r"RandomAffine: scale must be within \(0, inf\]"),
        (lambda: RandomCrop(3, padding=(1, 2, 3)), "RandomCrop: padding must be 1, 2 or 4 numbers"),
        (lambda: RandomCrop(3, padding=-1), "RandomCrop: padding must be 1, 2 or 4 numbers"),
        (lambda: RandomCrop(3, padding_mode="wrong"), "RandomCrop: padding_mode must be one of"),
        (lambda: RandomCrop(9)(torch.zeros(1, 1, 8, 9)), r"RandomCrop: size \(9, 9\) is larger"),
        (lambda: RandomResizedCrop(3, ratio=(0, 1)), r"RandomResizedCrop: ratio must be within"),
        (lambda: Normalize(0, 0), "Normalize: std must be positive"),
        (lambda: Normalize(0, 1, inplace=True), "Normalize: inplace must be False"),
        (lambda: Normalize([0, 1], 1)(torch.zeros(1, 3, 2, 2)), "Normalize: mean must have 1 or 3"),
        (lambda: RandomErasing(2), r"Erase: p must be within \[0, 1\]"),
        (lambda: MixUp(alpha=0), "Mix: mixup or cutmix must be positive"),
        (lambda: RandomHorizontalFlip(2), "RandomHorizontalFlip: p must be within"),
        (lambda: RandomRotation(3)(torch.zeros(2, 2)), r"x must have 4 dimensions \(N, C, H, W\)"),
        (
            lambda: RandomRotation(3)(torch.zeros(1, 1, 2, 2).int()),
            "x has dtype torch.int32; wanted uint8",
        ),
    ],
)
def test_bad_arguments(make: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        make()
