"""Few elements on the CPU: torch's multiplication by factors that the kernel draws.

A node of torch's own records it, which keeps the factors. Results are those of the kernel all the
same, and gradients too but for what a dropped element makes of an infinite one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fusereg
from fusereg import _C, nn
from fusereg import functional as F
from ops import saved_by

#: Of more elements than this, the kernel computes the gradient.
FEW = 1024
#: Inputs of three samples.
SHAPES = {1: (3, 4, 5), 2: (3, 4, 5, 6), 3: (3, 4, 2, 2, 3)}

Kind: TypeAlias = tuple[Callable[..., Tensor], tuple[int, ...]]
KINDS: dict[str, Kind] = {
    "dropout": (F.dropout, SHAPES[1]),
    "dropout1d": (F.dropout1d, SHAPES[1]),
    "dropout2d": (F.dropout2d, SHAPES[2]),
    "dropout3d": (F.dropout3d, SHAPES[3]),
    "alpha_dropout": (partial(F.alpha_dropout, training=True), SHAPES[1]),
    "feature_alpha_dropout": (partial(F.feature_alpha_dropout, training=True), SHAPES[2]),
    "drop_path": (F.drop_path, SHAPES[2]),
    "gaussian_dropout": (F.gaussian_dropout, SHAPES[1]),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = fusereg.cpu.instruction_set()
    fusereg.cpu.set_instruction_set(request.param)
    yield
    fusereg.cpu.set_instruction_set(before)


def drawn(function: Callable[..., Tensor], x: Tensor, p: float) -> Tensor:
    """Return a usual call's result, with the same draws each time."""
    torch.manual_seed(3)
    return function(x, p)


def general(function: Callable[..., Tensor], x: Tensor, p: float) -> Tensor:
    """Return the same by a call whose gradient the kernel computes: with the state as a seed."""
    torch.manual_seed(3)
    return function(x, p, seed=torch.tensor(_C.random_state(None)))


def by_factors(y: Tensor) -> bool:
    assert y.grad_fn is not None
    return y.grad_fn.name() == "MulBackward0"


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({4: torch.int32, 8: torch.int64}[t.element_size()])


def layouts(x: Tensor) -> list[Tensor]:
    """Return x in layouts without gaps."""
    found = [x]
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
    order = tuple(reversed(range(x.dim())))
    return [*found, x.permute(order).contiguous().permute(order)]


