"""Augmentation's kernels on every backend, against plain float64 torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_reference as reference
import fusereg
from augment_reference import (
    COLOR,
    ERASE,
    FILL_MODES,
    INTERPOLATIONS,
    LAM,
    MIX,
    PARTNER,
    PERSPECTIVE,
)
from conftest import DTYPES, STANDIN_MODULE, TOLERANCES, Backend
from fusereg import augment as A
from fusereg.augment import op as ops

ALL_DTYPES = [torch.uint8, *DTYPES]
DTYPES_OF_POINTS = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
FORMATS = [torch.contiguous_format, torch.channels_last]
OUT = (11, 41)  # two whole blocks of 16 and a part of one


def images(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend | None = None) -> Tensor:
    x = torch.rand(shape, dtype=torch.float64)
    x = (x * 255).to(dtype) if dtype is torch.uint8 else x.to(dtype)
    return x if backend is None else x.to(backend.device)


def warps(n: int, shift: float = 4.0) -> Tensor:
    """A unit matrix each, a good deal off, but by no coordinate near a half: nearest is sure."""
    m = torch.eye(2, 3, dtype=torch.float64) + 0.3 * torch.randn(n, 2, 3, dtype=torch.float64)
    m[:, :, 2] += shift * torch.randn(n, 2, dtype=torch.float64)
    return m


def random_records(n: int) -> Tensor:
    """Warps, erased boxes, mixed boxes, partners, colors: something of each."""
    records = reference.identity_records(n, warps(n))
    records[:, ERASE : ERASE + 4] = torch.tensor([3.0, 2.0, 20.0, 5.0])
    records[0, ERASE : ERASE + 4] = torch.tensor([0.0, 4.0, 40.0, 7.0])
    records[:, MIX : MIX + 4] = torch.tensor([1.0, 1.0, 37.0, 9.0])
    records[:, PARTNER] = torch.tensor([1.0, -1.0, 0.0, 3.0, 1.0])[torch.arange(n) % 5]
    records[:, LAM] = torch.tensor([0.3, 0.5, 0.0, 0.6, 1.0], dtype=torch.float64)[
        torch.arange(n) % 5
    ]
    records[:, COLOR:PERSPECTIVE] += 0.2 * torch.randn(n, 12, dtype=torch.float64)
    records[1::3, PERSPECTIVE:] = 0.01 * torch.randn(len(records[1::3]), 2, dtype=torch.float64)
    return records


def numbers(c: int, dtype: torch.dtype) -> dict[str, list[float]]:
    unit = 255.0 if dtype is torch.uint8 else 1.0
    return {
        "fill": [unit * (0.2 + 0.1 * i) for i in range(c)],
        "scale": [(1.0 + i) / unit for i in range(c)],
        "shift": [0.1 * i for i in range(c)],
        "erase": [0.7 - 0.1 * i for i in range(c)],
    }


def run(
    x: Tensor,
    records: Tensor,
    size: tuple[int, int] = OUT,
    interpolation: str = "bilinear",
    fill_mode: str = "constant",
    *,
    antialias: bool = False,
    color: bool = False,
    keys: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
    several: list[Tensor] | None = None,
    **values: list[float],
) -> Tensor:
    """``several``: the images of x in a list."""
    c = x.shape[1]
    constants = {"fill": [0.0] * c, "scale": [1.0] * c, "shift": [0.0] * c, "erase": [0.0] * c}
    how, border = INTERPOLATIONS.index(interpolation), FILL_MODES.index(fill_mode)
    options = ops.Options(how, antialias, border, color, **(constants | values))
    out_dtype = out_dtype or (torch.float32 if x.dtype is torch.uint8 else x.dtype)
    target = ops.Target.of(x, size, out_dtype, memory_format)
    keys = None if keys is None else keys.to(x.device)
    if several is not None:
        return ops.apply_several(x, several, records, keys, target, options, "augment")
    return ops.apply(x, records.to(x.device), keys, target, options, "augment", out)


def assert_near(y: Tensor, wanted: Tensor, tolerance: float) -> None:
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert y.shape == wanted.shape
    assert float((y.double().cpu() - wanted).abs().max()) <= tolerance * max(largest, 1.0)


# --- every interpolation, border, dtype, layout ---------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize(
    ("interpolation", "antialias"),
    [("nearest", False), *((i, a) for i in INTERPOLATIONS[1:] for a in (False, True))],
)
def test_against_the_oracle(
    interpolation: str, antialias: bool, fill_mode: str, backend: Backend
) -> None:
    """Nothing else asked for, then everything; NCHW to channels last and back."""
    n = 2 if backend.on_host else 5
    for dtype, (first, second) in zip(
        (torch.uint8, torch.float32, torch.float64), (FORMATS, FORMATS[::-1], FORMATS), strict=True
    ):
        x = images((n, 3, 13, 37), dtype, backend).contiguous(memory_format=first)
        records, values = random_records(n), numbers(3, dtype)
        for color in (False, True):
            y = run(
                x, records, OUT, interpolation, fill_mode, antialias=antialias, color=color,
                memory_format=second, **values,
            )  # fmt: skip
            assert y.is_contiguous(memory_format=second)
            low, high = (
                reference.augment(
                    x, records, size=OUT, interpolation=interpolation, antialias=antialias,
                    fill_mode=fill_mode, color=color, nudge=nudge, **values,
                )
                for nudge in (-1e-4, 1e-4)
            )  # fmt: skip
            # Where a byte between two steps may be rounded either way.
            unsure = low != high
            assert float(unsure.double().mean()) <= (0.1 if dtype is torch.uint8 else 0.0)
            level = float((high - low).abs().max())
            assert float(((y.double().cpu() - low).abs() * unsure).max()) <= 2 * level
            wanted = torch.where(unsure, y.double().cpu(), low)
            # Coordinates off by 3e-7 of a pixel, on slopes of up to 1 a pixel (bicubic: 2).
            assert_near(y, wanted, 1e-13 if dtype is torch.float64 else 4e-6)


@pytest.mark.all_cases("host")
@pytest.mark.sanitizer
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fill_mode", FILL_MODES)
def test_rows_filtered_axis_by_axis_have_the_bits_of_pixels_alone(
    fill_mode: str, interpolation: str, backend: Backend
) -> None:
    # Scales up and down, flips, windows that reach out of the image or miss it; then the same with
    # a turned partner, of which nothing is mixed in: the CPU goes pixel by pixel. The CUDA kernels
    # do so for a list of images. The last two lie within the image: rows are shuffled there.
    n, sizes = 8, ((OUT, (3, 50)) if backend.on_host else (OUT, (3, 50), (40, 17), (1, 1)))
    records = random_records(n + 1)
    records[:, MIX : MIX + 4] = 0.0
    records[:, PARTNER] = -1.0
    for i in range(n):
        flip = -1.0 if i % 2 else 1.0
        x = [flip * (0.4 + 0.7 * i), 0.0, (36.0 if i % 2 else -3.0) + i]
        y = [0.0, 0.3 + 0.9 * i, (100.0 if i == 5 else -2.0) + i]
        records[i, :6] = torch.tensor([*x, *y], dtype=torch.float64)
    records[6, :6] = torch.tensor([0.4, 0.0, 4.2, 0.0, 0.5, 2.1], dtype=torch.float64)
    records[7, :6] = torch.tensor([-0.8, 0.0, 35.0, 0.0, 0.9, 1.0], dtype=torch.float64)
    beside = records.clone()
    listed = backend.name == "cuda_on_host"
    if not listed:
        beside[:n, PARTNER], beside[:n, LAM] = n, 0.5
    for dtype, c, layout in (
        (torch.uint8, 3, FORMATS[1]),
        (torch.float32, 1, FORMATS[0]),
        (torch.bfloat16, 4, FORMATS[1]),
        (torch.float16, 3, FORMATS[0]),
    ):
        x = images((n + 1, c, 13, 37), dtype, backend).contiguous(memory_format=layout)
        x[0, 0, 3, 5:7] = 255 if dtype is torch.uint8 else math.nan
        for size in sizes:
            for color in (False, True):
                values = numbers(c, dtype)
                how: Any = {"antialias": True, "color": color, "out_dtype": torch.float32, **values}
                rows = run(x, records, size, interpolation, fill_mode, **how)
                several = list(x.split(1)) if listed else None
                alone = run(x, beside, size, interpolation, fill_mode, several=several, **how)
                assert torch.equal(rows[:n].nan_to_num(7e7), alone[:n].nan_to_num(7e7))


@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", DTYPES_OF_POINTS, ids=str)
def test_rows_that_are_moved_along_have_the_bits_of_other_warps(
    dtype: torch.dtype, interpolation: str, fill_mode: str, backend: Backend
) -> None:
    """Shears along x, and translations: a kernel of their own where m3 is 0, but not if tiny."""
    rows = [  # m1, m2, m4, m5
        (0.3, -4.25, 1.0, 0.0), (-0.99, 9.0, 1.0, 0.0), (0.0, -7.0, 1.0, 2.0),
        (0.0, 0.0, 1.0, 0.25), (0.0, 2.5, -1.0, 11.75), (0.01, -60.0, 0.5, -3.0),
        (2.0, 0.0, 0.0, 5.0), (0.0, 30.5, 1.5, 0.0),
    ]  # fmt: skip
    records = reference.identity_records(len(rows), torch.zeros(len(rows), 2, 3))
    for i, (m1, m2, m4, m5) in enumerate(rows):
        records[i, :6] = torch.tensor([1.0, m1, m2, 0.0, m4, m5], dtype=torch.float64)
    other = records.clone()
    other[:, 3] = 1e-300
    shapes = ((13, 37), OUT), ((3, 2), (5, 16)), ((40, 64), (40, 64))
    for shape, size in shapes[:1] if backend.on_host else shapes:
        for c, layout in ((3, FORMATS[0]), (1, FORMATS[0]), (3, FORMATS[1])):
            x = images((len(rows), c, *shape), dtype, backend).contiguous(memory_format=layout)
            values = numbers(c, dtype)
            y = run(x, records, size, interpolation, fill_mode, **values)
            assert torch.equal(y, run(x, other, size, interpolation, fill_mode, **values))


@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_channels_that_are_last_have_the_bits_of_planes(
    interpolation: str, fill_mode: str, backend: Backend
) -> None:
    """Where a pixel's channels are read together as well: within the image, and across its edge."""
    for shape, size in (((13, 37), OUT), ((2, 1), (4, 16)), ((40, 64), (44, 64))):
        x = images((6, 3, *shape), torch.uint8, backend)
        records = reference.identity_records(6, warps(6, 20.0))
        how = (size, interpolation, fill_mode)
        y = run(x, records, *how, **numbers(3, torch.uint8))
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, run(last, records, *how, **numbers(3, torch.uint8)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dtypes_channels_and_layouts(dtype: torch.dtype, channels: int, backend: Backend) -> None:
    """All layouts give the same bits, all results are rounded as torch rounds."""
    x = images((2, channels, 9, 21), dtype, backend)
    records = reference.identity_records(2, warps(2, 2.0))
    values = numbers(channels, dtype)
    for interpolation in INTERPOLATIONS:
        wide = run(x, records, (10, 35), interpolation, out_dtype=torch.float32, **values)
        wanted = reference.augment(x, records, size=(10, 35), interpolation=interpolation, **values)
        assert_near(wide, wanted, 4e-6)
        for out_dtype in ALL_DTYPES:
            exact = run(x, records, (10, 35), interpolation, out_dtype=out_dtype, **values)
            if dtype is not torch.float64:
                assert torch.equal(exact, reference.rounded(wide, out_dtype))
            for laid, to in ((0, 1), (1, 0), (1, 1)):
                other = run(
                    x.contiguous(memory_format=FORMATS[laid]), records, (10, 35), interpolation,
                    out_dtype=out_dtype, memory_format=FORMATS[to], **values,
                )  # fmt: skip
                assert torch.equal(other, exact)
            if backend.on_host and out_dtype is torch.float32:
                break


def test_all_instruction_sets_and_threads_give_the_same_bits() -> None:
    before, isa = torch.get_num_threads(), fusereg._C.cpu_isa()
    records = random_records(5)
    keys = torch.randint(2**62, (5, 2))
    try:
        for dtype in ALL_DTYPES:
            for c, laid in ((3, 0), (3, 1), (1, 0), (4, 1)):
                x = images((5, c, 33, 61), dtype).contiguous(memory_format=FORMATS[laid])
                for how in INTERPOLATIONS:
                    for fill_mode in ("constant", "reflect"):
                        results = []
                        for name in fusereg._C.cpu_isas():
                            fusereg._C.set_cpu_isa(name)
                            for threads in (1, 3):
                                torch.set_num_threads(threads)
                                y = run(
                                    x, records, (29, 53), how, fill_mode, color=True, keys=keys,
                                    **numbers(c, dtype),
                                )  # fmt: skip
                                results.append(y)
                        for y in results[1:]:
                            assert torch.equal(y, results[0])
    finally:
        torch.set_num_threads(before)
        fusereg._C.set_cpu_isa(isa)


@pytest.mark.gpu
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("fill_mode", FILL_MODES)
def test_a_gpu_gives_the_bits_of_the_cpu(fill_mode: str, antialias: bool) -> None:
    records = random_records(6)
    records[3, :6] = torch.tensor([-1.0, 0.0, 58.0, 0.0, 1.0, -2.0])  # a flip and whole shifts
    records[4, :6] = torch.tensor([1.7, 0.0, -9.0, 0.0, 0.6, 4.25])
    records[5, :6] = torch.tensor([9.0, 0.0, -70.0, 0.0, -40.0, 31.0])
    records[3:, PARTNER] = torch.tensor([4.0, 5.0, 3.0])
    keys = torch.randint(2**62, (6, 2))
    sizes = ((33, 70), (7, 5)) if fill_mode == "constant" else ((33, 70),)
    cases = itertools.product(
        (torch.uint8, torch.float32, torch.bfloat16),
        ((3, 0), (3, 1), (1, 0), (4, 1)),
        INTERPOLATIONS[antialias:],
        sizes,
        (torch.float32, torch.uint8, torch.float16),
    )
    # A stand-in takes a second for a case: some of them, with every value of each.
    for dtype, (c, laid), how, size, out in itertools.islice(
        cases, None, None, 7 if STANDIN_MODULE else 1
    ):
        x = images((6, c, 33, 61), dtype).contiguous(memory_format=FORMATS[laid])
        if dtype is not torch.uint8:
            x[1, 0, 3, 5:7] = math.inf
        options: Any = {"antialias": antialias, "color": out != torch.float16}
        options |= {"keys": keys, "out_dtype": out, **numbers(c, dtype)}
        options["memory_format"] = FORMATS[out == torch.float32]
        wanted = run(x, records, size, how, fill_mode, **options)
        y = run(x.cuda(), records, size, how, fill_mode, **options).cpu()
        assert torch.equal(y.float().nan_to_num(7e4), wanted.float().nan_to_num(7e4))


# --- what must be exact ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_shifts_flips_and_quarter_turns_are_exact(
    interpolation: str, dtype: torch.dtype, backend: Backend
) -> None:
    x = images((2, 3, 19, 35), dtype, backend)
    if dtype is not torch.uint8:
        x[0, 0, 3, 4], x[1, 2, 18, 34], x[0, 1, 7, 7] = math.inf, math.nan, -0.0
    h, w = 19, 35
    cases = {
        "same": ([[1, 0, 0], [0, 1, 0]], (h, w), x),
        "shift": ([[1, 0, 2], [0, 1, 3]], (10, 20), x[:, :, 3:13, 2:22]),
        "mirrored": ([[-1, 0, w - 1], [0, 1, 0]], (h, w), x.flip(3)),
        "upside down": ([[1, 0, 0], [0, -1, h - 1]], (h, w), x.flip(2)),
        "both": ([[-1, 0, 30], [0, -1, h - 1]], (h, 20), x.flip(2, 3)[..., 4:24]),
        "left turn": ([[0, -1, w - 1], [1, 0, 0]], (w, h), x.rot90(1, (2, 3))),
        "right turn": ([[0, 1, 0], [-1, 0, h - 1]], (w, h), x.rot90(-1, (2, 3))),
        "half turn": ([[-1, 0, w - 1], [0, -1, h - 1]], (h, w), x.rot90(2, (2, 3))),
        "every other": ([[2, 0, 1], [0, 2, 0]], (9, 17), x[:, :, :18:2, 1::2]),
    }
    for laid in FORMATS:
        for name, (matrix, size, wanted) in cases.items():
            m = torch.tensor(matrix, dtype=torch.float64)
            y = A.warp_affine(
                x.contiguous(memory_format=laid), m, size, interpolation=interpolation
            )
            assert torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0)), name
            assert torch.equal(y.isnan(), wanted.isnan()), name


