"""Programs of single images: color jitter and policies give what torchvision gives, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import other_libraries  # noqa: F401
from fusereg import _C
from fusereg.augment import (
    ColorJitter,
    Compose,
    ProgramParams,
)
from fusereg.augment import program as P

v2 = pytest.importorskip("torchvision.transforms.v2")
datasets = pytest.importorskip("sklearn.datasets")
F = v2.functional


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Real photographs, one of them with few levels, of odd sides."""
    china = torch.from_numpy(datasets.load_sample_image("china.jpg").copy())
    flower = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy())
    crops = [china[:121, :149], flower[150:271, 200:349], china[250:371, 300:449] // 3 + 90]
    return torch.stack([c.permute(2, 0, 1).contiguous() for c in crops])


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def run(x: Tensor, *rows: P.Row, **more: Any) -> Tensor:
    """The images after the same instructions."""
    full = [[*map(float, row)] + [0.0] * (8 - len(row)) for row in rows]
    programs = torch.tensor(full, dtype=torch.float64).expand(len(x), -1, -1).contiguous()
    params = ProgramParams(programs, torch.arange(len(x)))
    return P.Program((), **more).run(x, params, "test", None)


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([function(image) for image in x])


_FACTORS = [0.0, 0.3, 0.7312345, 1.0, 1.27, 1.99, 3.5]
_CASES: dict[str, tuple[int, Callable[..., Tensor], list[tuple[float, ...]]]] = {
    "brightness": (P.BRIGHTNESS, F.adjust_brightness, [(f,) for f in _FACTORS]),
    "contrast": (P.CONTRAST, F.adjust_contrast, [(f,) for f in _FACTORS]),
    "saturation": (P.SATURATION, F.adjust_saturation, [(f,) for f in _FACTORS]),
    "hue": (P.HUE, F.adjust_hue, [(h,) for h in (-0.5, -0.31, -0.02, 0.0, 0.1, 0.25, 0.5)]),
    "gray": (P.GRAY, lambda x: F.rgb_to_grayscale(x, 3), [()]),
    "invert": (P.INVERT, F.invert, [()]),
    "posterize": (P.POSTERIZE, lambda x, b: F.posterize(x, int(b)), [(b,) for b in range(9)]),
    "solarize": (P.SOLARIZE, F.solarize, [(t,) for t in (0, 76.5, 128, 178.5, 255)]),
    "autocontrast": (P.AUTOCONTRAST, F.autocontrast, [()]),
    "equalize": (P.EQUALIZE, F.equalize, [()]),
    "sharpness": (P.SHARPNESS, F.adjust_sharpness, [(f,) for f in _FACTORS]),
}


@pytest.mark.parametrize("name", _CASES)
def test_each_operation_is_that_of_torchvision_bit_for_bit(
    name: str, photos: Tensor, isa: str
) -> None:
    code, function, cases = _CASES[name]
    flat = torch.full_like(photos[:1], 77)
    x = torch.cat([photos, flat, torch.randint(0, 256, photos[:1].shape, dtype=torch.uint8)])
    for arguments in cases:
        expected = each(lambda image, a=arguments: function(image, *a), x)
        came = run(x, (code, *arguments))
        assert torch.equal(came, expected), (arguments, (came != expected).float().mean())
        last = run(x.contiguous(memory_format=torch.channels_last), (code, *arguments))
        assert torch.equal(last, expected)
        assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", _CASES)
def test_images_of_one_channel_are_those_of_torchvision(name: str, photos: Tensor) -> None:
    code, function, cases = _CASES[name]
    x = photos[:, :1].contiguous()
    for arguments in cases if name != "gray" else []:
        assert torch.equal(
            run(x, (code, *arguments)),
            each(lambda image, a=arguments: function(image, *a), x),
        )


@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (3, 3), (4, 67), (65, 66)])
def test_small_and_odd_images_are_those_of_torchvision(sides: tuple[int, int], isa: str) -> None:
    x = torch.randint(0, 256, (2, 3, *sides), dtype=torch.uint8)
    for name, (code, function, cases) in _CASES.items():
        arguments = cases[len(cases) // 2]
        expected = each(lambda image, a=arguments, f=function: f(image, *a), x)
        assert torch.equal(run(x, (code, *arguments)), expected), name


def test_hue_of_every_kind_of_color_is_that_of_torchvision(isa: str) -> None:
    steps = torch.arange(0, 256, 3)
    grid = torch.cartesian_prod(steps, steps, steps).t().to(torch.uint8)
    x = grid.reshape(1, 3, len(steps) ** 2, len(steps)).contiguous()
    for h in (-0.37, 1 / 6):
        assert torch.equal(run(x, (P.HUE, h)), F.adjust_hue(x, h))
    assert torch.equal(run(x, (P.GRAY,)), F.rgb_to_grayscale(x, 3))


@pytest.mark.parametrize("size, sigma", [((3, 3), 0.5), ((5, 23), 1.7), ((23, 23), 2.0)])
def test_blur_is_that_of_torchvision_within_a_level(
    size: tuple[int, int], sigma: float, photos: Tensor, isa: str
) -> None:
    came = run(photos, (P.BLUR, *size, sigma, sigma)).int()
    difference = (came - F.gaussian_blur(photos, list(size), [sigma] * 2).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


_SOME = [
    (P.POSTERIZE, 5.0),
    (P.EQUALIZE,),
    (P.BRIGHTNESS, 0.8),
    (P.AUTOCONTRAST,),
    (P.CONTRAST, 1.3),
    (P.SOLARIZE, 140.0),
    (P.HUE, 0.2),
    (P.INVERT,),
    (P.SHARPNESS, 1.6),
    (P.SATURATION, 0.4),
]


def test_instructions_in_turn_are_functions_in_turn_in_any_order(photos: Tensor, isa: str) -> None:
    functions = {code: function for code, function, _ in _CASES.values()}
    order = random.Random(0)
    for _ in range(12):
        rows = order.sample(_SOME, 6)
        expected = photos
        for code, *arguments in rows:
            expected = each(lambda i, f=functions[code], a=arguments: f(i, *a), expected)
        assert torch.equal(run(photos, *rows), expected), rows


def test_solarize_add_is_that_of_timm() -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = torch.where(x < 128, (x.int() + 110).clamp(max=255), x.int()).to(torch.uint8)
    assert torch.equal(run(x, (P.SOLARIZE_ADD, 110, 128)), expected)


# --- draws in torchvision's order ---


class Torch:
    """torch for a module of torchvision, with given random numbers."""

    def __init__(self, numbers: P.Numbers) -> None:
        self.numbers = numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def rand(self, *_: Any) -> Tensor:
        return torch.tensor(self.numbers.uniform(), dtype=torch.float64)

    def randint(self, count: int, _: Any) -> Tensor:
        return torch.tensor(self.numbers.below(count))

    def randperm(self, count: int) -> Tensor:
        places = [self.numbers.uniform() for _ in range(count)]
        return torch.tensor(sorted(range(count), key=places.__getitem__))


def numbers_of(seed: int, sample: int, columns: int, occurrence: int = 0) -> P.Numbers:
    values = torch.empty(1, columns, dtype=torch.float64)
    ids = torch.tensor([sample])
    _C.augment_numbers(values, ids, seed, 0, occurrence, columns, 0, "test")
    return P.Numbers(values[0].tolist(), 0)


def by_torchvision(
    transform: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch, seed: int, columns: int
) -> Tensor:
    """What torchvision's own transform gives of each image with the numbers of its id."""
    results = []
    module = __import__(type(transform).__module__, fromlist=["torch"])
    for i, image in enumerate(x):
        numbers = numbers_of(seed, i, columns)
        with monkeypatch.context() as patched:
            patched.setattr(module, "torch", Torch(numbers))
            results.append(transform(image))
    return torch.stack(results)


_POLICIES: dict[str, Callable[[], Any]] = {
    "RandAugment": lambda: v2.RandAugment(2, 9),
    "RandAugment of three, strong, filled": lambda: v2.RandAugment(3, 25, fill=[90, 20, 200]),
    "TrivialAugmentWide": lambda: v2.TrivialAugmentWide(),
    "AutoAugment, ImageNet": lambda: v2.AutoAugment(),
    "AutoAugment, CIFAR10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "AutoAugment, SVHN": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
}


@pytest.mark.parametrize("name", _POLICIES)
def test_policies_are_those_of_torchvision_with_the_same_numbers(
    name: str, photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = _POLICIES[name]()
    x = photos[:, :, :60, :75].repeat(20, 1, 1, 1)
    chain = Compose([transform], seed=3)
    assert str(chain.plan()) == type(transform).__name__ or str(chain.plan()).startswith("1. ")
    assert len(chain.plan().passes) == 1 and chain.plan().passes[0].called is None
    ids = list(range(len(x)))
    came = chain(x, sample_ids=ids)
    columns = chain.plan().passes[0].stages[0].policy.uniforms
    expected = by_torchvision(transform, x, monkeypatch, 3, columns)
    different = (came != expected).flatten(1).float().mean(1)
    assert different.max() < 2e-3, different  # a place at the middle between two pixels
    assert (different == 0).float().mean() > 0.9


def test_color_jitter_is_that_of_torchvision_with_the_same_numbers(
    photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    x = photos.repeat(6, 1, 1, 1)
    came = Compose([transform], seed=5)(x, sample_ids=list(range(len(x))))
    results = []
    for i, image in enumerate(x):
        numbers = numbers_of(5, i, 8)
        with monkeypatch.context() as patched:
            patched.setattr("torchvision.transforms.v2._color.torch", Torch(numbers))
            patched.setattr(v2.ColorJitter, "_generate_value", staticmethod(numbers.between))
            results.append(transform(image))
    assert torch.equal(came, torch.stack(results))
    own = Compose([ColorJitter(0.8, 0.8, 0.8, 0.2)], seed=5)(x, sample_ids=list(range(len(x))))
    assert torch.equal(own, came)
