"""Antialiased resizing: the separable kernel on every backend, against float64 torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fusereg
from augment_reference import rounded
from conftest import DTYPES, TOLERANCES, Backend
from fusereg import augment as A
from test_augment import ALL_DTYPES, FORMATS, assert_near, images

HOW = ("bilinear", "bicubic")
#: Fewer and more than a strip has rows, more than four vectors of columns, odd ones, single ones.
SIZES = [
    ((2, 3, 13, 17), (7, 11)),
    ((1, 2, 40, 300), (19, 90)),
    ((1, 4, 31, 23), (40, 16)),
    ((1, 1, 5, 70), (1, 1)),
    ((2, 3, 1, 1), (3, 4)),
]


def interpolated(x: Tensor, size: tuple[int, int], how: str) -> Tensor:
    return torch.nn.functional.interpolate(
        x.detach().cpu().double(), size, mode=how, antialias=True
    )


@pytest.mark.sanitizer
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, how: str, backend: Backend) -> None:
    """All layouts give the same bits, and results of other dtypes are those rounded."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for shape, size in SIZES:
        x = images(shape, dtype, backend)
        y = A.resize(x, size, interpolation=how, out_dtype=wide)
        unit = 255 if dtype is torch.uint8 else 1
        assert_near(y / unit, interpolated(x, size, how) / unit, 2 * TOLERANCES[wide])
        for out_dtype in ALL_DTYPES:
            exact = y if out_dtype is wide else rounded(y, out_dtype)
            for laid, to in ((0, 0), (0, 1), (1, 0), (1, 1)):
                other = A.resize(
                    x.contiguous(memory_format=FORMATS[laid]), size, interpolation=how,
                    out_dtype=out_dtype, memory_format=FORMATS[to],
                )  # fmt: skip
                assert torch.equal(other, exact)
            if backend.on_host and out_dtype is not torch.uint8:
                break


def test_normalized(backend: Backend) -> None:
    x = images((2, 3, 20, 31), torch.uint8, backend)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    m, d = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    wanted = (interpolated(x, (9, 13), "bilinear") / 255 - m) / d
    assert_near(A.resize(x, (9, 13), mean=mean, std=std), wanted, 1e-6)


def test_the_matrix_form_is_the_same(backend: Backend) -> None:
    """warp_affine filters pixel by pixel, as wide as this does."""
    x = images((1, 3, 30, 24), torch.float32, backend)
    by_y, by_x = 30 / 11, 24 / 7
    matrix = torch.tensor([[by_x, 0, (by_x - 1) / 2], [0, by_y, (by_y - 1) / 2]])
    for how in HOW:
        warped = A.warp_affine(x, matrix.double(), (11, 7), interpolation=how, antialias=True)
        assert_near(A.resize(x, (11, 7), interpolation=how), warped.cpu().double(), 4e-6)


def test_the_same_size_changes_nothing(backend: Backend) -> None:
    for dtype in ALL_DTYPES:
        x = images((2, 3, 19, 21), dtype, backend)
        for how in HOW:
            assert torch.equal(A.resize(x, (19, 21), interpolation=how), x)


def test_nan_and_infinity_stay_local(backend: Backend) -> None:
    x = torch.zeros(1, 1, 24, 24, device=backend.device)
    x[0, 0, 12, 12] = math.nan
    y = A.resize(x, 6)
    weights = A.resize(torch.where(x.isnan(), 1.0, x), 6)
    assert torch.equal(y.isnan(), weights != 0)
    assert int(y.isnan().sum()) == 4
    full = torch.full((1, 3, 20, 30), math.inf, device=backend.device)
    assert torch.equal(A.resize(full, (7, 9)), full[..., :7, :9])