def test_a_constant_image_with_the_same_fill_stays(backend: Backend) -> None:
    records = reference.identity_records(4, warps(4, 20.0))
    for dtype, value in ((torch.uint8, 200), (torch.float32, 0.1), (torch.float64, 0.3)):
        x = torch.full((4, 3, 17, 23), value, dtype=dtype, device=backend.device)
        for interpolation in INTERPOLATIONS:
            y = run(x, records, (20, 40), interpolation, fill=[value] * 3, out_dtype=dtype)
            assert torch.equal(y, torch.full_like(y, value))
            for mode in FILL_MODES[1:]:
                y = run(x, records, (20, 40), interpolation, mode, out_dtype=dtype)
                assert torch.equal(y, torch.full_like(y, value))


def test_coverage_of_a_constant_fill(backend: Backend) -> None:
    """Half a pixel outside: half the image's value, half the fill."""
    x = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8, device=backend.device)
    m = torch.tensor([[1.0, 0, -0.5], [0, 1, 0]])
    y = A.warp_affine(x, m, fill=100, out_dtype=torch.float32)
    assert y[0, 0, 0].tolist() == [150, 200, 200, 200]
    assert A.warp_affine(x, m, fill=200).unique().tolist() == [200]


def test_nan_and_infinity_stay_local(backend: Backend) -> None:
    x = torch.zeros(1, 1, 20, 40, device=backend.device)
    x[0, 0, 10, 20] = math.nan
    y = A.warp_affine(x, torch.tensor([[1.0, 0, 0.25], [0, 1, 0.5]]))
    assert y.isnan().nonzero()[:, 2:].tolist() == [[9, 19], [9, 20], [10, 19], [10, 20]]
    y = A.warp_affine(x, torch.tensor([[1.0, 0, 0], [0, 1, 0.5]]))
    assert y.isnan().nonzero()[:, 2:].tolist() == [[9, 20], [10, 20]]
    full = torch.full((1, 1, 20, 40), math.inf, device=backend.device)
    for interpolation in INTERPOLATIONS:
        y = A.warp_affine(
            full, torch.tensor([[0.9, 0.1, 0.3], [0, 0.8, 0.7]]), interpolation=interpolation,
            fill_mode="border",
        )  # fmt: skip
        assert torch.equal(y, full)


