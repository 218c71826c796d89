"""What fusereg draws has the distribution of what torchvision and timm draw.

Samples of both are compared: whole numbers and choices by the chi-squared test of two rows of
counts, other numbers by that of Kolmogorov and Smirnov. Seeds are fixed; of random ones, a
comparison would fail by chance alone once in a million times.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from augment_peers import torchvision_module
from fusereg.augment import AugmentParams, Compose, ProgramParams, TimmAugment, recipes
from fusereg.augment import program as P

ALARM = 1e-6
MANY = 4000
H, W = 60, 80


def v2() -> Any:
    return torchvision_module("torchvision.transforms.v2")


def image() -> Tensor:
    return torch.zeros(3, H, W, dtype=torch.uint8)


def assert_alike(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """The largest distance of two samples' distribution functions."""
    a, b = (torch.tensor(v, dtype=torch.float64).sort().values for v in (ours, theirs))
    at = torch.cat([a, b])
    distance = (
        (
            torch.searchsorted(a, at, right=True) / len(a)
            - torch.searchsorted(b, at, right=True) / len(b)
        )
        .abs()
        .max()
    )
    size = len(a) * len(b) / (len(a) + len(b))
    assert float(distance) < math.sqrt(math.log(2 / ALARM) / 2 / size), (name, float(distance))


