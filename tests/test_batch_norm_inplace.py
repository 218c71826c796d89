"""In-place activated batch normalization: as the ordinary one, with y in the place of x."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fusereg
from conftest import TOLERANCES, Backend
from fusereg import functional as F
from fusereg.batch_norm.inplace import lost_channels
from fusereg.batch_norm.kernels import Call, Inputs
from fusereg.core import memory
from test_batch_norm import SLOPE, Case, assert_near, exact, make

ACTIVATIONS = [None, "leaky_relu"]


def ours(case: Case, training: bool, activation: str | None, **more: Any) -> dict[str, Tensor]:
    """What test_batch_norm's function of this name gives, x being made by an addition."""
    leaf = case.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias = (t.detach().clone().requires_grad_() for t in (case.weight, case.bias))
    mean, var = case.mean.clone(), case.var.clone()
    x = leaf + 0
    arguments = {"negative_slope": SLOPE, **more}
    y = F.batch_norm(
        x, mean, var, weight, bias, training, 0.3, 1e-3,
        activation=activation, inplace=True, **arguments,
    )  # fmt: skip
    assert y is x
    gradients = torch.autograd.grad(y, (leaf, weight, bias), case.gradient)
    names = ("grad_x", "grad_weight", "grad_bias")
    return {"y": y.detach(), "mean": mean, "var": var, **dict(zip(names, gradients, strict=True))}


def near(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, factor: float = 4.0
) -> None:
    """As without inplace, but for x - mean, which comes back with the error of y's rounding."""
    first = ("y", "mean", "var", "grad_bias")
    assert_near({k: found[k] for k in first}, wanted, dtype)
    if dtype in (torch.float16, torch.bfloat16):
        # y is right to half a unit, which the bias makes up to 4 or 8 times as much of x - mean.
        factor *= 4.0
    limit = TOLERANCES[dtype] * factor
    length = wanted["y"].numel() / wanted["y"].shape[1]
    for name in ("grad_x", "grad_weight"):
        scale = float(wanted[name].abs().max())
        scale = max(scale, length**0.5) if name == "grad_weight" else scale
        error = float((found[name].double().cpu() - wanted[name]).abs().max()) / scale
        assert error <= limit, (name, error, limit)


@pytest.mark.sanitizer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(33, 5), (4, 3, 5, 7), (3, 70, 4, 4), (2, 3, 600)], ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], training: bool, dtype: torch.dtype, backend: Backend
) -> None:
    """Weights of either sign."""
    layouts = [False, True] if len(shape) > 3 else [False]
    for channels_last, activation in itertools.product(layouts, ACTIVATIONS):
        case = make(shape, dtype, backend, channels_last)
        case.weight[::2].neg_()
        found = ours(case, training, activation)
        assert found["y"].stride() == case.x.stride()
        near(found, exact(case, training, activation), dtype)


def test_zero_and_small_weights_are_exact(dtype: torch.dtype, backend: Backend) -> None:
    """Where y tells nothing of x, x is kept: the gradient of a weight of 0 must not vanish."""
    for channels_last, activation in itertools.product((False, True), ACTIVATIONS):
        case = make((6, 7, 5, 5), dtype, backend, channels_last)
        case.weight[:5] = torch.tensor([0.0, -0.0, 1e-30, -1e-6, 1e-2]).to(case.weight)
        case.bias[:5] = torch.tensor([0.0, -1.0, 0.5, 1.0, -1.0]).to(case.bias)
        for training in (True, False):
            found = ours(case, training, activation)
            assert (found["grad_weight"].abs()[:5] > 0).all()
            near(found, exact(case, training, activation), dtype)


def test_without_parameters_and_with_one_of_them(backend: Backend) -> None:
    for shape in ((5, 3, 40), (9, 6)):
        case = make(shape, torch.float32, backend)
        for given in ("", "w", "b"):
            found = []
            for inplace in (False, True):
                leaf = case.x.detach().clone().requires_grad_()
                y = F.batch_norm(
                    leaf + 0, None, None,
                    case.weight if "w" in given else None,
                    case.bias if "b" in given else None,
                    activation="leaky_relu", inplace=inplace,
                )  # fmt: skip
                found.append((y, torch.autograd.grad(y, leaf, case.gradient)[0]))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_threads_and_instruction_sets_do_not_change_a_bit(backend: Backend) -> None:
    before = torch.get_num_threads()
    for shape, channels_last in itertools.product([(9, 70, 7, 7), (6, 3, 40, 41)], (False, True)):
        case = make(shape, torch.float32, backend, channels_last)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ours(case, True, "leaky_relu"))
        torch.set_num_threads(before)
        if backend.isa is not None:
            fusereg._C.set_cpu_isa("baseline")
            results.append(ours(case, True, "leaky_relu"))
            fusereg._C.set_cpu_isa(backend.isa)
        for other in results[1:]:
            for name, t in results[0].items():
                assert torch.equal(t, other[name]), (name, shape, channels_last)