@pytest.mark.parametrize("fill_mode", FILL_MODES)
def test_small_and_far(fill_mode: str, backend: Backend) -> None:
    """Images of a pixel, outputs larger than inputs, rows wholly outside, absurd matrices."""
    for shape in ((1, 1, 1, 1), (2, 3, 1, 5), (2, 1, 5, 1), (1, 3, 2, 2)):
        x = images(shape, torch.float32, backend)
        for m in (warps(shape[0], 3.0), warps(shape[0], 100.0)):
            records = reference.identity_records(shape[0], m)
            for how in INTERPOLATIONS:
                y = run(x, records, (7, 19), how, fill_mode)
                wanted = reference.augment(
                    x, records, size=(7, 19), interpolation=how, fill_mode=fill_mode
                )
                assert_near(y, wanted, 2e-5)
    x = images((1, 2, 6, 6), torch.float32, backend)
    for m in (1e30, -1e30, math.inf, math.nan, 1e-300, 70.0, -3e6):
        records = reference.identity_records(1, [[m, 0.0, 0.0], [0.0, 1.0, 2.0]])
        y = run(x, records, (4, 33), "bilinear", fill_mode)
        assert bool(((y >= 0) & (y <= 1)).all())
        assert y.shape == (1, 2, 4, 33)