def assert_counted_alike(name: str, ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> None:
    """The chi-squared test of homogeneity; what is rare is one class together."""
    counts = [Counter(ours), Counter(theirs)]
    both = counts[0] + counts[1]
    rare = {k for k, n in both.items() if n < 20}
    rows = [[c[k] for k in both if k not in rare] for c in counts]
    if sum(both[k] for k in rare) >= 20:
        rows = [[*r, sum(c[k] for k in rare)] for r, c in zip(rows, counts, strict=True)]
    table = torch.tensor(rows, dtype=torch.float64)
    assert len(rare) < len(both), (name, "too few of each")
    if table.shape[1] == 1:
        return  # almost always the same, of both
    expected = table.sum(0) * table.sum(1, keepdim=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    half = torch.tensor((table.shape[1] - 1) / 2, dtype=torch.float64)
    chance = float(torch.special.gammaincc(half, statistic / 2))
    assert chance > ALARM, (name, chance, table)


def ours(transform: Any, n: int = MANY, size: tuple[int, int] = (H, W)) -> AugmentParams:
    (params,) = Compose([transform], seed=7).sample_params(n, input_size=size)
    assert isinstance(params, AugmentParams)
    return params


def theirs(transform: Any, n: int = MANY, x: Tensor | None = None) -> list[dict[str, Any]]:
    """What torchvision's own transform draws."""
    torch.manual_seed(3)
    x = image() if x is None else x
    return [transform.make_params([x]) for _ in range(n)]


# --- geometry ---


@pytest.mark.parametrize("arguments", [{}, {"scale": (0.3, 0.9), "ratio": (0.5, 3.0)}])
def test_resized_crops(arguments: dict[str, Any]) -> None:
    crop = v2().RandomResizedCrop(24, **arguments)
    drawn = {k: v.long() for k, v in ours(crop).drawn().items() if k.startswith("window")}
    rows = theirs(crop)
    width, height = (drawn[f"window_{k}1"] - drawn[f"window_{k}0"] for k in "xy")
    for name, own in (
        ("width", width),
        ("height", height),
        ("left", drawn["window_x0"]),
        ("top", drawn["window_y0"]),
    ):
        assert_counted_alike(name, own.tolist(), [r[name] for r in rows])
    assert_alike("area", (width * height).tolist(), [r["width"] * r["height"] for r in rows])
    assert_alike("ratio", (width / height).tolist(), [r["width"] / r["height"] for r in rows])


@pytest.mark.parametrize("padding", [None, [3, 5, 7, 1]])
def test_crops(padding: Any) -> None:
    crop = v2().RandomCrop((50, 61), padding=padding)
    drawn, rows = ours(crop).drawn(), theirs(crop)
    left, top = (0, 0) if padding is None else padding[:2]
    x = [int(v) + left for v in drawn["window_x0"]]
    y = [int(v) + top for v in drawn["window_y0"]]
    assert_counted_alike("left", x, [r["left"] for r in rows])
    assert_counted_alike("top", y, [r["top"] for r in rows])


def test_flips_are_done_as_often() -> None:
    x = torch.arange(4).reshape(1, 2, 2).to(torch.uint8)
    torch.manual_seed(0)
    for flip in (v2().RandomHorizontalFlip(0.3), v2().RandomVerticalFlip(0.8)):
        y = Compose([flip], seed=2)(x.expand(MANY, 1, 2, 2))
        peers = [flip(x) for _ in range(MANY)]
        assert_counted_alike("flipped", y[:, 0, 0, 0].tolist(), [int(p[0, 0, 0]) for p in peers])


def test_rotations_and_affine_maps() -> None:
    turn = v2().RandomRotation((-20, 35))
    angles = [r["angle"] for r in theirs(turn)]
    assert_alike("angle", ours(turn).drawn()["angle"].tolist(), angles)
    affine = v2().RandomAffine(25, translate=(0.1, 0.3), scale=(0.8, 1.3), shear=(-9, 4, 2, 12))
    drawn, rows = ours(affine).drawn(), theirs(affine)
    assert_alike("scale", drawn["scale_x"].tolist(), [r["scale"] for r in rows])
    # Clockwise there.
    assert_alike("angle", drawn["angle"].tolist(), [-r["angle"] for r in rows])
    for i, axis in enumerate("xy"):
        moves = drawn[f"translate_{axis}"].round().long().tolist()
        assert_counted_alike("translate", moves, [int(r["translate"][i]) for r in rows])
        assert_alike("shear", drawn[f"shear_{axis}"].abs().tolist(),
                     [abs(r["shear"][i]) for r in rows])  # fmt: skip


def test_short_sides() -> None:
    resize = v2().RandomResize(30, 75)
    (params,) = Compose([resize, v2().CenterCrop(20)], seed=1).sample_params(
        MANY, input_size=(H, W)
    )
    sides = (H / params.matrices[:, 1, 1]).round().long().tolist()  # type: ignore[union-attr]
    assert_counted_alike("side", sides, [r["size"][0] for r in theirs(resize)])


def test_the_comparisons_see_other_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    same, other = (torch.rand(MANY, generator=generator) for _ in range(2))
    assert_alike("the same", same.tolist(), other.tolist())
    for wrong in (other * 1.1, other**1.3, other + 0.1, torch.where(other < 0.08, 0.5, other)):
        with pytest.raises(AssertionError):
            assert_alike("another", same.tolist(), wrong.tolist())
    assert_counted_alike("the same", (same < 0.5).tolist(), (other < 0.5).tolist())
    for share in (0.42, 0.58):
        with pytest.raises(AssertionError):
            assert_counted_alike("another", (same < 0.5).tolist(), (other < share).tolist())
    # One of 14 operations that is drawn half as often.
    numbers = (other * 14).long()
    rarer = torch.where((numbers == 5) & (same < 0.5), 6, numbers).tolist()
    with pytest.raises(AssertionError):
        assert_counted_alike("another", (same * 14).long().tolist(), rarer)


# --- erasing and mixing ---


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_erased_boxes(p: float) -> None:
    erasing = v2().RandomErasing(p)
    boxes = ours(erasing).erase_boxes
    erased = boxes[:, 2] > boxes[:, 0]
    torch.manual_seed(1)
    done = [float(torch.rand(1)) < p for _ in range(MANY)]
    peers = [r for r, go in zip(theirs(erasing), done, strict=True) if go and r["v"] is not None]
    if p < 1:
        assert_counted_alike("erased", erased.tolist(), done)
    x0, y0, x1, y1 = boxes[erased].unbind(1)
    for name, own, key in (
        *(("left", x0, "j"), ("top", y0, "i"), ("width", x1 - x0, "w"), ("height", y1 - y0, "h")),
    ):
        assert_counted_alike(name, own.tolist(), [r[key] for r in peers])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixing(alpha: float) -> None:
    x = torch.zeros(4, 3, H, W)

    def peers(transform: Any) -> list[dict[str, Any]]:
        torch.manual_seed(2)
        return [transform.make_params([x]) for _ in range(MANY)]

    mix = v2().MixUp(alpha=alpha, num_classes=4)
    weights = ours(mix).weights.tolist()
    assert_alike("weight of MixUp", weights, [r["lam"] for r in peers(mix)])
    cut = v2().CutMix(alpha=alpha, num_classes=4)
    params, rows = ours(cut), peers(cut)
    boxes = [r["box"] for r in rows]
    x0, y0, x1, y1 = params.mix_boxes.unbind(1)
    there = (x1 > x0) & (y1 > y0)
    some = [(b[2] > b[0]) and (b[3] > b[1]) for b in boxes]
    assert abs(float(there.double().mean()) - sum(some) / MANY) < 0.03
    kept = [b for b, s in zip(boxes, some, strict=True) if s]
    for i, own in enumerate((x0, y0, x1, y1)):
        assert_counted_alike("box", own[there].tolist(), [int(b[i]) for b in kept])
    assert_alike("weight of CutMix", params.weights[there].tolist(),
                 [r["lam_adjusted"] for r, s in zip(rows, some, strict=True) if s])  # fmt: skip


def test_a_choice_of_mixes() -> None:
    chain = recipes.torchvision_classification(24, mixup=0.2, cutmix=1.0)
    (params,) = chain.sample_params(MANY, input_size=(H, W))
    cut = (params.records[:, 15] == 0).tolist()  # type: ignore[union-attr]
    torch.manual_seed(0)
    assert_counted_alike("CutMix", cut, [bool(torch.multinomial(torch.ones(2), 1)) for _ in cut])


@pytest.mark.parametrize("count", [1, 4])
def test_timms_erasing_has_timms_counts_areas_and_colors(count: int) -> None:
    """In a recipe it is timm's own, called under the sample's numbers, or ours of one box."""
    timm = pytest.importorskip("timm.data.random_erasing")
    n, side = 1000, 32
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (recipes.IMAGENET_MEAN, recipes.IMAGENET_STD)
    )
    white = (1 - mean) / std
    for mode in ("const", "rand", "pixel"):
        chain = recipes.timm_imagenet(None, side, reprob=0.6, remode=mode, recount=count, seed=3)
        x = torch.full((n, 3, side, side), 255, dtype=torch.uint8)
        own = chain(x, sample_ids=range(n))
        erase = timm.RandomErasing(0.6, mode=mode, max_count=count, device="cpu")
        random.seed(5)
        torch.manual_seed(5)
        peers = torch.stack([erase(white.expand(-1, side, side).clone()) for _ in range(n)])
        places = [((y - white).abs() > 1e-3).any(1) for y in (own, peers)]
        a, b = (p.flatten(1).sum(1) for p in places)
        assert_counted_alike("erased", (a > 0).tolist(), (b > 0).tolist())
        assert_alike("area", a[a > 0].tolist(), b[b > 0].tolist())
        # What is there: zero, a color for each box, or noise.
        levels = [
            [len(y[i][:, p[i]].flatten().unique()) for i in range(n) if bool(p[i].any())]
            for y, p in zip((own, peers), places, strict=True)
        ]
        if mode == "pixel":
            assert min(levels[0]) > 9
        else:
            assert_counted_alike("levels", *levels)
        if mode != "const":
            values = [
                y.movedim(1, 3)[p].flatten().tolist()
                for y, p in zip((own, peers), places, strict=True)
            ]
            spread = torch.tensor(values[0]).std()
            assert 0.8 < float(spread) < 1.2
            assert abs(float(spread) - float(torch.tensor(values[1]).std())) < 0.15


# --- colors and policies ---


def programs(transform: Any, n: int = MANY) -> list[list[list[float]]]:
    (params,) = Compose([transform], seed=11).sample_params(n, input_size=(H, W))
    assert isinstance(params, ProgramParams)
    return params.programs.tolist()


#: What a policy of torchvision calls, and the instruction that fusereg has for it.
CODES = {
    "Identity": P.IDENTITY, "Brightness": P.BRIGHTNESS, "Color": P.SATURATION,
    "Contrast": P.CONTRAST, "Sharpness": P.SHARPNESS, "Posterize": P.POSTERIZE,
    "Solarize": P.SOLARIZE, "AutoContrast": P.AUTOCONTRAST, "Equalize": P.EQUALIZE,
    "Invert": P.INVERT, "ShearX": P.WARP, "ShearY": P.WARP, "TranslateX": P.WARP,
    "TranslateY": P.WARP, "Rotate": P.WARP,
}  # fmt: skip
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")


@pytest.mark.parametrize(
    "make",
    [
        lambda: v2().RandAugment(2, 12),
        lambda: v2().TrivialAugmentWide(),
        lambda: v2().AutoAugment(),
        lambda: v2().AutoAugment(v2().AutoAugmentPolicy.CIFAR10),
        lambda: v2().AutoAugment(v2().AutoAugmentPolicy.SVHN),
    ],
)
def test_policies(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make()
    called: list[tuple[str, float]] = []

    def note(_: Any, x: Any, name: str, magnitude: float, *more: Any, **other: Any) -> Any:
        called.append((name, float(magnitude)))
        return x

    monkeypatch.setattr(type(policy), "_apply_image_or_video_transform", note)
    torch.manual_seed(4)
    small = torch.zeros(3, H, W, dtype=torch.uint8)
    peers = []
    for _ in range(MANY):
        called.clear()
        policy(small)
        peers.append(list(called))
    rows = programs(make())
    codes = [tuple(int(r[0]) for r in program if r[0] != P.IDENTITY) for program in rows]
    want = [tuple(CODES[n] for n, _ in p if CODES[n] != P.IDENTITY) for p in peers]
    assert_counted_alike("first operation", [c[:1] for c in codes], [c[:1] for c in want])
    assert_counted_alike("number of operations", [len(c) for c in codes], [len(c) for c in want])
    assert_counted_alike("operations", codes, want)
    for name in (*FACTORS, "Posterize", "Solarize"):
        own = [r[1] for program in rows for r in program if r[0] == CODES[name]]
        other = [m for p in peers for n, m in p if n == name]
        if not other:
            assert not own, name
        elif name == "Posterize":
            assert_counted_alike(name, own, other)
        else:
            shift, scale = (1, 1) if name in FACTORS else (0, 255)
            exact = [[round(v, 3) for v in own], [round(shift + scale * v, 3) for v in other]]
            assert_alike(name, *exact)


def test_blurs_grays_and_probabilities() -> None:
    blur = v2().GaussianBlur(5, (0.1, 2.0))
    own = [rows[0][3] for rows in programs(blur)]
    assert_alike("sigma", own, [r["sigma"][0] for r in theirs(blur)])
    jitter = v2().RandomApply([v2().ColorJitter(0.4, hue=0.2)], p=0.3)
    for transform, p in (
        (v2().RandomGrayscale(0.2), 0.2),
        (jitter, 0.3),
        (v2().RandomInvert(0.7), 0.7),
        (v2().RandomAdjustSharpness(2, 0.4), 0.4),
        (v2().RandomAutocontrast(0.5), 0.5),
        (v2().RandomEqualize(0.6), 0.6),
        (v2().RandomPosterize(4, 0.1), 0.1),
        (v2().RandomSolarize(9, 0.9), 0.9),
    ):
        done = [any(r[0] != P.IDENTITY for r in rows) for rows in programs(transform)]
        torch.manual_seed(6)
        assert_counted_alike(type(transform).__name__, done,
                             [float(torch.rand(1)) < p for _ in range(MANY)])  # fmt: skip
    both = v2().ColorJitter(0.4, (0.2, 3.0), 0.6, 0.3)
    rows = programs(both)
    peers = theirs(both)
    for code, key in (
        *((P.BRIGHTNESS, "brightness_factor"), (P.CONTRAST, "contrast_factor")),
        *((P.SATURATION, "saturation_factor"), (P.HUE, "hue_factor")),
    ):
        own = [r[1] for program in rows for r in program if r[0] == code]
        assert_alike(key, own, [float(r[key]) for r in peers])
    order = {P.BRIGHTNESS: 0, P.CONTRAST: 1, P.SATURATION: 2, P.HUE: 3}
    assert_counted_alike("order", [tuple(order[int(r[0])] for r in p) for p in rows],
                         [tuple(r["fn_idx"].tolist()) for r in peers])  # fmt: skip


@pytest.mark.parametrize("config", ["rand-m9-mstd0.5-inc1", "rand-m4-n3-mstd2-p0.8", "original"])
def test_timms_policies(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its operations are, and the levels of those that blend."""
    auto = pytest.importorskip("timm.data.auto_augment")
    pil = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    random.seed(1)
    numpy.random.seed(1)
    called: list[tuple[str, Any]] = []
    codes = {
        "auto_contrast": P.AUTOCONTRAST, "equalize": P.EQUALIZE, "invert": P.INVERT,
        "rotate": P.WARP, "posterize": P.POSTERIZE, "solarize": P.SOLARIZE,
        "solarize_add": P.SOLARIZE_ADD, "color": P.SATURATION, "contrast": P.CONTRAST,
        "brightness": P.BRIGHTNESS, "sharpness": P.SHARPNESS, "shear_x": P.WARP,
        "shear_y": P.WARP, "translate_x_rel": P.WARP, "translate_y_rel": P.WARP,
        "translate_x_abs": P.WARP, "translate_y_abs": P.WARP,
    }  # fmt: skip
    for key, function in list(auto.NAME_TO_OP.items()):
        name = function.__name__

        def noted(image: Any, *a: Any, _name: str = name, **_: Any) -> Any:
            called.append((_name, a[0] if a else None))
            return image

        monkeypatch.setitem(auto.NAME_TO_OP, key, noted)
    make = auto.auto_augment_transform if config == "original" else auto.rand_augment_transform
    policy = make(config, {"img_mean": (9, 9, 9)})
    small = pil.new("RGB", (8, 8))
    peers = []
    for _ in range(MANY):
        called.clear()
        policy(small)
        peers.append(list(called))
    rows = [[r for r in program if r[0] != P.IDENTITY] for program in
            programs(TimmAugment(config))]  # fmt: skip
    assert_counted_alike("operations", [tuple(int(r[0]) for r in p) for p in rows],
                         [tuple(codes[n] for n, _ in p) for p in peers])  # fmt: skip
    for name in ("color", "contrast", "brightness", "sharpness"):
        own = [r[1] for p in rows for r in p if r[0] == codes[name]]
        other = [a for p in peers for n, a in p if n == name]
        assert bool(own) == bool(other), name
        if own:
            assert_alike(name, own, other)
    # Posterizing keeps at least one bit, where timm asks for none at level 10.
    bits = [max(1, a) for p in peers for n, a in p if n == "posterize"]
    kept = [int(r[1]) for p in rows for r in p if r[0] == P.POSTERIZE]
    assert min(kept) >= 1
    assert_counted_alike("bits", kept, bits)
