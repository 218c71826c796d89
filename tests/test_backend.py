"""The backend of torch.compile: what it fuses, what it leaves, and that results are torch's."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fusereg
from fusereg.backend import fusereg_backend
from plain_models import MODELS, Volumes, basic, close, images, same_state, stir, without_dropout

ROOT = Path(__file__).resolve().parents[1]
Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def fused() -> dict[str, int]:
    """Return what was fused since the test began, without the number of graphs."""
    return {what: n for what, n in counters["fusereg"].items() if what != "graphs"}


def left() -> str:
    return "; ".join(counters["fusereg left"])


def compiled(f: Any, fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(f, backend=fusereg_backend, fullgraph=fullgraph, options=options or None)


def step(model: Any, x: Tensor) -> list[Tensor]:
    """Return output and gradients of a training step."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    assert x.grad is not None
    return [y, x.grad]


def compare(model: nn.Module, *inputs: Tensor, **options: Any) -> nn.Module:
    """Train and evaluate a model and its compiled copy; all must stay equal. Return the copy."""
    twin = copy.deepcopy(model)
    run = compiled(twin, **options)
    for x in inputs:
        for got, wanted in zip(step(run, x), step(model, x), strict=True):
            close(got, wanted)
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                close(p.grad, q.grad)  # type: ignore[arg-type]
        same_state(twin, model)
    model.eval()
    twin.eval()
    with torch.no_grad():
        close(run(inputs[0]), model(inputs[0]))
    model.train()
    twin.train()
    assert counters["fusereg"]["graphs"], "the backend was not called"
    return twin


# --- whole models ---------------------------------------------------------------------------------