def test_large_scales_keep_their_precision(backend: Backend) -> None:
    """Beyond 16 input pixels a step, coordinates have fewer bits after the point."""
    x = torch.arange(4000.0, device=backend.device).expand(1, 1, 2, 4000).contiguous()
    for step in (15.9, 16.1, 33.3, 100.7):
        width = int(3999 / step)
        y = A.warp_affine(x, torch.tensor([[step, 0, 0.3], [0, 1, 0]]).double(), (1, width))
        wanted = torch.arange(width, dtype=torch.float64) * step + 0.3
        assert float((y.cpu().double() - wanted).abs().max()) < 4000 * 2**-23


def test_empty(backend: Backend) -> None:
    x = torch.empty(0, 3, 5, 5, dtype=torch.uint8, device=backend.device)
    assert A.warp_affine(x, torch.zeros(0, 2, 3), 7).shape == (0, 3, 7, 7)
    assert A.mix(x, torch.zeros(0, dtype=torch.int64), 0.5).shape == x.shape
    x = torch.empty(0, 3, 5, 5, device=backend.device, requires_grad=True)
    A.resize(x, 3).sum().backward()
    assert x.grad is not None


# --- erasing and mixing ---------------------------------------------------------------------------


def test_noise_of_erased_boxes(backend: Backend) -> None:
    x = images((2, 3, 7, 21), torch.float32, backend)
    records = reference.identity_records(2)
    records[:, ERASE : ERASE + 4] = torch.tensor([[2.0, 1.0, 9.0, 5.0], [0.0, 0.0, 21.0, 7.0]])
    keys = torch.tensor([[5, -(2**63)], [-7, 2**62 + 3]])
    y = run(x, records, (7, 21), keys=keys)
    wanted = reference.augment(x, records, keys=keys, erase_noise=True)
    assert_near(y, wanted, 1e-6)
    assert float(wanted[1].std()) > 0.7