def test_virtual_batches_and_masks(backend: Backend) -> None:
    case = make((7, 5, 33), torch.float32, backend)
    case.weight[1] = 0.0
    keep = torch.rand(7, 33).to(case.x.device) > 0.3
    for more in ({"virtual_batch_size": 3}, {"mask": keep}):
        leaf = case.x.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        found = []
        for inplace in (False, True):
            y = F.batch_norm(
                leaf + 0, None, None, weight, case.bias, activation="leaky_relu", inplace=inplace,
                **more,
            )  # fmt: skip
            found.append((y.detach(), *torch.autograd.grad(y, (leaf, weight), case.gradient)))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["misaligned", "permuted", "sliced"])
def test_layouts(layout: str, backend: Backend) -> None:
    case = make((4, 5, 6, 7), torch.float32, backend)
    change = {
        "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "permuted": lambda t: t.permute(2, 1, 3, 0),
        "sliced": lambda t: t[:, :, 1:, ::2],
    }[layout]
    leaf = case.x.clone().requires_grad_()
    x = change(leaf * 1)
    wanted = F.batch_norm(x, None, None, case.weight, case.bias, activation="leaky_relu")
    gradient = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaf, gradient)[0]
    x = change(leaf * 1)
    y = F.batch_norm(x, None, None, case.weight, case.bias, activation="leaky_relu", inplace=True)
    assert y is x
    assert torch.equal(y, wanted)
    assert torch.allclose(torch.autograd.grad(y, leaf, gradient)[0], expected, atol=1e-5)


# --- in torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(activation: str | None, training: bool) -> None:
    x = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.7, -1.3, 0.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.2, -0.4, 0.5], dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(
            x * 1, mean, var, weight, bias, training, 0.0,
            activation=activation, negative_slope=0.3, inplace=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (x, weight, bias))


def test_nothing_but_the_result_is_kept() -> None:
    x = torch.randn(16, 8, 20, 20, requires_grad=True) * 1
    layer = fusereg.nn.BatchNorm2d(8, activation="leaky_relu", inplace=True)
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(0 if t.data_ptr() == x.data_ptr() else t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y is x
    assert sum(sizes) <= 5 * 8, "moments, weight and bias"
    with torch.no_grad():
        layer.weight[3] = 0.0
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(16, 8, 20, 20, requires_grad=True) * 1)
    assert sorted(sizes)[-2:] == [16 * 20 * 20, 16 * 8 * 20 * 20], "one channel's x, and y"
    del y
    gc.collect()