class Separable(nn.Module):
    """A depthwise-separable network."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for _ in range(depth):
            parts += [
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(inplace=True),
            ]
        self.parts = nn.Sequential(*parts)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.parts(self.stem(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize(
    ("make", "then"),
    [
        (basic, "eager"),
        (Separable, "eager"),
        (Separable, "aot_eager"),
        pytest.param(basic, "aot_eager", marks=pytest.mark.slow),
        pytest.param(basic, "inductor", marks=pytest.mark.slow),
    ],
)
def test_training_and_evaluation_equal_torch_over_three_batch_sizes(make: Make, then: str) -> None:
    model = stir(without_dropout(make())).double()
    compare(model, images(6), images(4), images(3), then=then)
    expected = (
        {"batch_norm + relu": 5, "batch_norm + add + relu": 4, "batch_norm": 1}
        if make is basic
        else {"batch_norm + relu": 2, "batch_norm + silu": 2}
    )
    # Training, training with any batch size, and evaluation.
    assert fused() == {what: 3 * n for what, n in expected.items()}
    assert counters["fusereg"]["graphs"] == 3


@pytest.mark.parametrize("make", [m for m in MODELS if m is not basic])
def test_models_of_many_styles_equal_torch(make: Make) -> None:
    x = torch.randn(6, 4, 4, 12, dtype=torch.float64)
    x = x if make is Volumes else x[:, :1] if make.__name__ == "Encoder" else images()
    model = stir(without_dropout(make())).double()
    if make.__name__ == "convolutions":
        model[5].momentum = 0.1  # torch itself breaks the graph for a cumulative average
    compare(model, x, x[:4])
    assert fused()


def test_a_change_of_the_batch_size_is_compiled_once_more_and_then_never() -> None:
    counter = CompileCounterWithBackend(fusereg_backend)
    model = torch.compile(Separable(), backend=counter)
    for count in (8, 6, 5, 3, 11):
        model(torch.randn(count, 3, 8, 8))
    assert counter.frame_count == 2
    assert fused() == {"batch_norm + relu": 4, "batch_norm + silu": 4}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_layout_that_torch_gives(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = model.to(memory_format=memory_format)
    x = torch.randn(4, 3, 9, 9).to(memory_format=memory_format)
    assert compiled(model)(x).stride() == model(x).stride()
    assert fused() == {"batch_norm + relu": 1}


# --- when a chain is one call ---------------------------------------------------------------------

SHAPE = (4, 3, 2, 5)


def bn(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, **more: Any) -> Tensor:
    return F.batch_norm(x, mean, var, weight, None, **{"training": True, **more})


def same(f: Callable[..., Any], expect: dict[str, int], grad: bool = True, **config: Any) -> None:
    """Compare a function with its compiled self: results, gradients and what it writes to.

    It is called on x, the residual r, running mean and variance, and a weight.
    """
    shapes = [SHAPE, SHAPE, (3,), (3,), (3,)]
    drawn = [torch.rand(s, dtype=torch.float64) - (0.3 if len(s) > 1 else -0.3) for s in shapes]
    runs = []
    for run in (f, compiled(f)):
        leaves = [t.clone().requires_grad_(grad and i in (0, 1, 4)) for i, t in enumerate(drawn)]
        tensors = [t * 1.0 for t in leaves]
        found = run(*tensors)
        results = list(found) if isinstance(found, tuple) else [found]
        wanted = [t for t in leaves if t.requires_grad]
        grads: list[Any] = []
        sums = [y.square().sum() for y in results if y.requires_grad]
        if sums:
            total = torch.stack(sums).sum()
            grads = list(torch.autograd.grad(total, wanted, allow_unused=True))
        runs.append([*results, *tensors, *(g for g in grads if g is not None)])
    for got, wanted_result in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(got, wanted_result, rtol=1e-9, atol=1e-9)
    assert counters["fusereg"]["graphs"] >= 1
    assert fused() == expect, left()


def relu_in_place(x, r, *norm):
    return bn(x, *norm).relu_()


def keyword_arguments(x, r, mean, var, weight):
    y = F.batch_norm(
        training=True, weight=weight, running_var=var, running_mean=mean, input=x, eps=1e-3
    )
    return F.leaky_relu(input=y, negative_slope=0.2)


def aten_order(x, r, mean, var, weight):
    return torch.batch_norm(x, weight, None, mean, var, True, 0.1, 1e-5, False).relu()


def sum_into_the_norm(x, r, *norm):
    y = bn(x, *norm)
    y += r
    return F.gelu(y)


def sum_as_method(x, r, *norm):
    return F.silu(bn(x, *norm).add(r), inplace=True)


def norm_and_dropout(x, r, *norm):
    return F.dropout(F.relu(bn(x, *norm)), 1.0)


def evaluated(x, r, *norm):
    return F.relu(bn(x, *norm, training=False) + r)


def without_statistics(x, r, mean, var, weight):
    return F.relu(F.batch_norm(x, None, None, weight, None, True))


def shortcut_in_between(x, r, mean, var, weight):
    y = bn(x, mean, var, weight)
    shortcut = F.batch_norm(F.relu(r * 2.0, inplace=True), mean + 1.0, var + 1.0, training=True)
    return F.relu(y + shortcut)


def residual_written_before_the_sum(x, r, *norm):
    y = bn(x, *norm)
    r.add_(1.0)
    return F.relu(y + r)


@pytest.mark.parametrize(
    ("f", "expect"),
    [
        (relu_in_place, {"batch_norm + relu": 1}),
        (keyword_arguments, {"batch_norm + leaky_relu": 1}),
        (aten_order, {"batch_norm + relu": 1}),
        (sum_into_the_norm, {"batch_norm + add + gelu": 1}),
        (sum_as_method, {"batch_norm + add + silu": 1}),
        (norm_and_dropout, {"batch_norm + relu + dropout": 1}),
        (evaluated, {"batch_norm + add + relu": 1}),
        (without_statistics, {"batch_norm + relu": 1}),
        (shortcut_in_between, {"batch_norm + add + relu": 1, "batch_norm": 1}),
        (residual_written_before_the_sum, {"batch_norm + add + relu": 1}),
    ],
)
def test_a_chain_is_one_call(f: Callable[..., Any], expect: dict[str, int]) -> None:
    same(f, expect)


def read_twice(x, r, *norm):
    y = bn(x, *norm)
    return F.relu(y), y


def read_through_a_view(x, r, *norm):
    y = bn(x, *norm)
    return F.relu(y), y.view(-1)


def sum_into_the_residual(x, r, *norm):
    r += bn(x, *norm)
    return F.relu(r)


def sum_with_itself(x, r, *norm):
    y = bn(x, *norm)
    return F.relu(y + y)


def leaves_no_grad(x, r, *norm):
    with torch.no_grad():
        y = bn(x, *norm)
    return F.relu(y + r)


def enters_no_grad(x, r, *norm):
    y = bn(x, *norm)
    with torch.no_grad():
        return F.relu(y)


def leaves_autocast(x, r, *norm):
    with torch.autocast("cpu", torch.bfloat16):
        y = bn(x, *norm)
    return F.relu(y)


def broadcast_residual(x, r, *norm):
    return F.relu(bn(x, *norm) + r[:1])


def residual_of_another_dtype(x, r, *norm):
    return F.relu(bn(x, *norm) + r.float())


def factor_of_the_sum(x, r, *norm):
    return F.relu(torch.add(bn(x, *norm), r, alpha=2))


def unknown_in_between(x, r, *norm):
    y = bn(x, *norm)
    z = torch.cumsum(r, 0)
    return F.relu(y + z)


def tied_statistics(x, r, *norm):
    y = bn(x, *norm)
    z = F.relu(bn(r, *norm))
    return F.relu(y + z)


def statistics_read_in_between(x, r, mean, *norm):
    y = bn(x, mean, *norm)
    z = mean * 2.0
    return F.relu(y), z


def statistics_as_residual(x, r, mean, *norm):
    shown = mean.view(1, 3, 1, 1).expand(SHAPE)
    return F.relu(bn(x, mean, *norm) + shown)


def residual_written_after_the_sum(x, r, *norm):
    y = bn(x, *norm) + r
    r.add_(1.0)
    return F.relu(y)


ONE = {"batch_norm": 1}


@pytest.mark.parametrize(
    ("f", "expect", "reason"),
    [
        (read_twice, ONE, ""),
        (read_through_a_view, ONE, ""),
        (sum_into_the_residual, ONE, "written into the residual"),
        (sum_with_itself, ONE, "one tensor"),
        (leaves_no_grad, ONE, "_set_grad_enabled"),
        (enters_no_grad, ONE, "_set_grad_enabled"),
        (leaves_autocast, ONE, "autocast"),
        (broadcast_residual, ONE, "differ in kind, shape"),
        (residual_of_another_dtype, ONE, "differ in kind, shape, dtype"),
        (factor_of_the_sum, ONE, "factor"),
        (unknown_in_between, ONE, "cumsum is called in between"),
        (tied_statistics, {"batch_norm": 1, "batch_norm + relu": 1}, "uses the same memory"),
        (statistics_read_in_between, ONE, "uses the same memory"),
        (statistics_as_residual, ONE, "reads what an earlier part of it writes"),
        (residual_written_after_the_sum, {"batch_norm + add": 1}, "uses the same memory"),
    ],
)
def test_what_one_call_would_change_stays_apart(
    f: Callable[..., Any], expect: dict[str, int], reason: str
) -> None:
    same(f, expect)
    assert reason in left()


def input_written_in_between(x, r, *norm):
    y = bn(x, *norm)
    x.relu_()
    return F.relu(y)


def input_written_through_a_view(x, r, *norm):
    part = x[0]
    y = bn(x, *norm)
    part.add_(1.0)
    return F.relu(y)


def weight_written_in_between(x, r, mean, var, weight):
    y = bn(x, mean, var, weight)
    weight.add_(1.0)
    return F.relu(y)


@pytest.mark.parametrize(
    "f", [input_written_in_between, input_written_through_a_view, weight_written_in_between]
)
def test_an_input_that_is_written_before_the_chain_ends_keeps_it_apart(f: Any) -> None:
    same(f, {"batch_norm": 1}, grad=False)
    assert "uses the same memory" in left()


def test_inputs_that_share_memory_are_known() -> None:
    def f(x: Tensor, mean: Tensor, alias: Tensor, var: Tensor) -> Tensor:
        y = F.batch_norm(x, mean, var, training=True)
        z = F.batch_norm(x * 2.0, alias, var * 1.0, training=True)
        return F.relu(y + z * 2.0)

    x, found = torch.randn(SHAPE), []
    for run in (f, compiled(f)):
        mean, var = torch.zeros(4), torch.ones(3)
        found.append([run(x, mean[:3], mean[1:], var), mean, var])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert "uses the same memory" in left()


# --- dropout --------------------------------------------------------------------------------------


def dropout_in_place_read_again(x, r, *_):
    y = x * 2.0
    z = F.dropout(y, 1.0, inplace=True)
    return z + r, y


def dropout_in_place_and_its_input(x, r, *_):
    y = x * 2.0
    return F.dropout(y, 1.0, inplace=True) + y


def activation_in_place_read_again(x, r, *_):
    y = x * 2.0
    z = y.view(-1)
    return F.dropout(F.relu(y, inplace=True), 1.0), z


def evaluated_dropout_and_sum_in_place(x, r, *_):
    y = x * 2.0
    z = F.dropout(y, 0.5, False)
    z += r
    return F.layer_norm(z, (5,)), y


def sum_read_before_the_norm(x, r, *_):
    y = r + F.dropout(x, 1.0)
    z = y.cos()
    return F.layer_norm(y, (5,)), z


def norm_of_two_dimensions(x, r, *_):
    return F.layer_norm(r + F.dropout(x, 1.0), (2, 5))


@pytest.mark.parametrize(
    ("f", "expect", "reason"),
    [
        (dropout_in_place_read_again, {"dropout": 1}, "read elsewhere"),
        (dropout_in_place_and_its_input, {"dropout": 1}, "reads what an earlier part"),
        (activation_in_place_read_again, {"dropout": 1}, "read elsewhere"),
        (evaluated_dropout_and_sum_in_place, {}, "drops nothing"),
        (sum_read_before_the_norm, {"dropout + add": 1}, "read before it is normalized"),
        (norm_of_two_dimensions, {"dropout + add": 1}, ""),
    ],
)
def test_writes_of_a_dropout_that_are_seen_elsewhere_stay(
    f: Any, expect: dict[str, int], reason: str
) -> None:
    same(f, expect)
    assert reason in left()


def dropout_chains() -> list[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Return a name, what a model writes, and fusereg's function that draws the same mask."""
    G = fusereg.functional
    return [
        ("dropout", lambda x, r, b: F.dropout(x, 0.5), lambda x, r, b: G.dropout(x, 0.5)),
        (
            "dropout",
            lambda x, r, b: torch.dropout(x, 0.5, True),
            lambda x, r, b: G.dropout(x, 0.5),
        ),
        ("dropout1d", lambda x, r, b: F.dropout1d(x[0]), lambda x, r, b: G.dropout1d(x[0])),
        ("dropout2d", lambda x, r, b: F.dropout2d(x), lambda x, r, b: G.dropout2d(x)),
        (
            "dropout3d",
            lambda x, r, b: F.dropout3d(x[None]),
            lambda x, r, b: G.dropout3d(x[None]),
        ),
        (
            "alpha_dropout",
            lambda x, r, b: F.alpha_dropout(x, 0.5, True),
            lambda x, r, b: G.alpha_dropout(x),
        ),
        (
            "feature_alpha_dropout",
            lambda x, r, b: F.feature_alpha_dropout(x, 0.5, True),
            lambda x, r, b: G.feature_alpha_dropout(x),
        ),
        (
            "relu + dropout",
            lambda x, r, b: F.dropout(x.relu()),
            lambda x, r, b: G.dropout(x.relu()),
        ),
        (
            "gelu + dropout",
            lambda x, r, b: F.dropout(F.gelu(x)),
            lambda x, r, b: G.dropout(F.gelu(x)),
        ),
        (
            "gelu_tanh + dropout",
            lambda x, r, b: F.dropout(F.gelu(x, approximate="tanh")),
            lambda x, r, b: G.dropout(F.gelu(x, approximate="tanh")),
        ),
        (
            "silu + dropout",
            lambda x, r, b: F.dropout(F.silu(x * 1.0, inplace=True), 0.5, True, True),
            lambda x, r, b: G.dropout(F.silu(x)),
        ),
        ("dropout + add", lambda x, r, b: r + F.dropout(x), lambda x, r, b: r + G.dropout(x)),
        (
            "bias + dropout + add",
            lambda x, r, b: r + F.dropout(x + b),
            lambda x, r, b: r + G.dropout(x + b),
        ),
        (
            "dropout + add + layer_norm",
            lambda x, r, b: F.layer_norm(F.dropout(x).add_(r), (5,), b, b),
            lambda x, r, b: F.layer_norm(r + G.dropout(x), (5,), b, b),
        ),
        (
            "dropout + add + rms_norm",
            lambda x, r, b: (s := r + F.dropout(x), F.rms_norm(s, (5,), b), s * 2.0)[1:],
            lambda x, r, b: (s := r + G.dropout(x), F.rms_norm(s, (5,), b), s * 2.0)[1:],
        ),
    ]