def test_erase_and_mix(backend: Backend) -> None:
    x = images((3, 3, 6, 20), torch.float32, backend)
    boxes = torch.tensor([[2, 1, 18, 4], [0, 0, 0, 0], [-3, -3, 2, 99]])
    y = A.erase(x, boxes, (0.1, 0.2, 0.3))
    wanted = x.clone()
    value = torch.tensor([0.1, 0.2, 0.3], device=x.device)[:, None, None]
    wanted[0, :, 1:4, 2:18] = value
    wanted[2, :, :, :2] = value
    assert torch.equal(y, wanted)
    noisy = A.erase(x, boxes, "random", seed=3)
    assert torch.equal(noisy == x, y == x)
    assert not torch.equal(noisy, A.erase(x, boxes, "random", seed=4))

    partner = torch.tensor([1, -1, 0])
    mixed = A.mix(x, partner, 0.25)
    assert_near(mixed[0], (0.25 * x[0] + 0.75 * x[1]).cpu().double(), 1e-6)
    assert torch.equal(mixed[1], x[1])
    cut = A.mix(x, partner, 0.0, boxes)
    wanted = x.clone()
    wanted[0, :, 1:4, 2:18] = x[1, :, 1:4, 2:18]
    wanted[2, :, :, :2] = x[0, :, :, :2]
    assert torch.equal(cut, wanted)
    lam = torch.tensor([1.0, 0.5, 0.0])
    each = A.mix(x, torch.tensor([2, 2, 2]), lam)
    assert torch.equal(each[0], x[0])
    assert torch.equal(each[2], x[2])