# --- which calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_elements_keep_their_factors_alone(kind: Kind, dtype: torch.dtype) -> None:
    function, shape = kind
    for rows in (shape[0], FEW // math.prod(shape[1:])):
        x = torch.randn(rows, *shape[1:], dtype=dtype, requires_grad=True)
        for given in (x, torch.nn.Parameter(x.detach()), x * 1.0):
            y, kept = saved_by(partial(function, given, 0.25))
            assert by_factors(y)
            assert [t.nbytes for t in kept] == [x.nbytes]
            assert y.dtype is dtype
            assert y._version == 0


def test_all_others_keep_nothing(kind: Kind) -> None:
    function, shape = kind
    x = torch.randn(shape, requires_grad=True)
    many = torch.randn(FEW // math.prod(shape[1:]) + 1, *shape[1:], requires_grad=True)
    others = [
        many,
        x.half(),
        x.bfloat16(),
        x[:0],
        x[..., ::2],
        x[..., :1].expand(shape),
        torch._neg_view(x),
    ]
    for other in others:
        y, kept = saved_by(partial(function, other, 0.25))
        assert kept == []
        assert not by_factors(y)
    assert torch.equal(drawn(function, others[-1], 0.25), drawn(function, -x, 0.25))
    for options in ({"index_offset": 4}, {"seed": 5}, {"generator": torch.Generator()}):
        assert not by_factors(function(x, 0.25, **options))
    assert not by_factors(function(x * 1.0, 0.25, inplace=True))
    with torch.no_grad():
        assert function(x, 0.25).grad_fn is None


def test_transforms_and_tangents_take_other_ways(kind: Kind) -> None:
    function, shape = kind
    x, tangent = torch.randn(shape, requires_grad=True), torch.randn(shape)
    with torch.autograd.forward_ad.dual_level():
        y = function(torch.autograd.forward_ad.make_dual(x, tangent), 0.25)
        assert not by_factors(y)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    gradient = torch.func.grad(lambda t: function(t, 0.25).sum())(x.detach())
    assert gradient.shape == shape
    assert not by_factors(torch.func.vmap(partial(function, p=0.25), randomness="same")(x[None])[0])


def test_layers_too() -> None:
    for layer in (nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.DropPath(0.5), nn.GaussianDropout(0.5)):
        assert by_factors(layer(torch.randn(4, 8, requires_grad=True)))
        assert not by_factors(layer(torch.randn(FEW + 1, 1, requires_grad=True)))


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 0.25, 0.3, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", fusereg.cpu.instruction_sets(), indirect=True)
@pytest.mark.usefixtures("isa")
def test_the_bits_are_those_of_the_kernel(kind: Kind, dtype: torch.dtype, p: float) -> None:
    function, shape = kind
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    x.view(-1)[::7] = -0.0
    for special in (math.inf, -math.inf, math.nan, 1e-310 if dtype is torch.float64 else 1e-40):
        x.view(-1)[torch.randint(x.numel(), (5,))] = special
    *common, reverse = layouts(x)
    for laid in (*common, reverse):
        leaf = laid.clone().requires_grad_()
        y, reference = drawn(function, leaf, p), general(function, leaf, p)
        # Kernels cannot tell the rows of a tensor whose dimensions are in reverse.
        assert by_factors(y) or laid is reverse
        assert not by_factors(reference)
        assert y.stride() == laid.stride()
        assert torch.equal(bits(y), bits(reference))
        assert torch.equal(bits(y), bits(drawn(function, laid, p)))
        for g in (*layouts(grad), grad.new_ones(()).expand(shape)):
            (found,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
            (wanted,) = torch.autograd.grad(reference, leaf, g, retain_graph=True)
            assert torch.equal(found, wanted)
            assert torch.equal(bits(found[wanted != 0]), bits(wanted[wanted != 0]))


def test_what_a_dropped_element_makes_of_a_gradient() -> None:
    """Of few elements it is the product, as in torch; of many it is 0."""
    for size in (FEW, FEW + 1):
        x = torch.randn(size, requires_grad=True)
        y = drawn(F.dropout, x, 0.5)
        kept = drawn(F.dropout, torch.ones(size), 0.5) != 0

        def gradient(value: float, x: Tensor = x, y: Tensor = y) -> Tensor:
            (found,) = torch.autograd.grad(y, x, torch.full_like(y, value), retain_graph=True)
            return found

        for value in (math.inf, -math.inf, math.nan):
            assert torch.equal(bits(gradient(value)[kept]), bits(torch.full_like(x[kept], value)))
            dropped = gradient(value)[~kept]
            assert dropped.isnan().all() if size == FEW else not bits(dropped).any()
        for value in (1.0, -1.0):
            assert torch.equal(gradient(value), torch.where(kept, 2.0 * value, 0.0))
            signs = gradient(value)[~kept].signbit()
            assert signs.all() if size == FEW and value < 0.0 else not signs.any()


def test_a_dropped_inf_or_nan_becomes_zero() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0]).repeat(16).requires_grad_()
    kept = drawn(F.dropout, torch.ones(64), 0.5) != 0
    y = drawn(F.dropout, x, 0.5)
    assert by_factors(y)
    assert not bits(y.detach()[~kept]).any()
    (grad,) = torch.autograd.grad(y, x, torch.ones(64))
    assert torch.equal(grad, torch.where(kept, 2.0, 0.0))


# --- inside autograd ------------------------------------------------------------------------------


def test_derivatives_of_any_order(kind: Kind) -> None:
    function, shape = kind
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    call = partial(drawn, function, p=0.3)
    assert by_factors(call(x))
    assert torch.autograd.gradcheck(call, (x,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: call(t * t), (x,))


@pytest.mark.parametrize("way", ["reentrant", "to the end", "as far as needed"])
def test_activation_checkpointing_draws_the_same(way: str) -> None:
    block = torch.nn.Sequential(
        torch.nn.Linear(8, 8), nn.Dropout(0.5), torch.nn.Tanh(), nn.AlphaDropout(0.2)
    )
    found = []
    for use in (False, True):
        torch.manual_seed(3)
        x = torch.linspace(-1.0, 1.0, 32).view(4, 8).requires_grad_()
        with set_checkpoint_early_stop(way == "as far as needed"):
            y = checkpoint(block, x, use_reentrant=way == "reentrant") if use else block(x)
            y.sum().backward()
        assert use or by_factors(y)
        assert x.grad is not None
        found.append((y.detach(), x.grad, torch.rand(1)))
    assert all(map(torch.equal, *found))


def test_an_error_of_a_hook_is_shown_and_the_call_not_made_again() -> None:
    """Activation checkpointing ends its second forward pass so."""
    seen: list[Tensor] = []

    def fail(t: Tensor) -> Tensor:
        seen.append(t)
        raise ZeroDivisionError

    x = torch.randn(8, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(fail, lambda t: t)
    with hooks, pytest.raises(ZeroDivisionError):
        F.dropout(x, 0.5)
    assert len(seen) == 1


def test_results_and_inputs_may_be_overwritten() -> None:
    x = torch.randn(8, requires_grad=True)
    wanted = drawn(F.dropout, torch.ones(8), 0.5)
    between = x * 1.0
    y = drawn(F.dropout, between, 0.5)
    between.detach().zero_()
    y.relu_()
    for _ in range(2):
        (found,) = torch.autograd.grad(y, x, torch.ones(8), retain_graph=True)
        assert torch.equal(found, torch.where(y > 0.0, wanted, 0.0))
    with torch.autograd.detect_anomaly(check_nan=True):
        drawn(F.dropout, x, 0.5).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


def test_under_autocast_and_deterministic_algorithms() -> None:
    x = torch.randn(8, requires_grad=True)
    wanted = drawn(F.dropout, x, 0.5)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = drawn(F.dropout, x, 0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert by_factors(y)
    assert torch.equal(y, wanted)