@pytest.mark.parametrize(
    ("name", "written", "wanted", "then"),
    [(*c, "eager") for c in dropout_chains()] + [(*c, "aot_eager") for c in dropout_chains()[-2:]],
    ids=lambda c: c if isinstance(c, str) else "",
)
def test_dropouts_draw_the_mask_that_fusereg_draws_forward_and_backward(
    name: str, written: Callable[..., Any], wanted: Callable[..., Any], then: str
) -> None:
    drawn = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(2)]
    drawn.append(torch.rand(5, dtype=torch.float64) + 0.5)
    runs = []
    for run in (wanted, compiled(written, then=then)):
        leaves = [t.clone().requires_grad_() for t in drawn]
        torch.manual_seed(3)
        if run is wanted and then == "aot_eager":  # which draws through torch.randint
            run = torch.compile(run, backend=then, fullgraph=True)
        found = run(*leaves)
        results = list(found) if isinstance(found, tuple) else [found]
        total = torch.stack([y.square().sum() for y in results]).sum()
        runs.append([*results, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for got, expected in zip(runs[1], runs[0], strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert fused() == {name: 1}, left()


def test_a_probability_of_zero_and_evaluation_are_left_as_identities() -> None:
    x = torch.randn(4, 8)

    @compiled
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(x, 0.0), F.dropout(x, 0.5, False)

    assert all(torch.equal(y, x) for y in f(x))
    assert fused() == {}
    assert left() == ""


# --- calls that are left to torch -----------------------------------------------------------------


def test_what_a_kernel_refuses_is_left_to_torch_with_the_kernels_own_words() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def f(x: Tensor, training: bool, eps: float, momentum: float) -> list[Tensor]:
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        y = F.batch_norm(x, mean, var, None, None, training, momentum, eps)
        return [F.relu(y), mean, var]

    for arguments, word in (((False, 0.0, 0.1), "eps"), ((True, 1e-5, 1.5), "momentum")):
        counters.clear()
        torch._dynamo.reset()
        for got, wanted in zip(compiled(f)(x, *arguments), f(x, *arguments), strict=True):
            close(got, wanted)
        if fused() == {}:  # otherwise the kernel takes it
            assert f"{word} must be" in left()


def by_hand(function: Any, *arguments: Any, **more: Any) -> list[Any]:
    """Compile a graph of one call, strings being its inputs; return what is called then."""
    graph = torch.fx.Graph()
    nodes = {}
    for name in arguments:
        if isinstance(name, str):
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["example_value"] = torch.ones(4, 3) if name == "x" else torch.ones(3)
    call = graph.call_function(function, tuple(nodes.get(a, a) for a in arguments), more)
    call.meta["example_value"] = torch.ones(4, 3)
    graph.output(call)
    module = torch.fx.GraphModule({}, graph)
    fusereg_backend(module, [])
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_numbers_that_the_graph_computes_and_unknown_arguments_are_left_to_torch() -> None:
    norm = ("x", "mean", "var", None, None, True)
    assert by_hand(F.batch_norm, *norm, 0.1) == [fusereg.functional.batch_norm]
    assert by_hand(F.batch_norm, *norm, "momentum") == [F.batch_norm]
    assert "momentum is not a constant number" in left()
    assert by_hand(F.dropout, "x", 0.5) == [fusereg.functional.dropout]
    assert by_hand(F.dropout, "x", "p") == [F.dropout]
    assert "p is not a constant number" in left()
    assert by_hand(F.dropout, "x", 0.5, new_argument=1) == [F.dropout]


def test_other_kinds_of_tensors_are_left_to_torch() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    for x in (nested, TwoTensor(torch.ones(4, 3), torch.ones(4, 3))):
        torch._dynamo.reset()
        y = compiled(lambda x: F.dropout(F.relu(x), 1.0), then="aot_eager")(x)
        assert type(y) is type(x)
        assert "not called on ordinary dense tensors" in left()
        assert fused() == {}
        counters.clear()


def test_a_torch_func_transform_leaves_its_graph_alone() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: F.relu(F.dropout(row, 1.0)), randomness="same")(x)

    x = torch.randn(4, 3)
    close(compiled(f)(x), f(x))
    assert fused() == {}
    assert "torch.func" in left()


def test_a_new_node_has_the_meta_of_the_one_that_it_replaces() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return fusereg_backend(module, inputs)

    torch.compile(basic(), backend=keep)(torch.randn(2, 3, 8, 8))
    (graph,) = (m.graph for m in graphs)
    graph.lint()
    calls = [n for n in graph.nodes if n.target is fusereg.functional.batch_norm]
    assert len(calls) == 10
    for node in calls:
        assert {"example_value", "stack_trace", "nn_module_stack"} <= set(node.meta)
        assert node.meta["example_value"].shape[0] == 2


# --- graphs within the graph ----------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(torch.relu(self.norm(self.linear(x))))
        return y


class Checkpointed(nn.Module):
    def __init__(self, p: float, context: Any = None) -> None:
        super().__init__()
        self.body = Body(p)
        self.more = {} if context is None else {"context_fn": context}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=False, **self.more)
        return y


def test_a_checkpoint_in_compiled_code_has_the_gradient_of_its_own_mask() -> None:
    model = Checkpointed(0.5).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    uncompiled = copy.deepcopy(model)
    fusereg.convert(uncompiled)
    torch.manual_seed(1)
    wanted = step(uncompiled, x)
    torch.manual_seed(1)
    got = step(compiled(model), x)
    assert fused() == {"batch_norm + relu + dropout": 1}
    for a, b in zip(got, wanted, strict=True):
        close(a, b)
    for p, q in zip(model.parameters(), uncompiled.parameters(), strict=True):
        close(p.grad, q.grad)  # type: ignore[arg-type]
    same_state(model, uncompiled)  # both count the batch twice, as torch's eager checkpoint does


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_a_checkpoint_equals_torch_without_dropout(then: str) -> None:
    model = Checkpointed(0.0).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for got, wanted in zip(step(compiled(twin, then=then), x), step(model, x), strict=True):
        close(got, wanted)
    assert fused() == {"batch_norm + relu": 1}


def test_a_selective_checkpoint_keeps_its_policy() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    asked: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def context() -> Any:
        return create_selective_checkpoint_contexts(policy)

    x = torch.randn(8, 6, dtype=torch.float64)
    model = Checkpointed(0.0, context).double()
    wanted = step(Checkpointed(0.0).double().requires_grad_(True), x)[0].shape
    assert step(compiled(model), x)[0].shape == wanted
    assert any("addmm" in name for name in asked)
    assert fused() == {"batch_norm + relu": 1}


def test_branches_of_a_cond_are_rewritten() -> None:
    mean, var = torch.zeros(3), torch.ones(3)

    def f(x: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, mean, var))

        def twice(x: Tensor) -> Tensor:
            return F.silu(F.batch_norm(x * 2.0, mean, var))

        return torch.cond(x.sum() > 0.0, norm, twice, (x,))  # type: ignore[no-any-return]

    run = compiled(f)
    for x in (torch.rand(4, 3), -torch.rand(4, 3)):
        close(run(x), f(x), 1e-5)
    assert fused() == {"batch_norm + relu": 1, "batch_norm + silu": 1}


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_equals_torch_inside_and_outside_of_the_compiled_code(outside: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def inside(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        return f

    twin = copy.deepcopy(model)
    run = inside(compiled(twin)) if outside else compiled(inside(twin))
    x = torch.randn(4, 3, 8, 8)
    for got, wanted in zip(step(run, x), step(inside(model), x), strict=True):
        assert got.dtype is wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    same_state(twin, model, 0.02)
    assert fused() == {"batch_norm + relu": 1}


def test_double_backward_works_with_an_eager_rest() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 1)).double()
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (model, compiled(copy.deepcopy(model))):
        (g,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    close(found[1], found[0])
    assert fused() == {"batch_norm + silu": 1}


# --- fusereg's own layers -------------------------------------------------------------------------


def native_layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    L = fusereg.nn
    return [
        (L.BatchNorm2d(4, activation="relu"), (4, 4, 3, 3)),
        (L.SyncBatchNorm(4), (4, 4, 3, 3)),
        (L.GhostBatchNorm(4, virtual_batch_size=2), (4, 4, 3, 3)),
        (L.FrozenBatchNorm(4), (4, 4, 3, 3)),
        (L.Dropout(1.0), (4, 4)),
        (L.DropPath(1.0), (4, 4)),
        (L.ActivationDropout(1.0), (4, 4)),
        (L.GaussianDropout(0.0), (4, 4)),
        (L.DropoutAddLayerNorm(4, p=1.0), (4, 4)),
        (fusereg.convert(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(1.0))), (4, 4)),
    ]