def test_the_partner_that_is_not_read_may_be_nan(backend: Backend) -> None:
    x = images((2, 1, 4, 20), torch.float32, backend)
    x[1] = math.nan
    assert torch.equal(A.mix(x, torch.tensor([1, -1]), 1.0)[0], x[0])
    y = A.mix(x.flip(0), torch.tensor([1, 0]), 0.0)
    assert torch.equal(y[0], x[0])


# --- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_crop_flip_normalize(channels_last: bool, backend: Backend) -> None:
    x = images((4, 3, 20, 50), torch.uint8, backend)
    top, left = torch.tensor([0, 3, -2, 5]), torch.tensor([1, 0, 33, 7])
    hflip = torch.tensor([False, True, False, True])
    vflip = torch.tensor([False, False, True, True])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    y = A.crop_flip_normalize(
        x.contiguous(memory_format=FORMATS[channels_last]), (12, 37), top=top, left=left,
        hflip=hflip, vflip=vflip, mean=mean, std=std, fill=255,
    )  # fmt: skip
    assert y.dtype is torch.float32
    assert y.is_contiguous(memory_format=FORMATS[channels_last])
    padded = torch.nn.functional.pad(x.cpu(), (50, 50, 50, 50), value=255)
    for i in range(4):
        t, s = int(top[i]) + 50, int(left[i]) + 50
        crop = padded[i, :, t : t + 12, s : s + 37]
        crop = crop.flip([2] if hflip[i] else []).flip([1] if vflip[i] else [])
        m, d = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
        assert_near(y[i], (crop.double() / 255 - m) / d, 1e-6)
    plain = A.crop_flip_normalize(x, 8, top=2, left=3)
    assert torch.equal(plain, x[:, :, 2:10, 3:11])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_rows_of_whole_vectors(dtype: torch.dtype, channels_last: bool, backend: Backend) -> None:
    """Windows that are copied by rows; on the CPU some are large enough to go past the cache."""
    side = 40 if backend.on_host else 840
    x = images((2, 3, side, side), dtype, backend)
    x = x.contiguous(memory_format=FORMATS[channels_last])
    size = side - 8
    y = A.crop_flip_normalize(
        x, size, top=torch.tensor([3, 5]), left=torch.tensor([1, 8]),
        hflip=torch.tensor([True, False]), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0),
        out_dtype=torch.float32,
    )  # fmt: skip
    unit = 255 if dtype is torch.uint8 else 1
    crops = [x[0, :, 3 : 3 + size, 1 : 1 + size].flip(2), x[1, :, 5 : 5 + size, 8 : 8 + size]]
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)))
    wanted = (torch.stack(crops).cpu().double() / unit - mean[:, None, None]) / std[:, None, None]
    assert_near(y, wanted, 1e-6)
    if dtype is not torch.float64:
        for out_dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
            for laid in FORMATS:
                other = A.crop_flip_normalize(
                    x, size, top=torch.tensor([3, 5]), left=torch.tensor([1, 8]),
                    hflip=torch.tensor([True, False]), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0),
                    out_dtype=out_dtype, memory_format=laid,
                )  # fmt: skip
                assert torch.equal(other, reference.rounded(y, out_dtype))
    turned = A.warp_affine(x, torch.tensor([[0.9, 0.1, 3], [-0.1, 0.9, 7]]), size)
    few = A.warp_affine(x[1:], torch.tensor([[0.9, 0.1, 3], [-0.1, 0.9, 7]]), size)
    assert torch.equal(turned[1:], few)


