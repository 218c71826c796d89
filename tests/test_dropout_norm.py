"""Dropout + addition + normalization on every backend, against the steps in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusereg
from conftest import TOLERANCES, Backend, make
from dropout_norm_steps import EPS, SEED, fused, normalized, row_mask, unfused
from fusereg import functional as F

#: One element, less than a group of 8, odd, whole vectors, more than 2048 (a piece of draws).
LENGTHS = [1, 5, 33, 64, 127, 768]
HALVES = (torch.float16, torch.bfloat16)


def assert_close(came: Tensor | None, wanted: Tensor, tolerance: float) -> None:
    """Relative to the largest magnitude, and to 1 where that is smaller still."""
    assert came is not None
    assert came.shape == wanted.shape
    if wanted.numel():
        error = (came.double() - wanted).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), 1.0)


# --- values and gradients -------------------------------------------------------------------------


def check(
    rms: bool,
    backend: Backend,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    p: float,
    wide_sum: bool = False,
    wide_weight: bool = False,
    has_residual: bool = True,
    has_weight: bool = True,
    has_bias: bool = True,
    index_offset: int = 0,
    return_sum: bool = True,
) -> None:
    wide = torch.float32
    x = make(shape, dtype, backend)
    residual = make(shape, wide if wide_sum else dtype, backend) if has_residual else None
    of_weights = wide if wide_weight else dtype
    weight = make(shape[-1:], of_weights, backend) if has_weight else None
    bias = make(shape[-1:], of_weights, backend) if has_bias and not rms else None
    given = [x, residual, weight, bias]
    leaves = [None if t is None else t.requires_grad_() for t in given]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    result = fused(
        rms,
        *leaves,
        p,
        seed=SEED,
        index_offset=index_offset,
        return_sum=return_sum,  # type: ignore[arg-type]
    )
    sum_dtype = wide if wide_sum else dtype
    mask = row_mask(shape, p, index_offset)
    wanted = unfused(rms, *exact, p, mask, sum_dtype)  # type: ignore[arg-type]
    tolerance = TOLERANCES[dtype]
    results = result if return_sum else (result,)
    assert results[0].dtype is dtype
    if return_sum:
        assert results[1].dtype is sum_dtype
    for came, reference in zip(results, wanted, strict=False):
        assert came.is_contiguous()
        assert_close(came, reference, tolerance)
    gradients = [torch.randn_like(t) for t in results]
    torch.autograd.backward(results, gradients)
    torch.autograd.backward(wanted[: len(results)], [g.double() for g in gradients])
    for leaf, reference_leaf in zip(leaves, exact, strict=True):
        if leaf is not None:
            assert reference_leaf is not None
            assert leaf.grad is not None
            assert leaf.grad.dtype is leaf.dtype
            assert reference_leaf.grad is not None
            # rstd is 300 where a row of one element has no variance.
            scale = 300.0 if shape[-1] == 1 else 3.0
            assert_close(leaf.grad, reference_leaf.grad, scale * tolerance)


@pytest.mark.sanitizer
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_values_and_gradients(rms: bool, dtype: torch.dtype, backend: Backend) -> None:
    for i, length in enumerate(LENGTHS):
        p = (0.3, 0.001, 0.5, 0.75)[i % 4]
        check(rms, backend, dtype, (3, length) if backend.on_host else (2, 9, length), p)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 1.0, 0.9997])
def test_probabilities_at_the_ends(rms: bool, p: float, backend: Backend) -> None:
    check(rms, backend, torch.float32, (5, 40), p)
    check(rms, backend, torch.float32, (5, 40), p, has_residual=False)
    check(rms, backend, torch.bfloat16, (5, 40), p, wide_sum=True)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_arguments_that_may_be_missing(rms: bool, backend: Backend) -> None:
    for residual, weight, bias in itertools.product((False, True), repeat=3):
        check(
            rms,
            backend,
            torch.float32,
            (4, 24),
            0.3,
            has_residual=residual,
            has_weight=weight,
            has_bias=bias,
            return_sum=bias,
        )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("wide_sum", [False, True])
def test_mixed_precision(
    wide_sum: bool, wide_weight: bool, dtype: torch.dtype, backend: Backend
) -> None:
    for rms, length in ((False, 40), (True, 17)):
        check(rms, backend, dtype, (5, length), 0.3, wide_sum=wide_sum, wide_weight=wide_weight)


def test_long_rows(backend: Backend) -> None:
    """More than a piece of draws; more than CUDA's registers hold; more than the CPU's buffer."""
    for length in (2050, 8200) if backend.on_host else (2050, 8200, 20000, 65541):
        check(False, backend, torch.float32, (2, length), 0.3, index_offset=3)
        check(True, backend, torch.bfloat16, (2, length), 0.3)


def test_many_rows(backend: Backend) -> None:
    """More than one chunk of rows adds to the gradients of weight and bias."""
    rows = 40 if backend.on_host else 3001
    check(False, backend, torch.float32, (rows, 24), 0.3)
    check(True, backend, torch.bfloat16, (rows, 9), 0.3)


@pytest.mark.parametrize("index_offset", [1, 100, 2**32 - 3, 2**40 + 5])
def test_index_offset(index_offset: int, backend: Backend) -> None:
    check(False, backend, torch.float32, (3, 43), 0.4, index_offset=index_offset)
    check(True, backend, torch.float32, (3, 43), 0.001, index_offset=index_offset)
    check(False, backend, torch.float32, (3, 43), 0.75, index_offset=index_offset)


def test_the_mask_is_dropouts(backend: Backend) -> None:
    """What is added is bit for bit what dropout gives."""
    x = make((6, 77), torch.float32, backend)
    zeros = torch.zeros_like(x)
    for p in (0.3, 0.001, 0.5, 0.75):
        _, s = F.dropout_add_layer_norm(x, zeros, None, None, p, seed=SEED, return_sum=True)
        assert torch.equal(s, F.dropout(x, p, seed=SEED))
        mask = fusereg.dropout_mask(x.shape, p, SEED, device=backend.device)
        assert torch.equal(s != 0, mask)
    pair = torch.tensor([SEED, 12], device=backend.device)
    _, s = F.dropout_add_rms_norm(x, None, None, 0.3, seed=pair, return_sum=True)
    assert torch.equal(s, F.dropout(x, 0.3, seed=pair))


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_above_the_deviation(ratio: float, backend: Backend) -> None:
    """Y is right to float32 of the sum that is returned, however large its mean."""
    for length in (768, 4099):
        x = make((4, length), torch.float32, backend)
        residual = torch.full_like(x, ratio)
        y, s = F.dropout_add_layer_norm(
            x, residual, None, None, 0.1, EPS, seed=SEED, return_sum=True
        )
        assert_close(y, normalized(False, s.double()), TOLERANCES[torch.float32])


def test_rows_without_variance(dtype: torch.dtype, backend: Backend) -> None:
    x = torch.full((3, 50), 1 / 3, dtype=dtype, device=backend.device, requires_grad=True)
    bias = torch.arange(50, dtype=dtype, device=backend.device)
    weight = torch.ones(50, dtype=dtype, device=backend.device, requires_grad=True)
    y = F.dropout_add_layer_norm(x, x.detach() * 3, weight, bias, 0.0)
    assert torch.equal(y, bias.expand_as(y))
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    zeros = torch.zeros_like(x)
    assert not F.dropout_add_rms_norm(zeros, None, None, 0.5).any()


def test_dropped_inf_and_nan_become_zero_and_kept_ones_stay_in_their_row(backend: Backend) -> None:
    mask = row_mask((4, 20), 0.5).view(4, 20)
    clean = make((4, 20), torch.float32, backend)
    for bad in (math.inf, math.nan):
        x = clean.masked_fill(~mask.to(clean.device), bad)
        wanted = F.dropout_add_layer_norm(clean, clean, None, None, 0.5, seed=SEED)
        y = F.dropout_add_layer_norm(x, clean, None, None, 0.5, seed=SEED)
        assert torch.equal(y, wanted)
        x[2, mask[2].nonzero()[0]] = bad
        leaf = x.requires_grad_()
        y = F.dropout_add_layer_norm(leaf, clean, None, None, 0.5, seed=SEED)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], wanted[[0, 1, 3]])
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[[0, 1, 3]].isfinite().all()
        assert not leaf.grad[2][~mask[2].to(x.device)].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "permuted": lambda t: t.permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "negated": lambda t: torch.complex(t, -t).conj().imag if t.dtype is torch.float32 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: Backend) -> None:
    """Indices are in row-major order, wherever the elements lie."""
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = (LAYOUTS[layout](make((3, 4, 16), dtype, backend)) for _ in range(2))
        weight = LAYOUTS["misaligned"](make((16,), dtype, backend))
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
        plain = [t.detach().clone().contiguous().requires_grad_() for t in (x, residual, weight)]
        upstream = LAYOUTS[layout](make((3, 4, 16), dtype, backend))
        for came, wanted in zip(
            torch.autograd.grad(fused(False, *leaves, None, 0.4, seed=SEED), leaves, upstream),
            torch.autograd.grad(
                fused(False, *plain, None, 0.4, seed=SEED), plain, upstream.clone().contiguous()
            ),
            strict=True,
        ):
            assert torch.equal(came, wanted)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_empty(rms: bool, shape: tuple[int, ...], backend: Backend) -> None:
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    weight = torch.ones(shape[-1:], device=backend.device, requires_grad=True)
    y, s = fused(rms, x, x.detach(), weight, None, 0.5, return_sum=True)
    (y.sum() + s.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == y.shape == s.shape == shape
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_threads_and_instruction_sets_do_not_change_a_bit(backend: Backend) -> None:
    """Nor does where a row lies: every row's bits are its own."""
    shape = (70, 100) if backend.on_host else (1000, 333)
    x, residual, weight = (
        make(s, torch.float32, backend).requires_grad_() for s in (shape, shape, shape[-1:])
    )
    upstream = make(shape, torch.float32, backend)
    before, isa = torch.get_num_threads(), fusereg._C.cpu_isa()
    results = []
    for threads, name in itertools.product((1, 3), [backend.isa, "baseline"]):
        torch.set_num_threads(threads)
        if name is not None:
            fusereg._C.set_cpu_isa(name)
        y, s = fused(False, x, residual, weight, None, 0.3, seed=SEED, return_sum=True)
        results.append([y, s, *torch.autograd.grad((y, s), (x, residual, weight), (upstream, s))])
    torch.set_num_threads(before)
    fusereg._C.set_cpu_isa(isa)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    part = slice(10, 12)
    y, s = fused(
        False,
        x[part],
        residual[part],
        weight,
        None,
        0.3,
        seed=SEED,
        index_offset=10 * shape[1],
        return_sum=True,
    )
    assert torch.equal(y, results[0][0][part])
    assert torch.equal(s, results[0][1][part])


def test_evaluation_and_no_grad(backend: Backend) -> None:
    x, residual = make((4, 30), torch.float32, backend), make((4, 30), torch.float32, backend)
    weight = make((30,), torch.float32, backend)
    wanted = fused(False, x.clone().requires_grad_(), residual, weight, weight, 0.0).detach()
    state = torch.get_rng_state()
    for options in ({"p": 0.5, "training": False}, {"p": 0.0}):
        y = F.dropout_add_layer_norm(x, residual, weight, weight, eps=EPS, **options)  # type: ignore[call-overload]
        assert torch.equal(y, wanted)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    y, s = F.dropout_add_rms_norm(x, None, None, 0.0, return_sum=True)
    assert s is x
    y, s = F.dropout_add_rms_norm(x, residual, None, 0.0, return_sum=True)
    assert torch.equal(s, residual + x)


def test_only_the_sum_is_used(backend: Backend) -> None:
    x = make((4, 30), torch.float32, backend).requires_grad_()
    weight = torch.ones(30, device=backend.device, requires_grad=True)
    _, s = F.dropout_add_layer_norm(x, x.detach(), weight, weight, 0.5, seed=SEED, return_sum=True)
    s.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, F.dropout(torch.ones_like(x), 0.5, seed=SEED))
