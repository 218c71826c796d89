"""The dropout family takes every call that torch's takes, with torch's result."""

from __future__ import annotations

import fractions
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusereg
from fusereg import functional as F
from ops import LAYOUTS

Function = Callable[..., Any]

#: Every name that torch.nn.functional and fusereg.functional, or torch.nn and fusereg.nn, share.
FUNCTIONS = [n for n in F.__all__ if hasattr(nn.functional, n)]
DROPOUTS = [n for n in FUNCTIONS if "dropout" in n]
LAYERS = [n for n in fusereg.nn.__all__ if hasattr(nn, n) and "Dropout" in n]

#: Functions that return their input where nothing is dropped, and a shape that each takes.
IDENTITIES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(DROPOUTS, (2, 3, 4)),
    "drop_path": (2, 3, 4),
    "drop_block2d": (2, 3, 4, 4),
    "gaussian_dropout": (2, 3, 4),
    "consistent_dropout": (2, 3, 4),
}

#: What torch.nn.Dropout(p) takes for a half.
HALVES: dict[str, Any] = {
    "float": 0.5,
    "numpy scalar": np.float32(0.5),
    "numpy double": np.float64(0.5),
    "numpy array": np.array(0.5),
    "tensor": torch.tensor(0.5),
    "tensor of one element": torch.tensor([0.5]),
    "16-bit tensor": torch.tensor(0.5, dtype=torch.bfloat16),
    "fraction": fractions.Fraction(1, 2),
}

by_name = pytest.mark.parametrize("name", DROPOUTS)