@pytest.mark.parametrize("size", [(7, 11), (13, 17), (20, 40), (3, 60)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_is_torchs(interpolation: str, size: tuple[int, int], backend: Backend) -> None:
    for dtype in (torch.float32, torch.float64):
        x = images((2, 3, 13, 17), dtype, backend)
        for antialias in (False, True):
            y = A.resize(x, size, interpolation=interpolation, antialias=antialias)
            wanted = torch.nn.functional.interpolate(
                x.double(), size, mode=interpolation, antialias=antialias
            )
            assert_near(y, wanted.cpu(), 4 * TOLERANCES[dtype])
    near = A.resize(x, size, interpolation="nearest", antialias=False)
    assert torch.equal(near, torch.nn.functional.interpolate(x, size, mode="nearest-exact"))


def test_out_and_other_layouts(backend: Backend) -> None:
    x = images((2, 3, 12, 20), torch.float32, backend)
    m = warps(2, 1.0)
    wanted = A.warp_affine(x, m, (9, 18))
    others = [
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),  # misaligned
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.cat([x, x], 3)[..., :20],
    ]
    for other in others:
        assert torch.equal(A.warp_affine(other, m, (9, 18)), wanted)
    wide = torch.zeros(2, 3, 9, 36, device=x.device)
    for out in (
        torch.empty_like(wanted),
        torch.empty_like(wanted, memory_format=torch.channels_last),
        wide[..., ::2],
    ):
        version = out._version
        assert A.warp_affine(x, m, (9, 18), out=out) is out
        assert torch.equal(out, wanted)
        assert out._version > version
    assert not wide[..., 1::2].any()
    expanded = x[:1, :1].expand(2, 3, 12, 20)
    assert torch.equal(A.warp_affine(expanded, m), A.warp_affine(expanded.contiguous(), m))


#: Every way to ask for a normalization of images whose pixels stay where they are.
NORMALIZING: dict[str, Callable[..., Tensor]] = {
    "warp_affine": lambda x, **how: A.warp_affine(x, torch.eye(2, 3), **how),
    "crop_flip_normalize": lambda x, **how: A.crop_flip_normalize(x, x.shape[2:], **how),
    "resize": lambda x, **how: A.resize(x, x.shape[2:], **how),
    "resize, not antialiased": lambda x, **how: A.resize(
        x, x.shape[2:], interpolation="nearest", antialias=False, **how
    ),
    "Augment": lambda x, **how: A.Augment(x.shape[2:], crop="center", **how)(x),
    "Augment.eval": lambda x, **how: A.Augment(x.shape[2:], hflip=1.0, **how).eval()(x),
    "Normalize": lambda x, mean=None, std=None: A.Normalize(mean, std)(x),
    "Compose": lambda x, mean=None, std=None: A.Compose([A.Normalize(mean, std)])(x),
}


@pytest.mark.parametrize("name", NORMALIZING)
def test_mean_and_std_follow_one_rule(name: str) -> None:
    normalize = NORMALIZING[name]
    for dtype in ALL_DTYPES:
        x = images((2, 3, 5, 6), dtype)
        for mean, std in ((0.5, 0.25), ((0.1, 0.2, 0.3), 0.7), ([0.4], (0.3, 1.5, 2.0))):
            wanted = A.crop_flip_normalize(x, (5, 6), mean=mean, std=std)
            assert torch.equal(normalize(x, mean=mean, std=std), wanted)
            m, s = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (mean, std))
            values = x.double() / (255 if dtype is torch.uint8 else 1)
            assert_near(wanted, (values - m) / s, TOLERANCES[wanted.dtype])
    gray = torch.zeros(1, 1, 5, 6)
    one_missing = "mean and std must be given together"
    if name in ("Normalize", "Compose"):
        one_missing = "(mean|std) must be a number, got NoneType"
    for t, mean, std, text in (
        (x, 0.5, 0.0, r"std must be positive, got \(0.0,\)"),
        (x, (0.5, 0.5, 0.5), (0.2, 0.2, -0.2), "std must be positive"),
        (x, 0.5, None, one_missing),
        (x, None, 0.5, one_missing),
        (x, (0.5, 0.5), 0.5, "mean must have 1 or 3 numbers for images of 3 channels, got 2"),
        (gray, 0.5, (1, 1, 1), "std must have 1 number for images of 1 channel, got 3"),
        (x, "0.5", 0.5, "mean must be a number, got str"),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"fusereg\.\w+: ({text})"):
            normalize(t, mean=mean, std=std)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: A.warp_affine(x[0], torch.eye(2, 3)), ValueError, "warp_affine: x must have 4"),
        (lambda x: A.warp_affine(x.long(), torch.eye(2, 3)), ValueError, "x has dtype torch.int64"),
        (lambda x: A.warp_affine(x, torch.eye(3)), ValueError, r"matrix must be .*\(2, 2, 3\)"),
        (lambda x: A.warp_affine(x, [[1, 0, 0]]), TypeError, "matrix must be a torch.Tensor"),
        (lambda x: A.warp_affine(x, torch.eye(2, 3), 0), ValueError, "size must be positive"),
        (
            lambda x: A.warp_affine(x, torch.eye(2, 3), interpolation="cubic"),
            ValueError,
            "interpolation must be one of 'nearest', 'bilinear', 'bicubic', got 'cubic'",
        ),
        (
            lambda x: A.warp_affine(x, torch.eye(2, 3), fill_mode="zeros"),
            ValueError,
            "fill_mode must be one of",
        ),
        (
            lambda x: A.warp_affine(x, torch.eye(2, 3), fill=(1, 2)),
            ValueError,
            "fill must have 1 or 3 numbers",
        ),
        (
            lambda x: A.warp_affine(x, torch.eye(2, 3, requires_grad=True)),
            ValueError,
            "matrix gets no gradient",
        ),
        (
            lambda x: A.warp_affine(x, torch.eye(2, 3), out=torch.empty(2, 3, 4, 5)),
            ValueError,
            r"warp_affine: out must be torch.float32 of shape \(2, 3, 8, 9\)",
        ),
        (lambda x: A.warp_affine(x, torch.eye(2, 3), out=x), ValueError, "overlap in memory"),
        (
            lambda x: A.resize(x, (8, 9), out=x.view(2, 3, 8, 9)),
            ValueError,
            "resize: x and out overlap in memory",
        ),
        (
            lambda x: A.warp_affine(x, torch.eye(2, 3), interpolation="nearest", antialias=True),
            ValueError,
            "antialias needs",
        ),
        (
            lambda x: A.crop_flip_normalize(x, 4, top=torch.zeros(3).long()),
            ValueError,
            r"top must have shape \(2,\)",
        ),
        (
            lambda x: A.crop_flip_normalize(x, 4, hflip=torch.zeros(2).long()),
            ValueError,
            "hflip must have shape .* hold flags",
        ),
        (lambda x: A.resize(x, (4, 5, 6)), ValueError, "size must be an integer or"),
        (lambda x: A.erase(x, torch.zeros(2, 4)), ValueError, "boxes must be integers"),
        (lambda x: A.erase(x, torch.zeros(2, 4).long(), "noise"), ValueError, "value must be one"),
        (lambda x: A.mix(x, torch.tensor([0, 2]), 0.5), ValueError, "below the batch size 2"),
        (lambda x: A.mix(x, torch.tensor([0, 1]), 1.5), ValueError, r"within \[0, 1\]"),
        (
            lambda x: A.warp_affine(torch.empty(1, 65, 2, 2), torch.eye(2, 3)),
            ValueError,
            "at most 64 channels, got 65",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(torch.ones(2, 3, 8, 9))