def test_all_instruction_sets_and_threads_give_the_same_bits() -> None:
    before, isa = torch.get_num_threads(), fusereg._C.cpu_isa()
    try:
        for dtype in ALL_DTYPES:
            for shape, size in SIZES[:3]:
                for laid in FORMATS:
                    x = images(shape, dtype).contiguous(memory_format=laid)
                    results = []
                    for name in fusereg._C.cpu_isas():
                        fusereg._C.set_cpu_isa(name)
                        for threads in (1, 3):
                            torch.set_num_threads(threads)
                            y = A.resize(x, size, interpolation="bicubic", out_dtype=torch.float32)
                            results.append(y)
                    for y in results[1:]:
                        assert torch.equal(y, results[0])
    finally:
        torch.set_num_threads(before)
        fusereg._C.set_cpu_isa(isa)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype, backend: Backend) -> None:
    for (shape, size), how, laid in zip(SIZES, HOW * 3, FORMATS * 3, strict=False):
        x = images(shape, dtype, backend).contiguous(memory_format=laid).requires_grad_()
        y = A.resize(x, size, interpolation=how, mean=0.5, std=0.25)
        g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        y.backward(g.to(y.device))
        plain = x.detach().cpu().double().requires_grad_()
        wanted = torch.nn.functional.interpolate(plain, size, mode=how, antialias=True)
        wanted.backward(g.double() / 0.25)
        assert x.grad is not None
        assert plain.grad is not None
        assert x.grad.dtype is dtype
        scale = max(float(plain.grad.abs().max()), 1.0)
        assert_near(x.grad / scale, plain.grad / scale, 2 * TOLERANCES[dtype])


def test_gradcheck_twice() -> None:
    x = torch.rand(2, 2, 9, 6, dtype=torch.float64, requires_grad=True)

    def eager(t: Tensor) -> Tensor:
        return A.resize(t, (5, 8), interpolation="bicubic", mean=0.1, std=0.5)

    def operator(t: Tensor) -> Tensor:
        result: Tensor = torch.ops.fusereg.resize(
            t, (5, 8), torch.float64, False, 2, False, [2.0] * 2, [-0.2] * 2
        )
        return result

    assert torch.allclose(operator(x), eager(x), rtol=1e-14)
    for f in (eager, operator):
        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=f is eager)
        assert torch.autograd.gradgradcheck(f, (x,))
    expanded = torch.rand(1, 1, 9, 6).expand(2, 3, 9, 6).requires_grad_()
    A.resize(expanded, (5, 8)).sum().backward()  # both of stride 0
    assert expanded.grad is not None
    assert float(expanded.grad.sum()) == pytest.approx(2 * 3 * 5 * 8, rel=1e-5)


@pytest.mark.slow  # a sample of it is in test_contract.py
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    x = torch.rand(2, 3, 6, 5, requires_grad=True)
    how = (1, transposed, [2.0] * 3, [0.5] * 3)
    for channels_last in (False, True):
        arguments = (x, (4, 7), torch.float32, channels_last, *how)
        torch.library.opcheck(torch.ops.fusereg.resize.default, arguments)


# --- arguments ------------------------------------------------------------------------------------


def test_out_and_other_layouts(backend: Backend) -> None:
    x = images((2, 3, 12, 20), torch.float32, backend)
    wanted = A.resize(x, (5, 9))
    assert torch.equal(A.resize(torch.cat([x, x], 3)[..., :20], (5, 9)), wanted)
    assert torch.equal(A.resize(x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), 5)[:1],
                       A.resize(x, 5)[:1])  # fmt: skip
    for out in (
        torch.empty_like(wanted),
        torch.empty_like(wanted, memory_format=torch.channels_last),
        torch.empty(2, 3, 5, 18, device=x.device)[..., ::2],
    ):
        assert A.resize(x, (5, 9), out=out) is out
        assert torch.equal(out, wanted)
    empty = torch.empty(0, 3, 5, 5, dtype=torch.uint8, device=backend.device)
    assert A.resize(empty, 7).shape == (0, 3, 7, 7)


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3, 8, 9)
    with pytest.raises(
        ValueError, match="resize: out_dtype must be uint8, float16, bfloat16, float32 or float64"
    ):
        A.resize(x, 4, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="interpolation must be one of"):
        A.resize(x, 4, interpolation="cubic")
    with pytest.raises(ValueError, match=r"resize: out must be torch.float32 of shape \(2, 3, 4"):
        A.resize(x, 4, out=torch.empty(2, 3, 4, 5))
    c = fusereg._C
    with pytest.raises(ValueError, match="resize: size must be within 1 and"):
        c.augment_resize_taps(0, 4, 1, False, "resize")
    with pytest.raises(ValueError, match="resize: interpolation must be 1 or 2"):
        c.augment_resize_taps(8, 4, 0, False, "resize")
    first, weights = torch.empty(4, dtype=torch.int32), torch.empty(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="resize: weights has too few columns"):
        c.augment_resize_band(first, weights, 8, 4, 1, False, "resize")
    for bad in (torch.empty(3, dtype=torch.int32), torch.empty(4, dtype=torch.int64), None):
        with pytest.raises(ValueError, match="resize: first must be a contiguous int32 tensor"):
            c.augment_resize_band(bad, weights, 8, 4, 1, False, "resize")
