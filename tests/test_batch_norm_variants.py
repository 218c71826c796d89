"""Ghost, renormalized and frozen batch normalization."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusereg
from conftest import TOLERANCES, Backend
from fusereg.nn import BatchNorm2d, BatchRenorm, FrozenBatchNorm, GhostBatchNorm, SyncBatchNorm
from plain_models import TimmAct


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        found.cpu().double(), wanted.cpu().double(), atol=tolerance * scale, rtol=0.0
    )


def randomized(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, values in (*layer.named_parameters(), *layer.named_buffers()):
            if values.is_floating_point():
                values.copy_(torch.rand_like(values) + (0.5 if "var" in name else -0.4))
    return layer


# --- ghost ----------------------------------------------------------------------------------------


def by_loop(x: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    parts = [nn.functional.batch_norm(p, None, None, weight, bias, True) for p in x.split(size)]
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("shape", "size", "form"),
    [
        ((8, 5, 4, 3), 4, torch.contiguous_format),
        ((8, 5, 4, 3), 3, torch.channels_last),
        ((7, 16, 5), 3, torch.contiguous_format),
        ((6, 3), 2, torch.contiguous_format),
        ((4, 3, 2), 9, torch.contiguous_format),
    ],
    ids=str,
)
def test_ghost(
    backend: Backend,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    size: int,
    form: torch.memory_format,
) -> None:
    x = torch.randn(shape).add(3.0).to(backend.device, dtype).contiguous(memory_format=form)
    x.requires_grad_()
    layer = randomized(GhostBatchNorm(shape[1], virtual_batch_size=size, activation="relu"))
    layer.to(backend.device, torch.float64 if dtype is torch.float64 else torch.float32)
    double = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    wanted = by_loop(double, weight, bias, size).relu()
    grad = torch.randn(shape, device=backend.device).to(dtype)
    wanted.backward(grad.double())
    mean = layer.running_mean.double() * 0.9 + 0.1 * double.detach().transpose(0, 1).flatten(
        1
    ).mean(1)
    y = layer(x)
    y.backward(grad)
    tolerance = 10 * TOLERANCES[dtype]
    close(y.detach(), wanted.detach(), tolerance)
    assert x.grad is not None
    close(x.grad, double.grad, tolerance)
    close(layer.weight.grad, weight.grad, tolerance)
    close(layer.bias.grad, bias.grad, tolerance)
    close(layer.running_mean, mean, 1e-6)
    assert int(layer.num_batches_tracked) == 1
    layer.eval()
    running = nn.functional.batch_norm(
        double.detach(), layer.running_mean.double(), layer.running_var.double(), weight, bias
    ).relu()
    close(layer(x.detach()), running.detach(), tolerance)


def test_ghost_is_differentiable_twice() -> None:
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    layer = GhostBatchNorm(3, virtual_batch_size=2, dtype=torch.float64, update_stats=False)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fusereg.functional.batch_norm(
            x, None, None, weight, bias, True, virtual_batch_size=2, activation="leaky_relu"
        )

    randomized(layer)
    arguments = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


@pytest.mark.parametrize(
    ("size", "error", "text"),
    [
        (0, ValueError, "virtual_batch_size must be positive, got 0"),
        (2.0, TypeError, "virtual_batch_size must be an integer, got float"),
        (True, TypeError, "virtual_batch_size must be an integer, got bool"),
    ],
)
def test_a_bad_virtual_batch_size(size: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        GhostBatchNorm(4, virtual_batch_size=size)
    with pytest.raises(error, match=text.replace("integer", "integer or None")):
        fusereg.functional.batch_norm(
            torch.ones(3, 4), None, None, training=True, virtual_batch_size=size
        )


def test_a_virtual_batch_of_one_value_is_refused_and_changes_nothing() -> None:
    layer = GhostBatchNorm(4, virtual_batch_size=2)
    with pytest.raises(ValueError, match="a batch of 5 in parts of 2 leaves one with 1"):
        layer(torch.randn(5, 4))
    assert int(layer.num_batches_tracked) == 0
    assert not layer.running_mean.any()


# --- renormalization ------------------------------------------------------------------------------


def renormalized(layer: BatchRenorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's algorithm in float64."""
    dims = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(dims)
    std = (x.var(dims, correction=0) + layer.eps).sqrt()
    run_mean = layer.running_mean.double()
    run_std = (layer.running_var.double() + layer.eps).sqrt()
    r = (std / run_std).detach().clamp(1 / layer.r_max, layer.r_max)
    d = ((mean - run_mean) / run_std).detach().clamp(-layer.d_max, layer.d_max)
    y = (x - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)
    return y * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.3), (100.0, 100.0)], ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (9, 4)], ids=str)
