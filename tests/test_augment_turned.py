"""Antialiased warps that turn or shear: the image is resized first, then interpolated at points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_reference as reference
from augment_peers import torchvision_module
from augment_reference import FILL_MODES, LAM, MIX, PARTNER
from conftest import Backend
from fusereg import augment as A
from fusereg.augment import Augment
from test_augment import ALL_DTYPES, FORMATS, images, numbers, run
from test_augment_recipes import photographs

HOW = ("bilinear", "bicubic")


def turns(
    n: int, image: tuple[int, int], size: tuple[int, int], zoom: float, shear: float = 0.2
) -> Tensor:
    """About the center, each sample further and with a larger image for each pixel."""
    (h, w), (ho, wo) = image, size
    matrices = []
    for i in range(n):
        angle = math.radians(23.0 * (i + 1))
        cos, sin = math.cos(angle), math.sin(angle)
        linear = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
        linear = linear @ torch.tensor([[1, shear * i], [0, 1]], dtype=torch.float64)
        linear = linear * zoom * (1 + 0.3 * i)
        center = torch.tensor([(w - 1) / 2, (h - 1) / 2], dtype=torch.float64)
        start = center - linear @ torch.tensor([(wo - 1) / 2, (ho - 1) / 2], dtype=torch.float64)
        matrices.append(torch.cat([linear, start[:, None]], 1))
    return torch.stack(matrices)


def one_after_the_other(x: Tensor, matrices: Tensor, size: tuple[int, int], **how: Any) -> Tensor:
    """Two calls for each image, the first of which moves nothing."""
    h, w = x.shape[2:]
    interpolation = how["interpolation"]
    results = []
    for image, m in zip(x.split(1), matrices, strict=True):
        extents = m[:, :2].square().sum(1).sqrt().tolist()
        sides = [
            min(side, max(1, math.floor(side / extent + 0.5)))
            for side, extent in zip((w, h), extents, strict=True)
        ]
        x_by, y_by = w / sides[0], h / sides[1]
        scales = [[x_by, 0.0, 0.5 * x_by - 0.5], [0.0, y_by, 0.5 * y_by - 0.5]]
        small = A.warp_affine(
            image, torch.tensor(scales, dtype=torch.float64), (sides[1], sides[0]),
            interpolation=interpolation, antialias=True,
        )  # fmt: skip
        shares = torch.tensor([[sides[0] / w], [sides[1] / h]], dtype=torch.float64)
        rest = m * shares
        rest[:, 2:] = torch.where(shares == 1, m[:, 2:], (m[:, 2:] + 0.5) * shares - 0.5)
        results.append(A.warp_affine(small, rest, size, **how))
    return torch.cat(results)


CASES = (((31, 37), 2.3), ((9, 50), 3.7), ((5, 4), 40.0), ((40, 33), 0.6), ((12, 12), 1.02))


@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize("interpolation", HOW)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_one_call_has_the_bits_of_resize_and_warp(
    dtype: torch.dtype, interpolation: str, fill_mode: str, backend: Backend
) -> None:
    """In every dtype and layout; downscaled by little and by much, in one axis, or not at all."""
    for c, layout in ((3, FORMATS[0]), (3, FORMATS[1]), (1, FORMATS[0]), (4, FORMATS[1])):
        if backend.on_host and c == 1:
            continue
        x = images((2, c, 26, 41), dtype, backend).contiguous(memory_format=layout)
        for size, zoom in CASES[2:3] if backend.on_host else CASES:
            matrices = turns(2, (26, 41), size, zoom)
            wide = torch.float32 if dtype is torch.uint8 else dtype
            how: Any = {
                "interpolation": interpolation, "fill_mode": fill_mode, "out_dtype": wide,
                "fill": 100.0 if dtype is torch.uint8 else 0.3,
            }  # fmt: skip
            y = A.warp_affine(x, matrices, size, antialias=True, **how)
            wanted = one_after_the_other(x, matrices, size, **how)
            if dtype is torch.float64:  # coverage by rounded extents
                assert float((y - wanted).abs().max()) <= 1e-13
            else:
                assert torch.equal(y, wanted)


@pytest.mark.parametrize("interpolation", HOW)
def test_against_torchs_resize(interpolation: str, backend: Backend) -> None:
    """The first step is torch's, to rounding; the second is that of the other tests' reference."""
    for dtype in (torch.float32, torch.uint8, torch.float64):
        x = images((2, 3, 26, 41), dtype, backend)
        for size, zoom in CASES:
            records = reference.identity_records(2, turns(2, (26, 41), size, zoom))
            values = numbers(3, dtype)
            y = run(x, records, size, interpolation, "reflect", antialias=True, **values)
            wanted = reference.augment(
                x, records, size=size, interpolation=interpolation, antialias=True,
                fill_mode="reflect", **values,
            )  # fmt: skip
            error = float((y.double().cpu() - wanted).abs().max())
            assert error <= (1e-12 if dtype is torch.float64 else 1e-5) * float(wanted.abs().max())


BOXES = ([18.0, 3.0, 30.0, 11.0], [0.0, 0.0, 37.0, 21.0], [5.0, 5.0, 5.0, 9.0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("partners", [[2, 3, 4, 5, 4, 5], [1, 0, 3, 2, 5, 4]], ids=str)
def test_partners_and_lists_have_the_same_bits(
    dtype: torch.dtype, partners: list[int], backend: Backend
) -> None:
    """Turned, axis-aligned, or filtered very widely; mixed with any, in a batch or a list."""
    n, size, before = 6, (21, 37), torch.get_num_threads()
    records = reference.identity_records(n, turns(n, (40, 57), size, 1.7))
    records[2:4, 1] = records[2:4, 3] = 0.0  # axis-aligned
    records[3, 0], records[3, 4] = 19.0, 14.5
    alone = records.clone()
    for box in BOXES[:1] if backend.on_host else BOXES:
        records[:, MIX : MIX + 4] = torch.tensor(box, dtype=torch.float64)
        records[:, PARTNER] = torch.tensor(partners, dtype=torch.float64)
        records[:, LAM] = 0.25
        inside = torch.zeros(size, dtype=torch.bool, device=backend.device)
        inside[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        for layout in FORMATS:
            x = images((n, 3, 40, 57), dtype, backend).contiguous(memory_format=layout)
            try:
                torch.set_num_threads(1)
                own = run(x, alone, size, antialias=True)
                both = own * 0.25 + own[partners] * 0.75
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    y = run(x, records, size, antialias=True)
                    assert torch.equal(y, torch.where(inside, both, own))
                    if x.is_cpu:  # lists have no kernel elsewhere
                        several = run(x, records, size, antialias=True, several=list(x.split(1)))
                        assert torch.equal(y, several)
            finally:
                torch.set_num_threads(before)


def test_any_part_of_a_large_image() -> None:
    """What a thread filters is what its rows read, and no thread's is another's."""
    before = torch.get_num_threads()
    x = images((1, 3, 150, 210), torch.uint8)
    try:
        for degrees in (0.3, 44.0, 90.0, 135.0, 181.0):
            for at in ((-0.4, 0.3), (0.2, 0.2), (0.9, 1.2), (3.0, 3.0)):
                angle = math.radians(degrees)
                cos, sin = 1.9 * math.cos(angle), 1.9 * math.sin(angle)
                m = torch.tensor(
                    [[cos, sin, 210 * at[0]], [-sin, cos, 150 * at[1]]], dtype=torch.float64
                )
                for fill_mode in FILL_MODES:
                    for interpolation in HOW:
                        results = []
                        for threads in (1, 2, 5):
                            torch.set_num_threads(threads)
                            results.append(
                                A.warp_affine(
                                    x, m, (97, 83), antialias=True, interpolation=interpolation,
                                    fill_mode=fill_mode, fill=7.0, out_dtype=torch.float32,
                                )
                            )  # fmt: skip
                        how: Any = {
                            "interpolation": interpolation, "fill_mode": fill_mode, "fill": 7.0,
                            "out_dtype": torch.float32,
                        }  # fmt: skip
                        wanted = one_after_the_other(x, m[None], (97, 83), **how)
                        assert all(torch.equal(y, wanted) for y in results)
    finally:
        torch.set_num_threads(before)


def test_gradient_is_the_transpose(backend: Backend) -> None:
    for interpolation in HOW:
        for fill_mode in FILL_MODES:
            x = torch.rand(2, 2, 9, 13, dtype=torch.float64, device=backend.device)
            x.requires_grad_()
            m = turns(2, (9, 13), (5, 6), 2.4)
            y = A.warp_affine(
                x, m, (5, 6), antialias=True, interpolation=interpolation, fill_mode=fill_mode
            )
            g = torch.rand_like(y)
            y.backward(g)
            assert x.grad is not None
            there, back = float((y.detach() * g).sum()), float((x.detach() * x.grad).sum())
            assert abs(there - back) <= 1e-12 * abs(there)


def test_what_is_not_finite_is_outside(backend: Backend) -> None:
    x = images((1, 1, 8, 9), torch.float32, backend)
    for value in (math.nan, math.inf, -math.inf, 1e300):
        m = torch.tensor([[1.0, 0.5, 1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
        for i in range(6):
            bad = m.clone().reshape(-1)
            bad[i] = value
            y = A.warp_affine(x, bad.reshape(2, 3), (4, 5), antialias=True, fill=0.25)
            assert bool(y.isfinite().all())
            assert bool((y[0, 0, 1:, 1:] == 0.25).all())


def wave(side: int, period: float) -> Tensor:
    """Rings of this period, as uint8."""
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    radius = (at[:, None].square() + at[None].square()).sqrt()
    rings = 127.5 + 127.5 * (2 * math.pi * radius / period).cos()
    return rings.round().to(torch.uint8)[None, None]


def test_what_the_result_cannot_hold_becomes_gray() -> None:
    x = wave(256, 3.0)  # of a pixel and less in the result

    def swing(antialias: bool) -> float:
        how: Any = {"degrees": (30, 30), "crop": "none", "out_dtype": torch.uint8}
        y = Augment(64, antialias=antialias, **how)(x)
        return float((y[..., 16:48, 16:48].double() - 127.5).abs().max())

    assert swing(True) < 16
    assert swing(False) > 100


def test_resized_crops_antialias_where_something_turns_them_too() -> None:
    x = torch.randint(0, 256, (4, 3, 60, 70), dtype=torch.uint8)

    def result(antialias: bool | None, **how: Any) -> Tensor:
        y: Tensor = Augment(16, crop="resized", seed=1, antialias=antialias, **how)(x)
        return y

    chains: tuple[dict[str, Any], ...] = (
        {}, {"hflip": 0.5}, {"interpolation": "bicubic"}, {"degrees": 10}, {"shear": 10},
    )  # fmt: skip
    for chain in chains:
        assert torch.equal(result(None, **chain), result(True, **chain))
        assert not torch.equal(result(None, **chain), result(False, **chain))
    nearest = {"interpolation": "nearest"}
    assert torch.equal(result(None, **nearest), result(False, **nearest))
    # As torchvision's RandomAffine, others are interpolated at points.
    for crop in ("random", "center", "none"):
        plain = Augment(16, crop=crop, degrees=10, scale=(0.3, 0.5), seed=1)
        points = Augment(16, crop=crop, degrees=10, scale=(0.3, 0.5), seed=1, antialias=False)
        assert torch.equal(plain(x), points(x))


def test_masks_are_never_filtered() -> None:
    """Labels, soft masks and points are where they are without antialiasing."""
    tv = torchvision_module("torchvision.tv_tensors")
    x = images((3, 3, 90, 90), torch.uint8)
    masks = tv.Mask((torch.rand(3, 90, 90) < 0.5).long() * 200)
    floating = tv.Mask(torch.rand(3, 1, 90, 90))
    points = tv.KeyPoints(torch.tensor([[20.0, 30.0]]), canvas_size=(90, 90))
    how: Any = {"degrees": 40, "crop": "resized", "seed": 2}
    for interpolation in ("nearest", "bilinear"):
        rules = {"mask_interpolation": interpolation}
        results = [
            Augment(30, **how, **rules, antialias=antialias)(
                tv.Image(x), {"mask": masks, "soft": floating, "points": [points] * 3},
            )[1]
            for antialias in (True, False)
        ]  # fmt: skip
        assert set(results[0]["mask"].unique().tolist()) == {0, 200}
        for name in ("mask", "soft"):
            assert torch.equal(results[0][name], results[1][name])
        for one, other in zip(results[0]["points"], results[1]["points"], strict=True):
            assert torch.equal(one, other)


def test_torchvisions_resize_and_rotation() -> None:
    """Of a square image the two steps are torchvision's, within a level inside the image."""
    F = torchvision_module("torchvision.transforms.v2.functional")
    bilinear = F.InterpolationMode.BILINEAR
    photo = photographs()[0][None, :, :400, :400]
    for layout in FORMATS:
        x = photo.contiguous(memory_format=layout)
        for degrees in (-31.0, 8.0, 90.0):
            augment = Augment(
                150, degrees=(degrees, degrees), crop="none", antialias=True, out_dtype=torch.uint8
            )
            wanted = F.rotate(F.resize(photo, [150, 150], antialias=True), degrees, bilinear)
            y = augment(x)
            inside = torch.zeros(150, 150, dtype=torch.bool)
            inside[30:120, 30:120] = True
            difference = (y.int() - wanted.int()).abs()[..., inside]
            assert int(difference.max()) <= 1
