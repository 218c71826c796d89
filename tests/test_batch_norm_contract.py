"""What batch normalization promises beyond its values: combinations, what is kept, no copies."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from conftest import TOLERANCES, Backend
from fusereg import _C, dropout_mask
from fusereg import functional as F
from fusereg.batch_norm import kernels
from fusereg.batch_norm.kernels import Call, Constants, Inputs
from fuzz_values import strided_copy
from test_batch_norm import SLOPE, activate, assert_near, exact, make, ours


def test_every_combination_of_the_epilogue(backend: Backend) -> None:
    """Activation, residual, dropout and mask, in both layouts, against their composition."""
    shape, p = (4, 3, 5, 7), 0.25
    keep = torch.rand(4, 5, 7) > 0.3
    for activation, residual, dropout, masked, channels_last in itertools.product(
        (None, "relu", "leaky_relu", "silu", "gelu"),
        (False, True),
        (0.0, p),
        (False, True),
        (False, True),
    ):
        if masked and not dropout:
            continue
        case = make(shape, torch.float32, backend, channels_last, residual)
        found = ours(
            case, True, activation, dropout=dropout, seed=11,
            mask=keep.to(backend.device) if masked else None,
        )  # fmt: skip
        factors = torch.ones(shape, dtype=torch.float64)
        if dropout:
            drawn = dropout_mask((case.x.numel(),), p, 11)
            drawn = drawn.view(4, 5, 7, 3).movedim(3, 1) if channels_last else drawn.view(shape)
            factors = drawn.double() / (1 - p)
        every = keep.unsqueeze(1).expand(shape) if masked else torch.ones(shape, dtype=torch.bool)
        names = ["x", "weight", "bias", *(["residual"] if residual else [])]
        leaves = {
            n: getattr(case, n).detach().double().cpu().contiguous().requires_grad_() for n in names
        }
        count = every[:, 0].sum()
        x = leaves["x"]
        center = (x * every).sum((0, 2, 3), keepdim=True) / count
        variance = ((x - center).square() * every).sum((0, 2, 3), keepdim=True) / count
        z = (x - center) / (variance + 1e-3).sqrt()
        z = z * leaves["weight"].view(1, -1, 1, 1) + leaves["bias"].view(1, -1, 1, 1)
        z = z + leaves["residual"] if residual else z
        y = activate(z, activation) * factors * every
        gradients = torch.autograd.grad(y, list(leaves.values()), case.gradient.double().cpu())
        wanted = {"y": y.detach()}
        wanted |= {f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}
        assert_near({n: found[n] for n in wanted}, wanted, torch.float32, 4.0)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_kept_for_backward(activation: str | None, residual: bool) -> None:
    """X and the statistics; one bit an element for a rectifier after a residual."""
    channels, each = 8, 16 * 20 * 20
    x = torch.randn(16, channels, 20, 20, requires_grad=True)
    more = torch.randn_like(x).requires_grad_() if residual else None
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.batch_norm(
            x, None, None, weight, bias, activation=activation, residual=more, training=True,
            dropout=0.3, seed=3,
        )  # fmt: skip
    assert kept.pop(x.data_ptr()) == 4 * channels * each
    if residual and activation in ("silu", "gelu"):
        assert kept.pop(more.data_ptr()) == 4 * channels * each  # type: ignore[union-attr]
    bits = each * channels // 8 if residual and activation in ("relu", "leaky_relu") else 0
    assert sum(kept.values()) == bits + channels * (3 * 8 + 4 + 4)


FORMS = {
    "NC": lambda: torch.randn(6, 5),
    "NCL": lambda: torch.randn(6, 5, 7),
    "NCHW": lambda: torch.randn(4, 5, 6, 7),
    "NCDHW": lambda: torch.randn(2, 5, 3, 4, 5),
    "channels_last": lambda: torch.randn(4, 5, 6, 7).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 5, 3, 4, 5).to(memory_format=torch.channels_last_3d),
    "NLC": lambda: torch.randn(4, 7, 5).transpose(1, 2),
    "CNHW": lambda: torch.randn(5, 4, 6, 7).transpose(0, 1),
    "NHCW": lambda: torch.randn(4, 6, 5, 7).transpose(1, 2),
    "N1HW": lambda: torch.randn(4, 1, 6, 7),
    "NC11": lambda: torch.randn(4, 5, 1, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_dense_layouts_are_read_as_they_lie(form: str) -> None:
    x = FORMS[form]()
    layout = _C.batch_norm_layout(x, 0, False)
    assert layout is not None, "a copy would be made"
    outer, channels, inner, statistics, _ = layout
    assert channels == statistics == x.shape[1]
    assert outer * channels * inner == x.numel()
    y = F.batch_norm(x, None, None)
    wanted = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=0.0)


@pytest.mark.all_cases("host")
@pytest.mark.sanitizer
def test_signs_are_taken_from_no_memory_past_the_end(dtype: torch.dtype, backend: Backend) -> None:
    """Short lines of bits, in tensors after which there is no memory that may be touched."""
    if backend.device.type != "cpu":
        pytest.skip("memory of the host")
    for shape in ((2, 8, 4), (2, 16, 2), (3, 4, 2, 4), (1, 32, 3), (2, 64, 31), (4, 32), (4, 3, 5)):
        x, residual, grad = (strided_copy(torch.randn(shape).to(dtype)) for _ in range(3))
        y = strided_copy(torch.zeros_like(x))
        call = Call(Inputs(x, residual), Constants(activation=1))
        assert kernels.forward(call, True, y) is y
        found = kernels.backward(call, grad, (True, True, False, False))
        assert found.x is not None
        assert found.residual is not None
        twin = [t.double().requires_grad_() for t in (x, residual)]
        wanted = nn.functional.batch_norm(twin[0], None, None, training=True) + twin[1]
        gradients = torch.autograd.grad(wanted.relu(), twin, grad.double())
        for came, right in zip(
            (y, found.x, found.residual), (wanted.relu(), *gradients), strict=True
        ):
            assert float((came.double() - right).abs().max()) < 100 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_16_bit_sums_are_not_rounded_on_the_way(
    dtype: torch.dtype, channels_last: bool, backend: Backend
) -> None:
    """Statistics and gradients of float32 parameters are right to float32, however many terms."""
    shape = (8, 3, 17, 19) if backend.on_host else (64, 3, 40, 41)
    case = make(shape, dtype, backend, channels_last)
    case = case._replace(x=(case.x + 7).to(dtype), gradient=(case.gradient + 1).to(dtype))
    found = ours(case, True, None)
    wanted = exact(case, True, None)
    names = ("mean", "var", "grad_weight", "grad_bias")
    assert all(found[n].dtype is torch.float32 for n in names)
    for name in names:
        scale = float(wanted[name].abs().max())
        error = float((found[name].double().cpu() - wanted[name]).abs().max()) / scale
        # grad_weight is a sum of terms of either sign, whose rounding grows with their number.
        assert error < (20 if name == "grad_weight" else 2) * TOLERANCES[torch.float32], name


def test_many_samples_of_one_value(backend: Backend) -> None:
    """N x C, N x C x 1 x 1: more samples than any grid has blocks in one dimension."""
    count = 5_000 if backend.on_host else 70_001
    for shape in ((count, 3), (count, 3, 1, 1)):
        for training in (True, False):
            case = make(shape, torch.float32, backend)
            wanted = exact(case, training, "leaky_relu")
            assert_near(ours(case, training, "leaky_relu"), wanted, torch.float32, 4.0)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends(momentum: float) -> None:
    x = torch.randn(20, 3)
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    F.batch_norm(x, mean, var, training=True, momentum=momentum)
    if momentum == 0.0:
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
    else:
        torch.testing.assert_close(mean, x.mean(0))
        torch.testing.assert_close(var, x.var(0))


def test_slope_is_the_layer_s_own() -> None:
    layer = nn.Sequential(nn.BatchNorm1d(3), nn.LeakyReLU(SLOPE))
    x = torch.randn(9, 3)
    y = F.batch_norm(x, None, None, activation="leaky_relu", negative_slope=SLOPE)
    torch.testing.assert_close(y, layer(x))
