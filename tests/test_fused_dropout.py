"""Dropout fused with its neighbors, on every backend: against the unfused chain in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
import reference_philox
from conftest import SEED, TOLERANCES, Backend, make
from fusereg import functional as F

#: 16-bit draws, draws of one and of two digits, 32-bit draws, nothing kept, nothing drawn.
PROBABILITIES = [0.3, 0.5, 0.75, 0.001, 1.0, 0.0]

#: Rows shorter than a vector, around a word (64), longer than a tile of columns (2048); one column;
#: several rows of partial sums.
SHAPES: list[tuple[int, ...]] = [
    (0, 5),
    (3, 0),
    (1,),
    (129,),
    (7, 1),
    (50, 3),
    (2, 3, 64),
    (4, 5, 129),
    (3, 2100),
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def exact(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_()


def dropped(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """The unfused dropout, which selects."""
    keep = reference_philox.keep_probability(p) if p else 1.0
    return torch.where(mask, x / (keep or 1.0), 0.0)


def mask_of(shape: tuple[int, ...], p: float, backend: Backend, index_offset: int = 0) -> Tensor:
    count = math.prod(shape)
    mask = reference_philox.mask(count, p, SEED, 0, index_offset) if p else torch.ones(count) > 0
    return mask.view(shape).to(backend.device)


def assert_close(came: Tensor | None, wanted: Tensor | None, terms: int = 1) -> None:
    """Within some units of the last place of the largest element (of a sum, of its terms)."""
    assert came is not None
    assert wanted is not None
    assert came.shape == wanted.shape
    if wanted.numel():
        largest = max(1.0, wanted.abs().max().item()) * math.sqrt(terms)
        error = (came.detach().double() - wanted.detach()).abs().max().item()
        assert error <= 2 * TOLERANCES[came.dtype] * largest, error


def gradients(y: Tensor, grad: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, grad)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_add(with_bias: bool, p: float, dtype: torch.dtype, backend: Backend) -> None:
    for shape in SHAPES:
        x, residual, grad = (make(shape, dtype, backend) for _ in range(3))
        bias = make(shape[-1:], dtype, backend)
        mask = mask_of(shape, p, backend)
        x, residual, bias = leaf(x), leaf(residual), leaf(bias)
        xd, rd, bd = exact(x), exact(residual), exact(bias)
        if with_bias:
            y = F.bias_dropout_add(x, bias, residual, p, seed=SEED)
            wanted = rd + dropped(xd + bd, mask, p)
            came = gradients(y, grad, x, residual, bias)
            references = gradients(wanted, grad.double(), xd, rd, bd)
        else:
            y = F.dropout_add(x, residual, p, seed=SEED)
            wanted = rd + dropped(xd, mask, p)
            came = gradients(y, grad, x, residual)
            references = gradients(wanted, grad.double(), xd, rd)
        assert y.dtype is dtype
        assert_close(y, wanted)
        assert torch.equal(came[1], grad)
        for g, reference in zip(came, references, strict=True):
            assert_close(g, reference)
        if p == 1.0:
            assert torch.equal(y, residual)


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation: str, p: float, dtype: torch.dtype, backend: Backend) -> None:
    for shape in ((0,), (1,), (63,), (5, 129)):
        x, grad = leaf(3 * make(shape, dtype, backend)), make(shape, dtype, backend)
        xd = exact(x)
        mask = mask_of(shape, p, backend)
        y = F.activation_dropout(x, p, activation, seed=SEED)
        wanted = dropped(ACTIVATIONS[activation](xd), mask, p)
        assert_close(y, wanted)
        (came,), (reference,) = gradients(y, grad, x), gradients(wanted, grad.double(), xd)
        assert_close(came, reference)
        assert torch.equal(came[~mask], torch.zeros_like(came[~mask]))


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", PROBABILITIES)
def test_drop_path_add(p: float, dtype: torch.dtype, backend: Backend) -> None:
    for shape in ((0, 4), (9,), (6, 33), (5, 2, 8, 4)):
        x, residual = leaf(make(shape, dtype, backend)), leaf(make(shape, dtype, backend))
        grad = make(shape, dtype, backend)
        xd, rd = exact(x), exact(residual)
        mask = mask_of(shape[:1], p, backend, 3).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        y = F.drop_path_add(x, residual, p, seed=SEED, index_offset=3)
        wanted = rd + dropped(xd, mask, p)
        assert_close(y, wanted)
        for g, reference in zip(
            gradients(y, grad, x, residual),
            gradients(wanted, grad.double(), xd, rd),
            strict=True,
        ):
            assert_close(g, reference)
        if len(shape) == 4:
            last = x.detach().contiguous(memory_format=torch.channels_last)
            again = F.drop_path_add(last, residual.detach(), p, seed=SEED, index_offset=3)
            assert torch.equal(again, y.detach())
            assert again.stride() == last.stride()


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", [0.5, 0.25, 0.1, 0.001])
def test_drop_path_add_of_misaligned_rows(p: float, dtype: torch.dtype, backend: Backend) -> None:
    # Around windows of 256 elements; rows shorter than the 8 that a thread draws for.
    for shape in ((1, 255), (9, 61), (4, 257), (300, 3)):
        x, residual = make(shape, dtype, backend), make(shape, dtype, backend)
        mask = mask_of(shape[:1], p, backend, 3).view(-1, 1).expand(shape)
        wanted = residual.double() + dropped(x.double(), mask, p)
        move = LAYOUTS["misaligned"]
        y = F.drop_path_add(move(x), move(residual), p, seed=SEED, index_offset=3)
        assert_close(y, wanted)
        assert torch.equal(y[~mask], residual[~mask])
        assert torch.equal(y, F.drop_path_add(x, residual, p, seed=SEED, index_offset=3))


@pytest.mark.parametrize("index_offset", [1, 8, 100, 2**40 + 5])
def test_index_offset_gives_a_shard_its_part(index_offset: int, backend: Backend) -> None:
    shape = (6, 77)
    x, residual = make(shape, torch.float32, backend), make(shape, torch.float32, backend)
    bias = leaf(make((77,), torch.float32, backend))
    mask = mask_of(shape, 0.4, backend, index_offset)
    y = F.bias_dropout_add(x, bias, residual, 0.4, seed=SEED, index_offset=index_offset)
    bd = exact(bias)
    wanted = residual.double() + dropped(x.double() + bd, mask, 0.4)
    assert_close(y, wanted)
    ones = torch.ones_like(y)
    (came,), (reference,) = gradients(y, ones, bias), gradients(wanted, ones.double(), bd)
    assert_close(came, reference)
    z = F.activation_dropout(x, 0.4, "silu", seed=SEED, index_offset=index_offset)
    assert_close(z, dropped(ACTIVATIONS["silu"](x.double()), mask, 0.4))


@pytest.mark.parametrize(
    ("columns", "rows"), [(1, 70_001), (10, 9000), (1000, 211), (1024, 130), (5003, 40)]
)
def test_the_biass_gradient_over_many_chunks(columns: int, rows: int, backend: Backend) -> None:
    if backend.on_host:
        rows = rows // 30 + 2
    x = make((rows, columns), torch.bfloat16, backend)
    bias = leaf(make((columns,), torch.bfloat16, backend))
    y = F.bias_dropout_add(x, bias, x, 0.3, seed=SEED)
    (came,) = gradients(y, x, bias)
    mask = fusereg.dropout_mask((rows, columns), 0.3, SEED, device=x.device)
    reference = dropped(x.double(), mask, 0.3).sum(0)
    # Sums of unrounded terms: one rounding to bfloat16, whatever the length.
    assert_close(came, reference)
    assert torch.allclose(came.double(), reference, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_good_to_the_last_places(activation: str, backend: Backend) -> None:
    """Element by element, into the tails; the reference is the kernel in float64."""
    n = 2001 if backend.on_host else 100_001
    x = torch.linspace(-13, 13, n, dtype=torch.float32, device=backend.device)
    units = 40 if activation == "gelu_tanh" else 6
    wanted = F.activation_dropout(x.double(), 0.0, activation)
    came = F.activation_dropout(x, 0.0, activation).double()
    near = x.abs() < 5
    eps = torch.finfo(torch.float32).eps
    assert ((came - wanted).abs() <= units * eps * wanted.abs())[near].all()
    if activation != "gelu_tanh":
        assert ((came - wanted).abs() <= units * eps * wanted.abs() + 1e-38).all()
    # And that one is torch's, where torch's does not cancel.
    reference = ACTIVATIONS[activation](x.double())
    assert torch.allclose(wanted, reference, rtol=2e-14, atol=1e-15)


def test_activations_at_the_ends(backend: Backend) -> None:
    ends = torch.tensor([math.inf, 1e30, -1e30, math.nan, 0.0, -0.0], device=backend.device)
    wanted = torch.tensor([math.inf, 1e30, 0.0, math.nan, 0.0, 0.0], device=backend.device)
    for activation in ACTIVATIONS:
        x = leaf(ends)
        y = F.activation_dropout(x, 0.0, activation)
        assert torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0)), activation
        (grad,) = gradients(y, torch.ones_like(y), x)
        assert grad[1] == 1.0
        assert grad[2] == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_dropped_inf_and_nan_become_zero(bad: float, dtype: torch.dtype, backend: Backend) -> None:
    x = torch.full((10, 20), bad, dtype=dtype, device=backend.device)
    residual = make((10, 20), dtype, backend)
    mask = mask_of((10, 20), 0.5, backend)
    y = F.bias_dropout_add(x, x[0].clone(), residual, 0.5, seed=SEED)
    assert torch.equal(y[~mask], residual[~mask])
    assert not y[mask].isfinite().any()
    for activation in ACTIVATIONS:
        z = F.activation_dropout(x, 0.5, activation, seed=SEED)
        assert torch.equal(z[~mask], torch.zeros_like(z[~mask]))
    rows = mask_of((10,), 0.5, backend)
    path = F.drop_path_add(x, residual, 0.5, seed=SEED)
    assert torch.equal(path[~rows], residual[~rows])
    assert torch.equal(F.dropout_add(x, residual, 1.0), residual)


# --- layouts, memory ------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "batch second": lambda t: t.transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "sliced": lambda t: t[:, :, 1:, ::2],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "negated": lambda t: torch.complex(t, t).conj().imag if t.dtype is torch.float32 else -t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = LAYOUTS[layout](make((3, 5, 4, 6), dtype, backend))
        shape = tuple(x.shape)
        residual, grad = make(shape, dtype, backend), make(shape, dtype, backend)
        like = torch.empty_like(x)
        mask = torch.empty_like(x, dtype=torch.bool)
        mask.as_strided((mask.numel(),), (1,)).copy_(mask_of((mask.numel(),), 0.4, backend))
        assert mask.stride() == like.stride()
        bias = leaf(make(shape[-1:], dtype, backend))
        x.requires_grad_()
        xd, bd = exact(x), exact(bias)
        y = F.bias_dropout_add(x, bias, residual, 0.4, seed=SEED)
        wanted = residual.double() + dropped(xd + bd, mask, 0.4)
        assert y.stride() == like.stride()
        assert_close(y, wanted)
        z = F.activation_dropout(x, 0.4, "gelu", seed=SEED)
        activated = dropped(ACTIVATIONS["gelu"](xd), mask, 0.4)
        assert_close(z, activated)
        for g in (grad, torch.ones((), dtype=dtype, device=grad.device).expand(shape)):
            came = [*gradients(y, g, x, bias), *gradients(z, g, x)]
            references = [
                *torch.autograd.grad(wanted, (xd, bd), g.double(), retain_graph=True),
                *torch.autograd.grad(activated, xd, g.double(), retain_graph=True),
            ]
            for a, b in zip(came, references, strict=True):
                assert_close(a, b)
            y = F.bias_dropout_add(x, bias, residual, 0.4, seed=SEED)
            z = F.activation_dropout(x, 0.4, "gelu", seed=SEED)


def test_in_place(dtype: torch.dtype, backend: Backend) -> None:
    start, residual = make((5, 70), dtype, backend), make((5, 70), dtype, backend)
    calls: list[Callable[..., Tensor]] = [
        lambda t, **k: F.dropout_add(t, residual, 0.4, seed=SEED, **k),
        lambda t, **k: F.drop_path_add(t, residual, 0.4, seed=SEED, **k),
        lambda t, **k: F.activation_dropout(t, 0.4, "relu", seed=SEED, **k),
        lambda t, **k: F.dropout_add(t, residual, 0.4, False, **k),
        lambda t, **k: F.activation_dropout(t, 0.4, "relu", False, **k),
    ]
    for call in calls:
        first, second = leaf(start), leaf(start)
        x = first * 1
        version = x._version
        y, wanted = call(x, inplace=True), call(second)
        assert y is x
        assert x._version > version
        assert torch.equal(y, wanted)
        assert torch.equal(*gradients(y, residual, first), *gradients(wanted, residual, second))
        with torch.no_grad():
            out, own = torch.full_like(start, 3.0), start.clone()
            version = out._version
            assert call(start, out=out) is out
            assert out._version > version
            assert torch.equal(call(own, out=own), wanted)
        assert torch.equal(out, wanted)
    for activation in ("gelu", "gelu_tanh", "silu"):
        x = start.clone()
        y = F.activation_dropout(x, 0.4, activation, inplace=True, seed=SEED)
        assert y is x
        assert torch.equal(y, F.activation_dropout(start, 0.4, activation, seed=SEED))
    own = residual.clone()
    with torch.no_grad():
        y = F.bias_dropout_add(start, start[0], residual, 0.4, seed=SEED)
        assert torch.equal(F.bias_dropout_add(start, start[0], own, 0.4, seed=SEED, out=own), y)
    strided = torch.full((70, 5), 3.0, dtype=dtype, device=start.device).t()
    assert torch.equal(
        F.bias_dropout_add(start, start[0], residual, 0.4, seed=SEED, out=strided), y
    )


# --- the arguments --------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    x, bias = torch.randn(4, 6), torch.randn(6)
    residual: Any = torch.randn(4, 6)
    f: Callable[..., Tensor] = F.bias_dropout_add
    cases: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
        (lambda: f(x, bias[:5], x), ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        (lambda: f(x, x, x), ValueError, r"bias must have shape \(6,\), got \(4, 6\)"),
        (lambda: f(x, bias, x[0]), ValueError, r"residual must have shape \(4, 6\), got \(6,\)"),
        (lambda: f(x, bias.double(), x), ValueError, r"bias must be torch.float32 on cpu as x is"),
        (lambda: f(x, bias, x.half()), ValueError, "residual must be torch.float32 on cpu as x"),
        (lambda: f(x, 1.0, x), TypeError, r"bias must be a torch\.Tensor, got float"),
        (lambda: f(x, bias, None), TypeError, r"residual must be a torch\.Tensor, got NoneType"),
        (lambda: f(3, bias, x), TypeError, r"x must be a torch\.Tensor, got int"),
        (lambda: f(x[0, 0], bias, x[0, 0]), ValueError, "x must have at least 1 dimension, got 0"),
        (lambda: f(x.int(), bias, x), ValueError, r"x has dtype torch.int32; wanted float64"),
        (lambda: f(x, bias, x, 1.5), ValueError, r"p must be within \[0, 1\], got 1.5"),
        (lambda: f(x, bias, x, "0"), TypeError, "p must be a number, got str"),
        (lambda: f(x, bias, x, seed=1.5), TypeError, "seed must be an integer"),
        (lambda: f(x, bias, x, seed=1, index_offset=-1), ValueError, "index_offset must be an int"),
        (lambda: f(x, bias, x, out=x[0]), ValueError, "out must be torch.float32 of shape"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=rf"fusereg\.bias_dropout_add: {text}"):
            call()
    whole = torch.randn(9, 6)
    for out, text in (
        (whole[1:5], "residual and out overlap"),
        (whole[5:], "bias and out overlap"),
    ):
        with pytest.raises(ValueError, match=text):
            f(x, whole[5], whole[:4], out=out)
    with pytest.raises(ValueError, match="out= supports no gradients, and bias requires one"):
        f(x, leaf(bias), residual, out=torch.empty_like(x))
    with pytest.raises(ValueError, match="residual and x overlap"):
        F.dropout_add(whole[1:5], whole[:4], inplace=True)
    with pytest.raises(ValueError, match="leaf that requires a gradient"):
        F.dropout_add(leaf(x), residual, inplace=True)
    with pytest.raises(ValueError, match="inplace and out exclude each other"):
        F.dropout_add(x, residual, inplace=True, out=x)
    with pytest.raises(ValueError, match=r"drop_path_add: x must have at least 1 dimension"):
        F.drop_path_add(x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_tanh, silu"):
        F.activation_dropout(x, activation="tanh")
    for activation in ("gelu", "gelu_tanh", "silu"):
        with pytest.raises(ValueError, match=f"{activation} in place overwrites x, which its grad"):
            F.activation_dropout(leaf(x) * 1, 0.5, activation, inplace=True)
    with pytest.raises(ValueError, match="activation must be relu, gelu"):
        fusereg._C.activation_dropout_forward(x, x, "tanh", 1, 0, 0.5, 0, "a")
    with pytest.raises(ValueError, match="partials must be float64"):
        fusereg._C.fused_dropout_bias_backward(x, bias, x, bias, None, 1, 0, 0.5, 0, "a")


def test_an_error_draws_nothing_and_evaluation_neither() -> None:
    x = torch.randn(4, 6)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="residual must have shape"):
        F.dropout_add(x, x[0])
    with pytest.raises(ValueError, match="activation must be one of"):
        F.activation_dropout(x, activation="no")
    F.dropout_add(x, x, 0.0)
    F.drop_path_add(x, x, training=False)
    F.activation_dropout(x, 0.5, "silu", False)
    assert torch.equal(torch.get_rng_state(), state)