def quiet(call: Function, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """Return the result of a call, or its error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            result = error
    return result, [str(w.message) for w in caught]


def test_the_lists_are_whole() -> None:
    assert {"dropout", "dropout1d", "dropout2d", "dropout3d"} <= set(DROPOUTS)
    assert {"alpha_dropout", "feature_alpha_dropout"} <= set(DROPOUTS)
    assert len(LAYERS) == 6


# --- names, order and defaults --------------------------------------------------------------------


def assert_takes_the_calls_of(ours: Function, theirs: Function) -> None:
    """Every parameter of theirs is one of ours: same name, kind, place and default."""
    found, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    positional = [
        [n for n, p in of.items() if p.kind is p.POSITIONAL_OR_KEYWORD] for of in (found, wanted)
    ]
    assert positional[0][: len(positional[1])] == positional[1]
    handed_on = any(p.kind is p.VAR_KEYWORD for p in found.values())
    for name, parameter in wanted.items():
        if handed_on and name not in found and parameter.kind is parameter.KEYWORD_ONLY:
            continue
        assert name in found
        if name != "p" or found[name].default is not None:  # layers: keep_prob may be given
            assert found[name].default == parameter.default, name
    for name in set(found) - set(wanted):
        optional = found[name].default is not inspect.Parameter.empty
        assert optional or found[name].kind is inspect.Parameter.VAR_KEYWORD, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_parameters_of_torchs(name: str) -> None:
    assert_takes_the_calls_of(getattr(F, name), getattr(nn.functional, name))


@pytest.mark.parametrize("name", [n for n in fusereg.nn.__all__ if hasattr(nn, n)])
def test_layers_have_the_parameters_of_torchs(name: str) -> None:
    ours, theirs = getattr(fusereg.nn, name), getattr(nn, name)
    assert_takes_the_calls_of(ours, theirs)
    assert_takes_the_calls_of(ours.forward, theirs.forward)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_optimizers_have_the_parameters_of_torchs(name: str) -> None:
    ours, theirs = getattr(fusereg.optim, name), getattr(torch.optim, name)
    assert_takes_the_calls_of(ours, theirs)
    assert_takes_the_calls_of(ours.step, theirs.step)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm"])
def test_norms_have_the_parameters_of_torchs(name: str) -> None:
    assert_takes_the_calls_of(getattr(fusereg.optim, name), getattr(nn.utils, name))


@pytest.mark.parametrize("base", [nn.Linear, nn.Conv2d], ids=lambda c: c.__name__)
def test_drop_connect_layers_have_the_parameters_of_their_bases(base: type[nn.Module]) -> None:
    ours = getattr(fusereg.nn, f"DropConnect{base.__name__}")
    assert_takes_the_calls_of(ours, base)
    assert_takes_the_calls_of(ours.forward, base.forward)


@by_name
def test_the_input_may_be_named(name: str) -> None:
    x = torch.ones(2, 3, 4, 4)[0 if name == "dropout1d" else ...]
    y = getattr(F, name)(input=x, p=1.0, training=True, inplace=False)
    assert torch.equal(y, torch.zeros_like(x))


# --- p --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", IDENTITIES)
def test_p_may_be_any_number(name: str, kind: str) -> None:
    function, x = getattr(F, name), torch.ones(IDENTITIES[name])
    assert torch.equal(
        function(x, HALVES[kind], training=True, seed=3), function(x, 0.5, training=True, seed=3)
    )


@pytest.mark.parametrize("kind", HALVES)
def test_p_of_layers_may_be_any_number(kind: str) -> None:
    for name in (*LAYERS, "DropPath", "GaussianDropout", "DropBlock2d", "ConsistentDropout"):
        layer = getattr(fusereg.nn, name)(HALVES[kind])
        assert type(layer.p) is float
        assert layer.p == 0.5
        x = torch.ones((2, 3, 4) if name == "Dropout1d" else (2, 3, 4, 4))
        layer.p = HALVES[kind]
        torch.manual_seed(3)
        y = layer(x)
        layer.p = 0.5
        torch.manual_seed(3)
        if name == "ConsistentDropout":
            layer.reset()
            continue
        assert torch.equal(layer(x), y)


@by_name
def test_what_torch_refuses_as_p_is_refused(name: str) -> None:
    ours, theirs = getattr(F, name), getattr(nn.functional, name)
    x = torch.ones(2, 3, 4)
    for p in (-0.1, 1.5, "0.5", None, [0.5], torch.tensor([0.5, 0.5]), 0.5j):
        for function in (ours, theirs):
            assert isinstance(quiet(function, x, p, True)[0], (TypeError, ValueError, RuntimeError))
    for p in (True, 1):
        assert torch.equal(quiet(ours, x, p, True)[0], quiet(theirs, x, p, True)[0])


# --- where nothing is dropped ---------------------------------------------------------------------


def any_tensors() -> dict[str, Tensor]:
    found = {
        str(dtype): torch.ones(2, 3, 4, dtype=dtype)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16)
    }
    found["float8"] = torch.ones(2, 3, 4).to(torch.float8_e4m3fn)
    found["sparse"] = torch.ones(2, 3, 4).to_sparse()
    found["csr"] = torch.ones(3, 4).to_sparse_csr()
    found["meta"] = torch.ones(2, 3, 4, device="meta")
    found["0-d"] = torch.ones(())
    found["1-d"] = torch.ones(3)
    found["6-d"] = torch.ones(1, 2, 1, 2, 1, 2)
    found["empty"] = torch.ones(0, 3)
    found["leaf"] = torch.ones(2, 3, requires_grad=True)
    found["expanded"] = torch.ones(1, 1).expand(2, 3)
    found["jagged"] = torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
    )
    found["nested"] = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    return found


@pytest.mark.parametrize("name", IDENTITIES)
def test_where_nothing_is_dropped_any_tensor_is_returned_itself(name: str) -> None:
    function = getattr(F, name)
    theirs = getattr(nn.functional, name, None)
    for kind, x in any_tensors().items():
        for options in ({"p": 0.0, "training": True}, {"p": 0.5, "training": False}):
            for inplace in (False, True):
                if "inplace" in inspect.signature(function).parameters:
                    options["inplace"] = inplace
                if name == "consistent_dropout":
                    options["dim"] = None
                result, warned = quiet(function, x, **options)
                if theirs is not None:
                    wanted, also_warned = quiet(theirs, x.clone(), **options)
                    assert len(warned) == len(also_warned), (kind, options)
                    if isinstance(wanted, Exception) and isinstance(result, Exception):
                        assert name == "dropout1d"  # it asks for its dimensions here, too
                        continue
                assert result is x, (kind, options)


@by_name
def test_layers_in_evaluation_return_any_tensor_itself(name: str) -> None:
    words = {"alpha_dropout": "AlphaDropout", "feature_alpha_dropout": "FeatureAlphaDropout"}
    layer = getattr(fusereg.nn, words.get(name, name.capitalize()))(0.5).eval()
    for kind, x in any_tensors().items():
        result, _ = quiet(layer, x)
        assert result is x or (name == "dropout1d" and isinstance(result, ValueError)), kind


def test_a_strided_nested_tensor_is_not_dropped() -> None:
    nested = any_tensors()["nested"]
    assert isinstance(quiet(nn.functional.dropout, nested, 0.5)[0], Tensor)
    with pytest.raises(ValueError, match=r"fusereg\.dropout: .* nested"):
        F.dropout(nested, 0.5)


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
def test_jagged_tensors_are_dropped_by_their_values(name: str) -> None:
    parts = [torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    y = getattr(F, name)(x, 0.5, True, seed=3)
    assert y.shape == x.shape
    assert torch.equal(y.values(), getattr(F, name)(torch.ones(8, 4), 0.5, True, seed=3))
    total = (y + x).values().sum()
    total.backward()
    plain = torch.ones(8, 4, requires_grad=True)
    (getattr(F, name)(plain, 0.5, True, seed=3) + plain).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parts]), plain.grad)


# --- shapes, warnings -----------------------------------------------------------------------------


def counted(y: Tensor) -> int:
    """Return how many leading dimensions of a dropped tensor of ones have one value each."""
    for dims in range(y.dim() + 1):
        inner = tuple(range(dims, y.dim()))
        if not inner or torch.equal(y.amax(inner), y.amin(inner)):
            return dims
    raise AssertionError


@by_name
@pytest.mark.parametrize("dims", range(7))
def test_each_number_of_dimensions_is_dropped_as_by_torch(name: str, dims: int) -> None:
    """With as many warnings, and errors where torch has one."""
    torch.manual_seed(0)
    x = torch.ones((9, 8, 4, 2, 2, 2)[:dims])
    for training in (True, False):
        for inplace in (False, True):
            wanted, also_warned = quiet(
                getattr(nn.functional, name), x.clone(), 0.5, training, inplace
            )
            result, warned = quiet(getattr(F, name), x.clone(), 0.5, training, inplace)
            assert len(warned) == len(also_warned)
            for ours, theirs in zip(warned, also_warned, strict=True):
                words = ("deprecated",) if "deprecated" in theirs else ("(N, C, L)", "dropout1d")
                assert all(w in ours and w in theirs for w in (name, *words))
            if isinstance(wanted, Exception):
                assert isinstance(result, ValueError)
            else:
                assert result.shape == wanted.shape
                assert counted(result) == counted(wanted)
                assert result.unique().numel() <= 2


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 5, 2)], ids=str)
def test_a_converted_model_takes_what_torchs_dropout2d_takes(shape: tuple[int, ...]) -> None:
    """An example of 2020 has a Dropout2d of rows behind its first linear layer."""
    plain = nn.Sequential(nn.Dropout2d(0.5), nn.Flatten())
    converted = fusereg.convert(nn.Sequential(nn.Dropout2d(0.5), nn.Flatten()))
    x = torch.ones(shape)
    for training in (True, False):
        result, warned = quiet(converted.train(training), x)
        wanted, also_warned = quiet(plain.train(training), x)
        assert len(warned) == len(also_warned) == 1
        assert result.shape == wanted.shape
        assert set(result.unique().tolist()) <= {0.0, 2.0 if training else 1.0}


def test_the_warning_points_to_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.dropout2d(torch.ones(2, 3, 4))
        F.dropout3d(torch.ones(2), 0.5, False)
    assert [w.filename for w in caught] == [__file__] * 2


# --- layouts --------------------------------------------------------------------------------------

#: The shape of each kind of dropout for which it has its ordinary meaning.
SHAPES = {"dropout1d": (3, 4, 5), "dropout3d": (3, 4, 5, 2, 2)}


@by_name
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS, "transposed"])
def test_results_have_torchs_strides_in_eager_compiled_and_fake_calls(
    name: str, layout: str
) -> None:
    made = {**LAYOUTS, "contiguous": lambda t: t, "transposed": lambda t: t.transpose(1, 2)}
    x = made[layout](torch.ones(SHAPES.get(name, (3, 4, 5, 2))))
    ours, theirs = getattr(F, name), getattr(nn.functional, name)
    wanted = theirs(x, 0.5, True).stride()
    assert ours(x, 0.5, True).stride() == wanted
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: ours(t, 0.5, True), backend="aot_eager", fullgraph=True)
    assert compiled(x).stride() == wanted
    with FakeTensorMode() as mode:
        assert ours(mode.from_tensor(x), 0.5, True).stride() == wanted
    assert ours(torch.empty_like(x, device="meta"), 0.5, True).stride() in (
        wanted,
        torch.empty_like(x).stride(),
    )


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [fusereg.nn.Dropout(0.5), fusereg.nn.BatchNorm1d(4)], ids=repr)
def test_a_checkpoint_has_forward_and_backward_inside_of_a_mode_or_neither(
    layer: nn.Module,
) -> None:
    def forward() -> Tensor:
        x = torch.ones(3, 4).cumsum(0).requires_grad_()
        y: Tensor = checkpoint(lambda t: layer(t * 2) * t, x, use_reentrant=False)
        return y.sum()

    with FlopCounterMode(display=False):
        inside = forward()
        forward().backward()
    with pytest.raises(CheckpointError):  # which docs/migration.md lists
        inside.backward()
    forward().backward()


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    **{
        name: partial(getattr(F, name), p=0.4, training=True)
        for name in ("dropout", "dropout1d", "alpha_dropout", "feature_alpha_dropout", "drop_path",
                     "gaussian_dropout")
    },
    "dropout2d": lambda t: F.dropout2d(t[:, :, None], 0.4),
    "dropout3d": lambda t: F.dropout3d(t[:, :, None, None], 0.4),
    "drop_block": lambda t: F.drop_block2d(t[:, :, None], 0.4, 3),
    "bias_dropout_add": lambda t: F.bias_dropout_add(t, None, t, 0.4),
    "layer_norm": lambda t: F.dropout_add_layer_norm(t, None, p=0.4),
    "batch_norm": fusereg.nn.BatchNorm1d(8, dropout=0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", range(3))
def test_a_seed_draws_the_same_inside_of_a_mode_or_a_compiler(name: str, seed: int) -> None:
    def drawn(function: Callable[[Tensor], Any]) -> Tensor:
        torch.manual_seed(seed)
        found = function(torch.ones(4, 8, 40).cumsum(2))
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    wanted = drawn(DRAWS[name])
    with FlopCounterMode(display=False):
        assert torch.equal(drawn(DRAWS[name]), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(DRAWS[name], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(drawn(compiled), wanted)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("size", [64, 4096])
def test_a_reentrant_checkpoint_may_have_one_pass_inside_of_a_mode(where: str, size: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.ones(size, requires_grad=True)
        with FlopCounterMode(display=False) if where == "forward" else nullcontext():
            y = checkpoint(fusereg.nn.Dropout(0.4), x * 1, use_reentrant=True)
        with FlopCounterMode(display=False) if where == "backward" else nullcontext():
            y.sum().backward()
        assert torch.equal(x.grad, y)


# --- scripting ------------------------------------------------------------------------------------


def test_scripting_a_layer_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(2, 2), fusereg.nn.Dropout(0.5))
    for module in (model, model[1], fusereg.nn.BatchNorm1d(2)):
        with pytest.raises(
            RuntimeError, match=r"^torch\.jit\.script cannot compile .*torch\.export"
        ):
            torch.jit.script(module)