def test_a_module_trains_as_the_ordinary_one() -> None:
    torch.manual_seed(4)
    ordinary = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        fusereg.nn.BatchNorm2d(6, activation="leaky_relu"),
        nn.Conv2d(6, 4, 3),
        fusereg.nn.BatchNorm2d(4),
    )
    inplace = copy.deepcopy(ordinary)
    for layer in (inplace[1], inplace[3]):
        layer.inplace = True
    assert "inplace=True" in repr(inplace[1])
    assert "inplace" not in repr(ordinary)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ordinary, inplace)]
    for _ in range(4):
        x = torch.randn(5, 2, 8, 8)
        losses = []
        for model, optimizer in zip((ordinary, inplace), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean() + model(x).amax()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, a), b in zip(
        ordinary.state_dict().items(), inplace.state_dict().values(), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    ordinary.eval()
    inplace.eval()
    with torch.no_grad():
        assert torch.allclose(ordinary(x), inplace(x), atol=1e-5)


def test_without_gradients_x_becomes_y() -> None:
    x = torch.randn(6, 4, 5)
    wanted = F.batch_norm(x, None, None, activation="leaky_relu")
    version = x._version
    with torch.no_grad():
        y = F.batch_norm(x, None, None, activation="leaky_relu", inplace=True)
    assert y is x
    assert torch.equal(x, wanted)
    assert x._version > version


def test_what_made_x_and_needs_it_says_so() -> None:
    x = torch.randn(6, 4, requires_grad=True).sigmoid()
    y = F.batch_norm(x, None, None, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x = torch.randn(6, 4, requires_grad=True) * 1
    squared = x.square()
    y = F.batch_norm(x, None, None, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + squared.sum()).backward()


def test_what_changes_y_later_is_noticed() -> None:
    y = F.batch_norm(torch.randn(6, 4, requires_grad=True) * 1, None, None, inplace=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_a_second_derivative_is_refused(wanted: str) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.rand(4).add(0.5).requires_grad_()
    y = F.batch_norm(x * 1, None, None, weight, inplace=True)
    leaves = {"x": x, "weight": weight}
    (g,) = torch.autograd.grad(y.square().sum(), leaves[wanted], create_graph=True)
    plain = F.batch_norm(x, None, None, weight)
    (same,) = torch.autograd.grad(plain.square().sum(), leaves[wanted])
    assert torch.allclose(g, same, atol=1e-5)
    with pytest.raises(
        RuntimeError, match=r"fusereg\.batch_norm: inplace=True .* has no second derivative"
    ):
        g.sum().backward()


def test_capture_of_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written: the host would have to wait for the weights."""
    monkeypatch.setattr(memory, "capturing", lambda device: True)
    with FakeTensorMode():
        x, weight = torch.empty(4, 3, device="cuda"), torch.empty(3, device="cuda")
    with pytest.raises(
        RuntimeError, match=r"fusereg\.batch_norm: inplace=True .* while a CUDA graph is captured"
    ):
        lost_channels(Call(Inputs(x, weight=weight)))
    assert lost_channels(Call(Inputs(x))) is None, "without parameters nothing is asked"


def test_tracing_sees_a_batch_norm_and_a_copy() -> None:
    """Whoever traces decides what is kept, so what depends on the weights' values is not asked."""

    def f(t: Tensor) -> Tensor:
        return F.batch_norm(t, None, None, torch.zeros(3), torch.ones(3), inplace=True)

    x = torch.randn(5, 3)
    graph = make_fx(f)(x.clone())
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert any("batch_norm" in n for n in names)
    assert any("copy_" in n for n in names)
    given = x.clone()
    assert torch.equal(graph(given), given)
    assert torch.equal(given, f(x.clone()))


def test_checkpoint_and_compile() -> None:
    layer = fusereg.nn.BatchNorm1d(4, activation="leaky_relu", inplace=True, update_stats=False)
    twin = fusereg.nn.BatchNorm1d(4, activation="leaky_relu")
    x = torch.randn(6, 4)
    wanted_x = x.clone().requires_grad_()
    twin(wanted_x * 2).square().sum().backward()

    def f(t: Tensor) -> Tensor:
        result: Tensor = layer(t * 2).square().sum()
        return result

    torch._dynamo.reset()
    for g in (
        lambda t: checkpoint(f, t, use_reentrant=False),
        torch.compile(f, backend="aot_eager", fullgraph=True),
    ):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        g(own).backward()
        assert torch.allclose(own.grad, wanted_x.grad, atol=1e-5)
        assert torch.allclose(layer.weight.grad, twin.weight.grad, atol=1e-4)


def test_forward_mode_and_func_write_x_too() -> None:
    x, tangent = torch.randn(5, 3).double(), torch.randn(5, 3).double()

    def f(t: Tensor, inplace: bool = True) -> Tensor:
        return F.batch_norm(t * 1, None, None, activation="leaky_relu", inplace=inplace)

    for a, b in zip(
        torch.func.jvp(f, (x,), (tangent,)),
        torch.func.jvp(lambda t: f(t, False), (x,), (tangent,)),
        strict=True,
    ):
        assert torch.allclose(a, b)
    assert torch.allclose(
        torch.func.grad(lambda t: f(t).square().sum())(x),
        torch.func.grad(lambda t: f(t, False).square().sum())(x),
    )


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "wants activation None or 'leaky_relu', .* got 'relu'"),
        ({"activation": "silu"}, "wants activation None or 'leaky_relu'"),
        ({"activation": "leaky_relu", "negative_slope": 0.0}, "negative_slope above 0, got 0.0"),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, "negative_slope above 0"),
        ({"dropout": 0.5}, "inplace=True supports no dropout, got dropout=0.5"),
        ({"residual": torch.zeros(4, 3)}, "inplace=True and residual exclude each other"),
        ({"out": torch.zeros(4, 3)}, "inplace=True and out exclude each other"),
        ({"input": torch.zeros(4, 3).requires_grad_()}, "input is a leaf that requires a gradient"),
        ({"input": torch.zeros(12).requires_grad_().view(4, 3)}, "input is a view of a leaf"),
        ({"input": torch.zeros(1, 3).expand(4, 3)}, "input has several elements at one place"),
        ({"input": torch.zeros(4, 3, dtype=torch.int64)}, "input has dtype torch.int64"),
    ],
)  # fmt: skip
def test_what_cannot_be_in_place_says_so_and_writes_nothing(
    change: dict[str, Any], message: str
) -> None:
    arguments = {"input": torch.zeros(4, 3) + torch.eye(4, 3), "training": True, **change}
    before, mean = arguments["input"].detach().clone(), torch.zeros(3)
    with pytest.raises((ValueError, TypeError), match=r"fusereg\.batch_norm: .*" + message):
        F.batch_norm(running_mean=mean, running_var=torch.ones(3), inplace=True, **arguments)
    assert torch.equal(arguments["input"], before)
    assert not mean.any()


def test_layers_that_cannot_be_in_place() -> None:
    for layer, arguments, message in (
        ("BatchNorm2d", {"activation": "relu"}, r"BatchNorm2d: inplace=True wants activation None"),
        ("BatchNorm1d", {"dropout": 0.1}, r"BatchNorm1d: inplace=True supports no dropout"),
        ("SyncBatchNorm", {}, r"SyncBatchNorm: inplace=True is not supported"),
        ("BatchRenorm", {}, r"BatchRenorm: inplace=True is not supported"),
    ):
        with pytest.raises(ValueError, match=rf"fusereg\.nn\.{message}"):
            getattr(fusereg.nn, layer)(4, inplace=True, **arguments)
    assert fusereg.nn.GhostBatchNorm(4, inplace=True).inplace
