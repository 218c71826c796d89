"""Batch normalization inside torch: modules, derivatives, compile, export, operators."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusereg
from fusereg import functional as F
from fusereg.batch_norm import op as ops
from fusereg.batch_norm import sync_op
from fusereg.batch_norm.kernels import COMPUTE, Call, Constants, Inputs

MODULES: dict[str, tuple[int, ...]] = {
    "BatchNorm1d": (6, 5, 7),
    "BatchNorm2d": (4, 5, 3, 2),
    "BatchNorm3d": (3, 5, 2, 3, 2),
}


@pytest.fixture(params=MODULES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def pair(name: str, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(nn, name)(5, **arguments)
    if theirs.weight is not None:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = getattr(fusereg.nn, name)(5, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": None},
        {"momentum": 1.0, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_modules_are_torchs(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = pair(name, **arguments)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    for step in range(5):
        x = torch.randn(MODULES[name]) * (1 + step) + step
        if step == 3:
            ours.eval()
            theirs.eval()
        assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        state = ours.state_dict()
        for key, value in theirs.state_dict().items():
            assert torch.allclose(state[key], value, rtol=1e-5, atol=1e-6), key
            assert state[key].dtype is value.dtype
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))


def test_what_is_fused_is_in_the_repr() -> None:
    layer = fusereg.nn.BatchNorm2d(4, activation="leaky_relu", dropout=0.1, update_stats=False)
    assert "activation='leaky_relu', negative_slope=0.01, dropout=0.1" in repr(layer)
    assert "update_stats=False" in repr(layer)


def test_residual_activation_and_dropout_in_a_module() -> None:
    layer = fusereg.nn.BatchNorm2d(5, activation="relu", dropout=0.5)
    plain = nn.BatchNorm2d(5)
    x, residual = torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7)
    wanted = (plain(x) + residual).relu()
    torch.manual_seed(3)
    y = layer(x, residual)
    assert torch.equal(y == 0, (y == 0) | (wanted == 0))
    kept = y != 0
    assert 0.3 < kept[wanted > 0].float().mean() < 0.7
    assert torch.allclose(y[kept], 2 * wanted[kept], rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(copy.deepcopy(layer)(x, residual), y)
    wanted = (plain.eval()(x) + residual).relu()
    assert torch.allclose(layer.eval()(x, residual), wanted, atol=1e-5)


def test_update_stats_off_leaves_everything() -> None:
    layer = fusereg.nn.BatchNorm1d(3, update_stats=False)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(8, 3))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_empty_batch_leaves_the_running_statistics() -> None:
    for shape in ((0, 5), (0, 5, 3, 2), (2, 5, 0, 3)):
        mean, var = torch.randn(5), torch.rand(5)
        before = mean.clone(), var.clone()
        weight = torch.ones(5, requires_grad=True)
        x = torch.empty(shape, requires_grad=True)
        y = F.batch_norm(x, mean, var, weight, None, True)
        assert y.shape == shape
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros(5))  # type: ignore[arg-type]


def test_in_eval_a_later_update_is_noticed() -> None:
    """Backward would read statistics that are no longer those of forward."""
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3, requires_grad=True)
    y = F.batch_norm(x, mean, var, torch.ones(3, requires_grad=True))
    F.batch_norm(x.detach(), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_gradgradcheck(activation: str | None, training: bool) -> None:
    shape = (3, 2, 3, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.5

    def f(*tensors: Tensor) -> Tensor:
        x, weight, bias, *more = tensors
        return F.batch_norm(
            x,
            mean,
            var,
            weight,
            bias,
            training,
            0.0,
            activation=activation,
            residual=more[0] if more else None,
            dropout=0.3,
            seed=5,
        )

    for inputs in ((x, weight, bias), (x, weight, bias, residual)):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_a_shortcut_gets_its_own_gradient_where_that_may_be_differentiated(
    activation: str | None,
) -> None:
    """The input was computed from the shortcut, as in a residual block."""
    shortcut = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    y = F.batch_norm(
        shortcut.sin(), None, None, training=True, activation=activation, residual=shortcut
    )
    grad = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, shortcut, grad, retain_graph=True)
    (came,) = torch.autograd.grad(y, shortcut, grad, create_graph=True)
    torch.testing.assert_close(came, wanted)


def test_gradient_penalty() -> None:
    """As WGAN-GP: the norm of a gradient is trained on."""

    def penalty(norm: type[nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.LeakyReLU(), nn.Conv2d(4, 1, 3))
        x = torch.randn(3, 2, 8, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    for ours, theirs in zip(penalty(fusereg.nn.BatchNorm2d), penalty(nn.BatchNorm2d), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_batched_gradients_are_those_of_each(activation: str, training: bool) -> None:
    x, residual = (torch.randn(4, 3, 2, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, requires_grad=True)
    epilogue: dict[str, Any] = {"activation": activation, "residual": residual, "dropout": 0.3}
    y = F.batch_norm(x, torch.zeros(3), torch.ones(3), weight, None, training, seed=3, **epilogue)
    leaves, directions = (x, weight, residual), torch.randn(5, *x.shape)

    def gradients(direction: Tensor, **more: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, direction, retain_graph=True, **more)

    alone = [torch.stack(g) for g in zip(*map(gradients, directions), strict=True)]
    for found in (gradients(directions, is_grads_batched=True), torch.vmap(gradients)(directions)):
        for one, wanted in zip(found, alone, strict=True):
            assert torch.equal(one, wanted)


def _checkpointed(layer: Any, x: Tensor, reentrant: bool) -> Tensor:
    """The layer under activation checkpointing, with statistics of the first pass alone."""

    @contextmanager
    def statistics_off() -> Iterator[None]:
        layer.update_stats = False
        try:
            yield
        finally:  # the second pass is broken off once it has made what was asked for
            layer.update_stats = True

    def first_pass_alone(t: Tensor) -> Tensor:
        layer.update_stats = not torch.is_grad_enabled()  # the first pass has no gradients
        result: Tensor = layer(t)
        return result

    result: Tensor = (
        checkpoint(first_pass_alone, x, use_reentrant=True)
        if reentrant
        else checkpoint(
            layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_off())
        )
    )
    return result


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_with_the_opt_out_counts_a_batch_once(
    reentrant: bool, momentum: float | None
) -> None:
    layer = fusereg.nn.BatchNorm1d(3, momentum=momentum, activation="relu")
    twin = copy.deepcopy(layer)
    for _ in range(2):
        x = torch.randn(8, 3)
        own, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        _checkpointed(layer, own, reentrant).square().sum().backward()
        twin(plain).square().sum().backward()
        assert torch.equal(own.grad, plain.grad)
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    for name, value in twin.named_buffers():
        assert torch.equal(layer.get_buffer(name), value), name
    assert int(layer.num_batches_tracked) == 2


def test_checkpointing_without_it_counts_twice_as_torch_does() -> None:
    for layer in (fusereg.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)):
        x = torch.randn(8, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert int(layer.num_batches_tracked) == 2


# --- operators, compile, export -------------------------------------------------------------------

_OPS = torch.ops.fusereg
_CONSTANTS = Constants(COMPUTE, 1e-5, 0, 1, 0.1, 0.25, 3)


@pytest.mark.slow  # a sample of it is in test_contract.py
def test_opcheck_batch_norm_backward() -> None:
    x, grad, weight = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(4)
    moments = _OPS.batch_norm_statistics(x, None, 0)
    seed = torch.tensor([1, 0])
    inputs = Inputs(x, None, None, weight, None, moments, None, None, seed)
    for wanted, reduce, sums in (
        ([True, True, True, False], True, None),
        ([True, False, False, False], False, torch.randn(2, 4, dtype=torch.float64)),
    ):
        torch.library.opcheck(
            _OPS.batch_norm_backward.default,
            (grad, *inputs, None, sums, *_CONSTANTS, wanted, reduce),
        )


class Net(nn.Module):
    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = fusereg.nn.BatchNorm2d(6, momentum=momentum, activation="relu")
        self.again = fusereg.nn.BatchNorm2d(6, momentum=momentum, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        result: Tensor = self.again(y * 2, residual=y)
        return result


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_fullgraph_updates_the_statistics(momentum: float | None) -> None:
    eager = Net(momentum)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 2, 6, 6)
        found, wanted = compiled(x), eager(x)
        assert torch.allclose(found, wanted, atol=1e-6)
        found.sum().backward()
        wanted.sum().backward()
    for (key, value), other in zip(
        model.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        assert torch.allclose(value, other, atol=1e-6), key
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    model.eval()
    eager.eval()
    assert torch.allclose(compiled(x), eager(x), atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_compiled_code_passes_a_nan_s_gradient_as_eager_calls(activation: str) -> None:
    x, grad = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    residual = torch.randn(4, 3, 5)
    residual[1, 2, 3] = torch.nan

    def gradients(function: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, None, None, True, residual=residual, **options)

    options: dict[str, Any] = {"activation": activation, "negative_slope": 0.5}
    torch._dynamo.reset()
    found = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for got, wanted in zip(found, gradients(call), strict=True):
        assert torch.equal(got, wanted)
    assert found[1][1, 2, 3] == grad[1, 2, 3] * (1.0 if activation == "relu" else 0.5)


# --- the pieces for other kinds -------------------------------------------------------------------


def test_given_moments_and_reduced_sums_are_the_whole_batchs() -> None:
    """Two halves of a batch, as two processes would see them."""
    x = torch.randn(6, 3, 4, requires_grad=True)
    weight = torch.randn(3, requires_grad=True)
    gradient = torch.randn(6, 3, 4)
    whole = F.batch_norm(x, None, None, weight, activation="relu")
    wanted = torch.autograd.grad(whole, (x, weight), gradient)

    moments = ops.statistics(x)
    constants = Constants(activation=1)
    halves, sums, parts = x.split(3), [], []

    def remember(local: Tensor) -> Tensor:
        sums.append(local)
        return local

    for half, g in zip(halves, gradient.split(3), strict=True):
        call = Call(Inputs(half, weight=weight), constants)
        y = sync_op.normalize(call, moments, remember)
        torch.autograd.grad(y, (half, weight), g)
    total = sums[0] + sums[1]
    for half, g in zip(halves, gradient.split(3), strict=True):
        call = Call(Inputs(half, weight=weight), constants)
        y = sync_op.normalize(call, moments, lambda _: total)
        parts.append(torch.autograd.grad(y, (half, weight), g))
    assert torch.allclose(torch.cat([p[0] for p in parts]), wanted[0], atol=1e-5)
    assert torch.allclose(parts[0][1] + parts[1][1], wanted[1], rtol=1e-4, atol=1e-5)


def test_groups_are_batches_of_their_own() -> None:
    x = torch.randn(7, 3, 4, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    inputs = Inputs(x, running_mean=mean, running_var=var)
    y = ops.normalize(Call(inputs, Constants(group_samples=3, activation=1), momentum=1.0))
    parts = [F.batch_norm(p, None, None, activation="relu") for p in x.split(3)]
    assert torch.allclose(y, torch.cat(parts), atol=1e-6)
    (found,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(torch.cat(parts).square().sum(), x)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(mean, x.mean((0, 2)), atol=1e-6)
    assert torch.allclose(var, x.var((0, 2)), atol=1e-6)
    assert ops.statistics(x, None, 3).shape == (3, 9)


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("of_x", "of_residual"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.half, torch.bfloat16),
    ],
)
def test_autocast_takes_a_residual_of_any_dtype(
    of_x: torch.dtype, of_residual: torch.dtype, training: bool
) -> None:
    layer = fusereg.nn.BatchNorm2d(4, activation="relu").train(training)
    plain = nn.BatchNorm2d(4).train(training)
    x = torch.randn(3, 4, 5, 5, dtype=of_x, requires_grad=True)
    residual = torch.randn(3, 4, 5, 5, dtype=of_residual, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, residual)
        wanted = (plain(x.float()) + residual.float()).relu()
        assert y.dtype is torch.float32  # of torch's sum
        torch.testing.assert_close(y, wanted)
        assert torch.equal(compiled(x, residual), layer(x, residual))
    for grad, t in zip(torch.autograd.grad(y.sum(), (x, residual)), (x, residual), strict=True):
        assert grad.dtype is t.dtype
    with pytest.raises(ValueError, match="residual must be"):
        layer(x, residual)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_gradient_penalty_is_torchs_where_nothing_depends_on_x(
    activation: str | None, training: bool, affine: bool, has_residual: bool
) -> None:
    drawn = [torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(2)]
    drawn += [torch.rand(3, dtype=torch.float64) for _ in range(2)]
    mean, var = (None, None) if training else (torch.zeros(3).double(), torch.ones(3).double())
    functions: dict[str | None, Any] = {
        **{name: getattr(nn.functional, name) for name in ("relu", "leaky_relu", "silu", "gelu")},
        None: lambda z: z,
    }

    def ours(x: Tensor, residual: Tensor | None, *affine: Tensor | None) -> Tensor:
        more: Any = {"activation": activation, "residual": residual}
        return fusereg.functional.batch_norm(x, mean, var, *affine, training, **more)

    def theirs(x: Tensor, residual: Tensor | None, *affine: Tensor | None) -> Tensor:
        z = nn.functional.batch_norm(x, mean, var, *affine, training)
        y: Tensor = functions[activation](z if residual is None else z + residual)
        return y

    found = []
    for f in (ours, theirs):
        x, residual, weight, bias = (t.clone().requires_grad_() for t in drawn)
        given = [
            x,
            residual if has_residual else None,
            *((weight, bias) if affine else (None, None)),
        ]
        (gradient,) = torch.autograd.grad(f(*given).sum(), x, create_graph=True)
        leaves = [t for t in given if t is not None]
        options: Any = {"allow_unused": True, "materialize_grads": True}
        found.append(torch.autograd.grad(gradient.square().sum(), leaves, **options))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
