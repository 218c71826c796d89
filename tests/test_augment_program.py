"""Programs of single images: color jitter and policies give what torchvision gives, bit for bit."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import other_libraries  # noqa: F401
from augment_peers import SOURCES, Torch, by_torchvision, numbers_of, photographs
from fusereg import _C
from fusereg.augment import (
    ColorJitter,
    Compose,
    Normalize,
    ProgramParams,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    TimmAugment,
    TrivialAugmentWide,
    policies,
)
from fusereg.augment import program as P

v2 = pytest.importorskip("torchvision.transforms.v2")
F = v2.functional


@pytest.fixture(scope="module", params=SOURCES)
def photos(request: pytest.FixtureRequest) -> Tensor:
    """Real photographs, one of them with few levels, of odd sides."""
    first, second, *_ = photographs(request.param)
    crops = [
        first[:, :121, :149],
        second[:, 150:271, 200:349],
        first[:, 250:371, 300:449] // 3 + 90,
    ]
    return torch.stack(crops)


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


@pytest.mark.parametrize(("size", "sigma"), [((3, 3), 0.5), ((5, 23), 1.7), ((23, 23), 2.0)])
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
    assert str(chain.plan()) == f"1. {type(transform).__name__}"
    ids = list(range(len(x)))
    came = chain(x, sample_ids=ids)
    columns = chain.plan().passes[0].stages[0].policy.uniforms
    expected = by_torchvision(transform, x, monkeypatch, 3, columns)
    different = (came != expected).flatten(1).float().mean(1)
    # Where a place is at the middle between two pixels, the rounding of torchvision's grid decides.
    assert different.max() < 0.1, different
    assert (different == 0).float().mean() > 0.85


def test_the_fill_of_floats_is_in_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = v2.RandAugment(3, 25, fill=[0.9, 0.2, 0.5])
    x = torch.full((40, 3, 60, 75), 0.3)
    chain = Compose([transform], seed=3)
    columns = chain.plan().passes[0].stages[0].policy.uniforms
    expected = by_torchvision(transform, x, monkeypatch, 3, columns)
    apart = (chain(x, sample_ids=range(40)) - expected).abs().flatten(1) > 1e-3
    assert apart.double().mean() < 0.02
    assert (~apart).all(1).float().mean() > 0.4


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


# --- timm's policies ---


@pytest.mark.parametrize(
    "config",
    [
        *("rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m15-mmax20-mstd101"),
        *("original", "original-mstd0.5", "originalr", "v0", "v0r"),
    ],
)
def test_timms_strings_are_timms_policies(config: str) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    make = timm.rand_augment_transform if config[0] == "r" else timm.auto_augment_transform
    (theirs,) = Compose([make(config, {"img_mean": (124, 116, 104)})]).plan().passes
    (ours,) = Compose([TimmAugment(config, fill=(124, 116, 104))]).plan().passes
    policies = [p.stages[0].policy for p in (theirs, ours)]
    a, b = ((p.rows.func, p.rows.args, p.codes, p.uniforms, p.normals) for p in policies)
    assert a == b
    assert theirs.stages[0].fill == ours.stages[0].fill
    assert theirs.stages[0].whole_pixels


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("rand-mstdinf-x3", "section 'x3'"),
        ("rand-m9.5", "must have an integer in the section 'm9.5'"),
        ("original-m3", "section 'm3'"),
        ("augmix-m3", "must begin with one of 'rand'"),
    ],
)
def test_what_timm_would_overlook_is_an_error(config: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TimmAugment(config)


def test_levels_mean_what_they_mean_in_timm(
    photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    image = pytest.importorskip("PIL.Image")
    x = photos[1, :, :60, :75].contiguous()
    pil = image.fromarray(x.permute(1, 2, 0).numpy())
    h, w = x.shape[1:]
    names = {*policies._RAND, *(n + "Increasing" for n in policies._WITH_INCREASING)}
    for sign in (1.0, -1.0):
        monkeypatch.setattr(timm, "_randomly_negate", lambda v, s=sign: s * v)
        numbers = P.Numbers([0.75 if sign > 0 else 0.25] * 99, 0)
        for name in sorted(names | {"PosterizeOriginal"}):
            for level in (0.0, 3.3, 9.0, 10.0):
                if name.startswith("Posterize") and level in (0.0, 10.0):
                    continue  # no bits, which Pillow refuses
                hparams = {"img_mean": (9, 9, 9), "interpolation": image.Resampling.BILINEAR}
                op = timm.AugmentOp(name, 1.0, level, hparams)
                data = torch.frombuffer(bytearray(op(pil).tobytes()), dtype=torch.uint8)
                theirs = data.reshape(h, w, 3).permute(2, 0, 1).int()
                row = policies._level_row(name, level, numbers, (h, w), 1.0)
                came = run(x[None], row, fill=(9.0,), whole_pixels=True)[0].int()
                more = (came - theirs).abs() > 1
                # The frame's last pixel depends on the rounding of its place.
                assert more.float().mean() < 0.01, (name, level, sign)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing"])
def test_posterizing_keeps_a_bit_where_timm_asks_for_none(name: str) -> None:
    """Which Pillow refuses since 13, and older ones made black."""
    auto = pytest.importorskip("timm.data.auto_augment")
    numbers = P.Numbers([0.5] * 9, 0)
    for level in (0.0, 1.0, 2.4, 2.6, 5.0, 9.0, 10.0):
        (bits,) = auto.LEVEL_TO_ARG[name](level, {})
        code, kept = policies._level_row(name, level, numbers, (9, 9), 1.0)[:2]
        assert (code, kept) == (P.POSTERIZE, max(1, bits)), level


@pytest.mark.parametrize("how", ["NEAREST", "BILINEAR", "BICUBIC"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_pixels_of_timms_policies_move_as_pil_moves_them(
    how: str, dtype: torch.dtype, photos: Tensor
) -> None:
    image = pytest.importorskip("PIL.Image")
    x = photos[0, :, :61, :80].contiguous()
    h, w = x.shape[1:]
    pil = image.fromarray(x.permute(1, 2, 0).numpy())
    code = float({"NEAREST": 0, "BILINEAR": 1, "BICUBIC": P.PIL_BICUBIC}[how])
    for a, b, c, d, e, f in (
        (0.9, 0.3, -4.3137, -0.2, 1.1, 3.7219),
        (1.0, 0.3, 0.1513, 0.0, 1.0, 0.0),
        (1.0, 0.0, 7.5, 0.0, 1.0, -3.25),
        (0.5, 0.0, 11.1, 0.0, 0.5, 9.3),
    ):
        # PIL counts from the corners of pixels.
        corner = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
        came = pil.transform(
            (w, h), image.Transform.AFFINE, corner, image.Resampling[how], fillcolor=(9, 99, 199)
        )
        data = torch.frombuffer(bytearray(came.tobytes()), dtype=torch.uint8)
        theirs = data.reshape(h, w, 3).permute(2, 0, 1).float()
        row = (P.WARP, a, b, c, d, e, f, code)
        given = x[None] if dtype is torch.uint8 else x[None] / 255
        mine = run(given, row, fill=(9.0, 99.0, 199.0), whole_pixels=True)[0].float()
        if dtype is torch.uint8:
            wrong = mine != theirs
            if how != "NEAREST":  # a value next to a whole number may be one level higher
                exact = run(x[None].double() / 255, row, fill=(9.0, 99.0, 199.0), whole_pixels=True)
                exact = exact[0] * 255
                wrong &= ((exact - exact.round()).abs() > 0.001) | (mine != theirs + 1)
            assert float(wrong.float().mean()) < 0.003  # a place on a pixel's edge
        else:
            far = ((mine * 255).clamp(0, 255) - theirs - 0.5).abs() > 0.51  # theirs are cut off
            far &= ((mine * 255) - theirs).abs() > 0.01
            assert float(far.float().mean()) < 0.006


# --- draws ---


def chi_squared(counts: list[int], expected: list[float]) -> float:
    """How often chance alone would be further from what is expected."""
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    half = torch.tensor((len(counts) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))


#: Of one false alarm in a million, if the seed were a random one.
ALARM = 1e-6
MANY = 6000


def drawn(transform: Any, size: tuple[int, int] = (224, 224)) -> list[list[list[float]]]:
    chain = Compose([transform], seed=11)
    (params,) = chain.sample_params(MANY, input_size=size, sample_ids=range(MANY))
    assert isinstance(params, ProgramParams)
    return params.programs.tolist()


def test_the_order_of_color_jitter_is_each_of_24_equally_often() -> None:
    programs = drawn(v2.ColorJitter(0.4, (0.7, 1.1), 0.2, 0.3))
    orders = Counter(tuple(int(row[0]) for row in rows) for rows in programs)
    assert len(orders) == 24
    assert chi_squared(list(orders.values()), [MANY / 24] * 24) > ALARM
    ranges = {P.BRIGHTNESS: (0.6, 1.4), P.CONTRAST: (0.7, 1.1)}
    ranges |= {P.SATURATION: (0.8, 1.2), P.HUE: (-0.3, 0.3)}
    for code, (low, high) in ranges.items():
        values = torch.tensor([row[1] for rows in programs for row in rows if row[0] == code])
        share = (values - low) / (high - low)
        counts = torch.histc(share, 16, 0, 1).int().tolist()
        assert sum(counts) == MANY
        assert chi_squared(counts, [MANY / 16] * 16) > ALARM, code


def test_operations_signs_and_bins_are_those_of_trivial_augment() -> None:
    programs = [rows[0] for rows in drawn(v2.TrivialAugmentWide())]
    codes = Counter(int(row[0]) for row in programs)
    expected = dict.fromkeys(codes, MANY / 14)
    expected[P.WARP] = MANY * 5 / 14
    assert len(codes) == 10
    assert chi_squared(list(codes.values()), list(expected.values())) > ALARM
    factors = [row[1] for row in programs if row[0] == P.BRIGHTNESS]
    signs = [sum(f < 1 for f in factors), sum(f > 1 for f in factors)]
    bins = Counter(round(abs(f - 1) / 0.033) for f in factors)
    assert chi_squared(signs, [sum(signs) / 2] * 2) > ALARM
    assert chi_squared([bins[i] for i in range(31)], [len(factors) / 31] * 31) > ALARM


def test_layers_and_levels_are_those_of_timm() -> None:
    programs = drawn(TimmAugment("rand-m5-mstd1.5-inc1"))
    lengths = Counter(sum(row[0] != P.IDENTITY for row in rows) for rows in programs)
    expected = [MANY / 4, MANY / 2, MANY / 4]
    assert chi_squared([lengths[i] for i in range(3)], expected) > ALARM
    rows = [row for rows in programs for row in rows if row[0] == P.BRIGHTNESS]
    levels = torch.tensor([abs(row[1] - 1) / 0.09 for row in rows], dtype=torch.float64)
    normal = (levels - 5) / 1.5
    theory = (1 + torch.special.erf(normal.sort().values / math.sqrt(2))) / 2
    steps = torch.arange(len(normal)) / len(normal)
    assert (theory - steps).abs().max() < math.sqrt(math.log(2 / ALARM) / 2 / len(normal)) + 0.01


# --- in a list ---


def test_a_list_of_a_recipe_has_its_programs_in_one_pass_and_the_plan_says_so() -> None:
    recipe = [
        v2.RandomResizedCrop(48),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5)], p=0.5),
        v2.RandomSolarize(128, p=0.2),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.25] * 3),
    ]
    chain = Compose(recipe, seed=2)
    names = [p.names for p in chain.plan().passes]
    assert names[0] == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert names[1] == ["RandomApply", "RandomGrayscale", "RandomApply", "RandomSolarize"]
    assert names[2] == ["ToDtype", "Normalize"]
    assert "RandomApply runs as a program of each image" in str(chain.plan())
    x = torch.randint(0, 256, (8, 3, 60, 70), dtype=torch.uint8)
    y = chain(x, sample_ids=range(8))
    assert y.dtype is torch.float32
    params = chain.sample_params(8, input_size=(60, 70), sample_ids=range(8))
    assert torch.equal(chain(x, params=params), y)
    # The programs are what the middle pass alone does.
    crops = Compose(recipe[:2], seed=2)(x, sample_ids=range(8))
    colors = Compose(recipe[2:6], seed=2)(crops, sample_ids=range(8))
    assert torch.equal(y, Compose(recipe[6:])(colors))


_AROUND: dict[str, list[Any]] = {
    "a crop, a policy and an end": [
        RandomResizedCrop(33),
        RandomHorizontalFlip(),
        TrivialAugmentWide(interpolation="bilinear"),
        Normalize(0.5, 0.25),
        RandomErasing(0.7, value="random"),
    ],
    "a turn, a policy in PIL's pixels": [
        RandomRotation(30, interpolation="bilinear"),
        TimmAugment("rand-m9-mstd0.5-inc1"),
    ],
    "a policy and an end that moves": [RandAugment(), RandomCrop(48), Normalize(0.5, 0.25)],
    "a crop that turns, filtered": [
        RandomResizedCrop(20),
        ColorJitter(0.4, 0.4, 0.4, 0.1),
        RandomRotation(30),
        RandAugment(),
    ],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", _AROUND)
def test_passes_around_a_program_have_the_bits_of_passes_alone(
    name: str, layout: torch.memory_format, photos: Tensor, isa: str, monkeypatch: Any
) -> None:
    """On the CPU a sample goes through all of them while it is in the cache."""
    tv = pytest.importorskip("torchvision.tv_tensors")
    x = photos.repeat(3, 1, 1, 1)[:, :, :60, :71].contiguous(memory_format=layout)
    mask = tv.Mask((x[:, 0] > 128).long())
    calls: list[tuple[Any, ...]] = []
    call = P.Program.run
    for out_layout in (None, torch.contiguous_format, torch.channels_last):
        chain = Compose(_AROUND[name], seed=3, memory_format=out_layout)
        calls.clear()

        def run(batch: Any, **more: Any) -> Any:
            return chain(batch, sample_ids=range(9), **more)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(P.Program, "joins", lambda *_: False)
            wanted, moved = run(x, targets=mask)
        with monkeypatch.context() as patch:
            patch.setattr(P.Program, "run", lambda *a: (calls.append(a), call(*a))[1])
            y, own = run(x, targets=mask)
        assert any(passes is not None for a in calls for passes in a[5:])
        assert len(calls) == sum(u.program is not None for u in chain._pipeline.units)
        assert torch.equal(y, wanted)
        assert y.stride() == wanted.stride()
        assert torch.equal(own, moved)
        out = torch.empty_like(wanted)
        assert run(x, out=out) is out
        assert torch.equal(out, wanted)
        params = chain.sample_params(9, input_size=(60, 71), sample_ids=range(9))
        assert torch.equal(chain(x, params=params), wanted)
        clips = x.unflatten(0, (9, 1)).expand(-1, 2, -1, -1, -1)
        assert torch.equal(run(clips)[:, 1], wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_instruction_sets_order_and_batch_change_nothing(
    threads: int, photos: Tensor, isa: str
) -> None:
    chain = Compose([TimmAugment("rand-m9-mstd0.5-inc1-p0.9"), ColorJitter(0.4, 0.4, 0.4, 0.1)])
    chain.seed = 7
    x = photos.repeat(4, 1, 1, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = chain(x, sample_ids=range(12))
        order = [7, 2, 11]
        assert torch.equal(chain(x[order], sample_ids=order), y[order])
    finally:
        torch.set_num_threads(before)
    _C.set_cpu_isa("baseline")
    assert torch.equal(chain(x, sample_ids=range(12)), y)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*_CASES, "blur"])
def test_floats_are_those_of_torchvision(name: str, channels: int, photos: Tensor) -> None:
    x = photos[:, :channels, :40, :50].contiguous().float() / 255
    code, function, cases = _CASES.get(name, (P.BLUR, F.gaussian_blur, [()]))
    for arguments in cases:
        if name == "gray" and channels == 1:
            continue
        row: tuple[float, ...] = (code, *arguments)
        if name == "blur":
            row = (code, 5, 3, 1.2, 0.7)
            expected = F.gaussian_blur(x, [5, 3], [1.2, 0.7])
        elif name == "solarize":
            row = (code, arguments[0] / 255, 1)
            expected = F.solarize(x, arguments[0] / 255)
        else:
            expected = each(lambda image, a=arguments: function(image, *a), x)
        assert torch.allclose(run(x, row), expected, atol=2e-6), arguments


def test_floats_have_the_same_draws(photos: Tensor) -> None:
    chain = Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), RandAugment()], seed=1)
    whole = chain(photos, sample_ids=range(3)).float() / 255
    floats = chain(photos.float() / 255, sample_ids=range(3))
    assert floats.dtype is torch.float32
    assert (whole - floats).abs().mean() < 0.05
    solarize = Compose([v2.RandomSolarize(0.5, p=1.0)])(photos.float() / 255)
    for chain in (
        [v2.RandomSolarize(128, p=1.0)],
        [v2.ToDtype(torch.float32, True), v2.RandomSolarize(2, p=1.0)],
    ):
        with pytest.raises(TypeError, match="threshold must be at most 1 for images of floats"):
            Compose(chain)(photos if len(chain) == 2 else photos.float() / 255)
    assert torch.equal(solarize, F.solarize(photos.float() / 255, 0.5))


def test_masks_boxes_and_points_move_with_a_policy(photos: Tensor) -> None:
    tv = pytest.importorskip("torchvision.tv_tensors")
    x = torch.zeros(12, 3, 80, 90, dtype=torch.uint8)
    x[:, :, 30:50, 20:70] = 255
    mask = tv.Mask((x[:, 0] > 0).long())
    transform = v2.AutoAugment()
    transform._policies = [(("Rotate", 1.0, 9), ("ShearX", 1.0, 7)), (("TranslateY", 1.0, 5),)]
    y, moved = Compose([transform], seed=4)(tv.Image(x), mask)
    assert isinstance(y, tv.Image)
    assert torch.equal(moved.as_subclass(Tensor), (y[:, 0] > 0).long().as_subclass(Tensor))
    assert not torch.equal(moved.as_subclass(Tensor), mask.as_subclass(Tensor))
    _, same = Compose([v2.ColorJitter(0.5)])(tv.Image(x), mask)
    assert torch.equal(same, mask)


def test_gray_of_one_channel_is_three_channels() -> None:
    x = torch.randint(0, 256, (4, 1, 9, 9), dtype=torch.uint8)
    y = Compose([v2.RandomInvert(1.0), v2.Grayscale(3), ColorJitter(0.4)])(x)
    assert y.shape == (4, 3, 9, 9)
    first = Compose([v2.Grayscale(3)])(x)
    assert torch.equal(first, F.rgb_to_grayscale(x, 3))
    color = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    assert torch.equal(Compose([v2.Grayscale(3)])(color), F.rgb_to_grayscale(color, 3))


def test_clips_have_one_program_and_images_of_pil_come_back() -> None:
    chain = Compose([RandAugment(), ColorJitter(0.4, hue=0.2)], seed=3)
    clip = torch.randint(0, 256, (2, 1, 3, 20, 24), dtype=torch.uint8).expand(-1, 4, -1, -1, -1)
    y = chain(clip)
    assert torch.equal(y, y[:, :1].expand_as(y))
    image = pytest.importorskip("PIL.Image").new("RGB", (24, 20), (9, 99, 199))
    assert chain(image).size == (24, 20)


def test_targets_of_the_result_are_kept(photos: Tensor) -> None:
    chain = Compose([ColorJitter(0.4)], seed=3, memory_format=torch.channels_last)
    y = chain(photos)
    assert y.is_contiguous(memory_format=torch.channels_last)
    floats = Compose([ColorJitter(0.4)], seed=3, out_dtype=torch.float32)(photos)
    assert torch.allclose(floats, y.float() / 255)
    out = torch.empty_like(photos)
    assert Compose([ColorJitter(0.4)], seed=3)(photos, out=out) is out
    assert Compose([RandAugment(), RandomHorizontalFlip()])(photos[:0]).shape == photos[:0].shape


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ColorJitter(hue=0.7), "hue"),
        (lambda: ColorJitter(-0.1), "brightness"),
        (lambda: RandAugment(2, 31), "magnitude one of at least 2 bins"),
        (lambda: TrivialAugmentWide(1), "num_magnitude_bins must be at least 2"),
        (lambda: TimmAugment("rand", interpolation="lanczos"), "interpolation"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


def test_images_that_no_instruction_fits_are_refused(photos: Tensor) -> None:
    with pytest.raises(ValueError, match="kernel_size must be less than twice"):
        Compose([v2.GaussianBlur(23)])(photos[:, :, :11])
    chain = Compose([ColorJitter(0.5), Normalize(0.5, 0.5)])
    params = chain.sample_params(3, input_size=(121, 149))
    with pytest.raises(ValueError, match="x must have 3 images as its parameters"):
        chain(photos[:2], params=params)