@pytest.mark.parametrize(
    ("layer", "shape"), native_layers(), ids=[type(m).__name__ for m, _ in native_layers()]
)
def test_a_layer_of_fusereg_is_one_node(layer: nn.Module, shape: tuple[int, ...]) -> None:
    nodes: list[Any] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        run = fusereg_backend(module, inputs)
        nodes.extend(n for n in module.graph.nodes if n.op.startswith("call"))
        return run

    twin, x = copy.deepcopy(layer), torch.randn(shape)
    y = torch.compile(twin, backend=keep, fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    same_state(twin, layer, 1e-6)
    assert len(nodes) == 1, nodes


def test_a_layer_of_fusereg_takes_what_follows_it() -> None:
    model = nn.Sequential(fusereg.nn.BatchNorm1d(4), nn.ReLU(), fusereg.nn.Dropout(1.0)).double()
    compare(model, torch.randn(8, 4, dtype=torch.float64))
    assert fused()["batch_norm + relu + dropout"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_other_backends_see_through_layers_of_fusereg_as_before(backend: str) -> None:
    """Keeping a call whole must not hide what it writes, nor its generator, from them."""
    model = fusereg.convert(stir(Separable(depth=1)).double())
    twin = copy.deepcopy(model)
    run = torch.compile(twin, backend=backend, fullgraph=True)
    for x in (images(6), images(4)):
        for got, wanted in zip(step(run, x), step(model, x), strict=True):
            close(got, wanted)
    same_state(twin, model)
    assert counters["fusereg"] == {}
    torch._dynamo.reset()

    def drawn(x: Tensor, generator: torch.Generator) -> Tensor:
        return fusereg.functional.dropout(x, 0.5, generator=generator) + 1.0

    x = torch.ones(64)
    again = torch.compile(drawn, backend=backend)(x, torch.Generator().manual_seed(3))
    assert torch.equal(again, drawn(x, torch.Generator().manual_seed(3)))


# --- Dynamo's guards ------------------------------------------------------------------------------


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).double()


def test_a_change_of_the_model_is_seen() -> None:
    model = small()
    run = compiled(model, fullgraph=False)
    x = torch.randn(8, 4, dtype=torch.float64)
    for change in (
        lambda: model[1].eval(),
        lambda: model[1].train(),
        lambda: setattr(model[1], "momentum", 0.5),
        lambda: setattr(model[1], "eps", 1e-2),
        lambda: model.__setitem__(2, nn.SiLU()),
        lambda: setattr(model[2], "forward", torch.tanh),
    ):
        change()
        twin = copy.deepcopy(model)
        close(run(x), twin(x))
        same_state(model, twin)
    assert set(fused()) == {"batch_norm + relu", "batch_norm + silu", "batch_norm"}


def test_hooks_added_after_the_first_call_are_seen_only_if_dynamo_guards_them() -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    for guarded in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
            model = small()
            run = compiled(model, fullgraph=False)
            first = run(x)
            model[2].register_forward_hook(lambda module, args, y: y + 1.0)
            seen = torch.equal(run(x), first + 1.0)
        assert seen is guarded


def test_the_other_holes_of_dynamos_guards_are_as_documented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    run = compiled(small(), fullgraph=False)
    first = run(x)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x + 1.0)
    assert torch.equal(run(x), first)

    def f(x: Tensor) -> Tensor:
        return x + 1.0 if torch.distributed.is_initialized() else x * 2.0

    run = compiled(f)
    run(x)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        assert torch.equal(run(x), x * 2.0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_schedule_that_compiles_at_every_step_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    run = compiled(model, fullgraph=False)
    with caplog.at_level(logging.WARNING, logger="fusereg"):
        for count in range(7):
            model[1].p = 0.1 + 0.01 * count
            torch.manual_seed(count)
            y = run(torch.ones(8, 4))
            torch.manual_seed(count)
            z = fusereg.functional.dropout(model[0](torch.ones(8, 4)), model[1].p)
            torch.testing.assert_close(y, z)
    assert fused() == {"dropout": 7}
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fusereg"]
    assert "recompile_limit" in line
    assert "once an epoch" in line


# --- the entry point, its options and reports -----------------------------------------------------


def test_the_backend_is_registered_by_name() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[project.entry-points.torch_dynamo_backends\]\n(.*)$", text, re.M)
    assert found is not None
    assert found[1] == 'fusereg = "fusereg.backend:fusereg_backend"'
    try:
        version = importlib.metadata.distribution("fusereg")
    except importlib.metadata.PackageNotFoundError:
        return
    if version.entry_points.select(group="torch_dynamo_backends"):
        assert "fusereg" in torch.compiler.list_backends()


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        (None, {"them": "eager"}, "options must be among"),
        (None, {"then": "tensorrt"}, "'then' must be one of"),
        ("max-autotune", None, "is Inductor's"),
        (None, {"mode": "max-autotune"}, "is Inductor's"),
        (None, {"then": "inductor", "mode": "fastest"}, "Unrecognized mode"),
    ],
)
def test_an_unknown_option_or_mode_is_an_error(mode: Any, options: Any, words: str) -> None:
    module = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(ValueError, match=words):
        fusereg_backend(module, [], mode=mode, options=options)


def test_a_graph_is_reported_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fusereg"):
        compiled(Separable())(torch.randn(2, 3, 8, 8))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fusereg"]
    assert "Separable" in line
    assert "fused 2 batch_norm + relu, 2 batch_norm + silu; left: nothing" in line


def test_compiling_a_container_in_place_compiles_nothing_as_documented() -> None:
    """torch.nn's own forward is no root of a graph: m.compile() of a Sequential does nothing."""
    model = small()
    model.compile(backend=fusereg_backend)
    model(torch.randn(8, 4, dtype=torch.float64))
    assert counters["fusereg"] == {}


def test_compiling_a_module_in_place_keeps_its_state_dict() -> None:
    model = Separable()
    names = list(model.state_dict())
    model.compile(backend=fusereg_backend)
    model(torch.randn(2, 3, 8, 8))
    assert list(model.state_dict()) == names
    assert counters["fusereg"]["graphs"] == 1
