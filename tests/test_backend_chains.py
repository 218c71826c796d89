"""Which chains the backend of torch.compile makes one call, which it leaves, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fusereg
from compiled_models import compiled, fresh, fused, left  # noqa: F401
from fusereg.backend import fusereg_backend
from plain_models import basic, close

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


def one_of_tied_statistics_is_left(x, r, *norm):
    y = bn(x.transpose(2, 3), *norm).transpose(2, 3)
    return y + F.relu(bn(r, *norm))


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
        (one_of_tied_statistics_is_left, {}, "differ from torch's in dtype, shape or strides"),
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
            lambda x, r, b: G.alpha_dropout(x, 0.5, True),
        ),
        (
            "feature_alpha_dropout",
            lambda x, r, b: F.feature_alpha_dropout(x, 0.5, True),
            lambda x, r, b: G.feature_alpha_dropout(x, 0.5, True),
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