def test_renorm(backend: Backend, shape: tuple[int, ...], limits: tuple[float, float]) -> None:
    layer = BatchRenorm(shape[1], r_max=limits[0], d_max=limits[1]).to(backend.device)
    randomized(layer)
    x = torch.randn(shape, device=backend.device).mul(1.5).add(0.7).requires_grad_()
    double = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    wanted = renormalized(layer, double, weight, bias)
    grad = torch.randn(shape, device=backend.device)
    wanted.backward(grad.double())
    old = layer.running_mean.clone()
    y = layer(x)
    y.backward(grad)
    close(y.detach(), wanted.detach(), 2e-6)
    assert x.grad is not None
    close(x.grad, double.grad, 2e-6)
    close(layer.weight.grad, weight.grad, 2e-6)
    close(layer.bias.grad, bias.grad, 2e-6)
    mean = double.detach().mean([0, *range(2, x.dim())])
    close(layer.running_mean, 0.9 * old.double() + 0.1 * mean, 1e-6)
    if limits == (1.0, 0.0):
        plain = nn.functional.batch_norm(double, None, None, weight, bias, True)
        close(y.detach(), plain.detach(), 2e-6)
    if limits == (100.0, 100.0):
        # Nothing is clipped: what evaluation would have given with the statistics before.
        evaluated = copy.deepcopy(layer).eval()
        evaluated.running_mean.copy_(old)
        evaluated.running_var.copy_(
            (layer.running_var - 0.1 * double.detach().float().transpose(0, 1).flatten(1).var(1))
            / 0.9
        )
        close(y.detach(), evaluated(x.detach()), 2e-5)


def test_renorm_compiles_whole() -> None:
    layer = randomized(BatchRenorm(4))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4, 3)
    y, wanted = compiled(x), twin(x)
    y.sum().backward()
    wanted.sum().backward()
    close(y.detach(), wanted.detach(), 1e-6)
    close(layer.weight.grad, twin.weight.grad, 1e-5)
    close(layer.running_var, twin.running_var, 1e-6)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"r_max": 0.5}, "r_max must be at least 1, got 0.5"),
        ({"d_max": -1.0}, "d_max must be at least 0, got -1.0"),
        ({"r_max": float("nan")}, "r_max must be at least 1, got nan"),
        ({"track_running_stats": False}, "track_running_stats must be True"),
    ],
    ids=str,
)
def test_bad_limits(limits: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BatchRenorm(4, **limits)


# --- frozen ---------------------------------------------------------------------------------------


def test_frozen(backend: Backend) -> None:
    layer = randomized(nn.BatchNorm2d(6)).to(backend.device)
    frozen = FrozenBatchNorm.from_batch_norm(layer)
    assert not list(frozen.parameters())
    x = torch.randn(3, 6, 4, 5, device=backend.device, requires_grad=True)
    y = frozen(x)
    assert frozen.training
    layer.eval()
    double = x.detach().double().requires_grad_()
    wanted = copy.deepcopy(layer).double()(double)
    close(y.detach(), wanted.detach(), 1e-6)
    grad = torch.randn_like(x)
    y.backward(grad)
    wanted.backward(grad.double())
    assert x.grad is not None
    close(x.grad, double.grad, 1e-6)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen(x)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_frozen_loads_a_batch_norm_s_state() -> None:
    layer = randomized(nn.BatchNorm2d(6))
    frozen = FrozenBatchNorm(6)
    frozen.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 3, 3)
    close(frozen(x), layer.eval()(x), 1e-6)
    assert "num_batches_tracked" not in frozen.state_dict()
    with pytest.raises(ValueError, match="no running statistics to freeze"):
        FrozenBatchNorm.from_batch_norm(nn.BatchNorm2d(6, track_running_stats=False))


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.BatchNorm1d(6), nn.BatchNorm3d(6), nn.SyncBatchNorm(6), SyncBatchNorm(6)),
        *(GhostBatchNorm(6), BatchRenorm(6), nn.BatchNorm2d(6, affine=False)),
        BatchNorm2d(6, activation="leaky_relu", negative_slope=0.3),
        fusereg.convert(nn.BatchNorm2d(6)),
        TimmAct(6, act=nn.Identity()),
        TimmAct(6, act=nn.SiLU(inplace=True)),
        fusereg.convert(TimmAct(6, act=nn.LeakyReLU(0.3))),
        SyncBatchNorm.convert_sync_batchnorm(TimmAct(6, act=nn.SiLU())),
    ],
    ids=repr,
)
def test_every_known_layer_can_be_frozen(layer: nn.Module) -> None:
    layer = randomized(copy.deepcopy(layer))
    frozen = FrozenBatchNorm.from_batch_norm(layer)
    size = {nn.BatchNorm1d: (3,), nn.BatchNorm3d: (3, 2, 2)}.get(type(layer), (3, 2))
    x = torch.randn(2, 6, *size)
    close(frozen(x), layer.eval()(x), 1e-6)


def _with(layer: nn.Module, hook: Callable[[nn.Module], object]) -> nn.Module:
    hook(layer)
    return layer


NOT_FROZEN: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    **{
        cls.__name__: (
            lambda cls=cls: type("Own", (cls,), {"__module__": __name__})(6),
            TypeError,
            "Own is a class that fusereg does not know",
        )
        for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d, TimmAct)
    },
    "no batch norm": (lambda: nn.GroupNorm(2, 6), TypeError, "GroupNorm is a class that fusereg"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), TypeError, "LazyBatchNorm2d is a class"),
    "parametrized": (
        lambda: parametrize.register_parametrization(nn.BatchNorm2d(6), "weight", nn.Identity()),
        TypeError,
        "ParametrizedBatchNorm2d is a class",
    ),
    "activation": (lambda: TimmAct(6, act=nn.Hardswish()), ValueError, "Hardswish.*would be lost"),
    "slope": (lambda: TimmAct(6, act=nn.GELU("tanh")), ValueError, "GELU.*would be lost"),
    "drop": (lambda: TimmAct(6, drop=nn.Dropout2d(0.1)), ValueError, "Dropout2d.*would be lost"),
    "dropout": (lambda: BatchNorm2d(6, dropout=0.1), ValueError, "dropout=0.1, which would be"),
    "hook": (
        lambda: _with(nn.BatchNorm2d(6), lambda m: m.register_forward_hook(lambda *_: None)),
        ValueError,
        "the layer has hooks",
    ),
    "backward hook": (
        lambda: _with(nn.BatchNorm2d(6), lambda m: m.register_full_backward_hook(lambda *_: None)),
        ValueError,
        "the layer has hooks",
    ),
    "activation of a synchronized one": (
        lambda: SyncBatchNorm.convert_sync_batchnorm(TimmAct(6, act=nn.Hardswish())),
        ValueError,
        "Hardswish.*would be lost",
    ),
    "forward": (
        lambda: _with(nn.BatchNorm2d(6), lambda m: setattr(m, "forward", torch.relu)),
        ValueError,
        "the layer has hooks, or a forward that is set on the object",
    ),
}


@pytest.mark.parametrize("name", NOT_FROZEN)
def test_what_freezing_would_change_is_refused(name: str) -> None:
    make, kind, text = NOT_FROZEN[name]
    with pytest.raises(kind, match=text):
        FrozenBatchNorm.from_batch_norm(make())  # type: ignore[arg-type]
