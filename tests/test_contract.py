"""What every operation of the inventory must do, in every way in which torch can call it.

Values and gradients in all dtypes, small and large, are in test_verify.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from conftest import Backend
from fusereg import _C
from fusereg.cli.checks import OPERATIONS
from fusereg.cli.checks._judge import digest, worst
from fusereg.core.inventory import Inputs, Operation, as_tuple
from odd_tensors import UNREADABLE
from ops import (
    CPU,
    DRAWN,
    FUNCTIONS,
    IN_PLACE,
    KINDS,
    LAYOUTS,
    PURE,
    Recorder,
    differentiated,
    laid_out,
    named,
    public_functions,
    sample,
    threads,
)

#: Public functions without a row, and why.
WITHOUT_ROW = {
    "orthogonality_penalty": "torch's operations: test_penalty_others.py",
    "spectral_norm_penalty": "torch's operations: test_penalty_others.py",
    "prox.max_norm_": "torch's operations: test_penalty_others.py",
    "prox.hierarchical_": "torch's operations: test_feature_selection.py",
    "augment.mix_labels": "arithmetic of torch on the parameters that Augment has drawn",
    "optim.param_groups_weight_decay": "sorts parameters into groups",
    "optim.load_planner": "makes a planner for checkpoints",
}


HALVES = (torch.float16, torch.bfloat16)


def assert_same(came: list[Tensor], wanted: list[Tensor], strided: int | None = None) -> None:
    """Check that tensors have the same bits and dtypes, and the first ones the same strides."""
    assert len(came) == len(wanted)
    assert [a.stride() for a in came[:strided]] == [b.stride() for b in wanted[:strided]]
    for a, b in zip(came, wanted, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def assert_near(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Check that results are as near to their references as the table of tolerances asks."""
    error, tolerance = worst(pairs)
    assert error <= tolerance


def test_every_public_function_has_an_operation() -> None:
    rows = {operation.name.partition(",")[0] for operation in OPERATIONS}
    assert set(public_functions()) - rows == set(WITHOUT_ROW)
    for operation in OPERATIONS:
        function = public_functions().get(operation.op)
        assert function is None or operation.function is function, operation.name


# --- shapes, layouts, results ---------------------------------------------------------------------


@named(FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(operation: Operation, layout: str, dtype: torch.dtype, backend: Backend) -> None:
    if operation.written and layout == "expanded" and operation.as_list:
        with pytest.raises(ValueError, match="memory"):
            operation(*laid_out(operation, layout, sample(operation)))
        return
    tensors = sample(operation, "small", dtype, backend.device)
    assert_near(operation.compare(laid_out(operation, layout, tensors)))


@named([operation for operation in FUNCTIONS if not operation.as_list])
def test_edge_shapes(operation: Operation, backend: Backend) -> None:
    for size in operation.shapes.keys() - {"tiny", "small", "large"}:
        for dtype in (torch.float64, torch.float16):
            assert_near(operation.compare(sample(operation, size, dtype, backend.device)))
    if "0-d" not in operation.shapes and operation.op in public_functions():
        tensors = sample(operation)
        tensors[operation.main] = torch.ones(())
        with pytest.raises(ValueError, match=r"dimension|shape|1D"):
            operation(*tensors)


@named([operation for operation in FUNCTIONS if operation.takes("out")])
@pytest.mark.parametrize("layout", ["permuted", "channels_last", "with gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out(operation: Operation, layout: str, dtype: torch.dtype, backend: Backend) -> None:
    tensors = sample(operation, "small", dtype, backend.device)
    wanted = operation(*tensors)
    out = LAYOUTS[layout](torch.full_like(wanted, 7.0))
    version = out._version
    assert operation(*tensors, out=out) is out
    assert out._version > version
    assert torch.equal(out, wanted)
    leaf = tensors[0].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{operation.op}: out"):
        operation(leaf, *tensors[1:], out=torch.empty_like(wanted))
    with pytest.raises(ValueError, match=f"{operation.op}: out must"):
        operation(*tensors, out=torch.empty_like(wanted)[:1])


@named(IN_PLACE)
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded"}))
def test_in_place(operation: Operation, layout: str, backend: Backend) -> None:
    """The result is the argument; values and gradients are those of a call that is not in place."""

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        changed: Tensor = x * 1
        version = changed._version
        result: Tensor = operation(changed, *rest, inplace=True)
        assert result is changed
        assert result._version > version
        return result

    refused = operation.refuses.get("in place")
    if refused is not None:
        x, *rest = sample(operation)
        with pytest.raises(ValueError, match=refused):
            operation(x.requires_grad_() * 1, *rest, inplace=True)
        return
    tensors = laid_out(operation, layout, sample(operation, "small", device=backend.device))
    assert_near(operation.compare(tensors, call))
    with torch.inference_mode():
        tensors = sample(operation)
        assert operation(*tensors, inplace=True) is tensors[0]
    leaf, *rest = sample(operation)
    with pytest.raises(ValueError, match=f"{operation.op}: {operation.arguments[0]} is"):
        operation(leaf.requires_grad_(), *rest, inplace=True)


@named(OPERATIONS)
def test_threads_and_instruction_sets_do_not_change_a_bit(operation: Operation) -> None:
    def bits() -> str:
        inputs = Inputs(CPU, torch.float32, "large")
        if operation.pairs is not None:
            return digest(operation.pairs(inputs))
        results = differentiated(operation, operation.sample(inputs))
        return digest([(y, y) for y in results])

    before = _C.cpu_isa()
    found = set()
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            for count in (1, 2, 5) if isa == _C.cpu_isas()[-1] else (1,):
                with threads(count):
                    found.add(bits())
    finally:
        _C.set_cpu_isa(before)
    assert len(found) == 1


@named(FUNCTIONS)
def test_results_without_gradients(operation: Operation) -> None:
    tensors = sample(operation)
    with torch.inference_mode():
        results = as_tuple(operation(*sample(operation)))
        assert all(y.is_inference() for y in results)
    leaves = [t.requires_grad_() for t in operation.differentiable(tensors)]
    with torch.no_grad():
        assert not any(y.requires_grad for y in as_tuple(operation(*tensors)))
    assert all(y.requires_grad for y in as_tuple(operation(*tensors))) or not leaves


# --- errors ---------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "int64": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
}


@named([operation for operation in FUNCTIONS if operation.op in public_functions()])
def test_a_wrong_argument_is_named(operation: Operation) -> None:
    """And nothing is drawn or written."""
    state = torch.get_rng_state()
    name = r"params\[0\]" if operation.as_list else operation.arguments[operation.main]
    for wrong in WRONG.values():
        tensors = sample(operation)
        before = [t.clone() for t in tensors]
        tensors[operation.main] = wrong(tensors[operation.main])
        with pytest.raises((TypeError, ValueError), match=rf"^fusereg\.{operation.op}: {name} "):
            operation(*tensors)
        del tensors[operation.main], before[operation.main]
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


ODD: dict[str, Callable[[], Any]] = {
    **{
        name: functools.partial(UNREADABLE[name][0], torch.device("cpu"))
        for name in ("nested, strided", "nested, jagged", "sparse COO", "sparse CSR", "quantized")
    },
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "a string": lambda: "x",
    "a number": lambda: 3,
    "a list": lambda: [1.0],
    "an array": lambda: np.ones(3),
    "a type": lambda: nn.ReLU,
}


@named([operation for operation in FUNCTIONS if operation.op in public_functions()])
def test_nothing_odd_gives_an_internal_error(operation: Operation) -> None:
    """Whichever argument it is: the function accepts it, or names itself in its error."""
    count = len(sample(operation))
    options = [name for name in ("out", "seed", "generator") if operation.takes(name)]
    for at, (kind, make) in itertools.product([*range(count), *options], ODD.items()):
        tensors, given = sample(operation), {"seed": None} if operation.takes("seed") else {}
        if isinstance(at, int):
            tensors[at] = make()
        else:
            given[at] = make()
        state, text = torch.get_rng_state(), ""
        try:
            operation(*tensors, **given)
        except (TypeError, ValueError, RuntimeError) as error:
            text = f"{error}"
        if not text or (operation.op.startswith("drop_connect") and at in (0, 2)):
            continue  # layers of torch say themselves what they want
        assert text.startswith("fusereg."), (at, kind)
        assert torch.equal(torch.get_rng_state(), state), (at, kind)


@named([operation for operation in FUNCTIONS if "p" in operation.options])
def test_a_wrong_probability_is_named(operation: Operation) -> None:
    state = torch.get_rng_state()
    for p in (-0.1, 1.5, float("nan"), "half", None):
        with pytest.raises((TypeError, ValueError), match=rf"^fusereg\.{operation.op}: p must be"):
            operation(*sample(operation), p=p, seed=None)
    assert torch.equal(torch.get_rng_state(), state)


@named([operation for operation in KINDS if operation.takes("index_offset")])
def test_a_wrong_index_offset_is_named_in_every_surrounding(operation: Operation) -> None:
    def call(*t: Tensor) -> Any:
        return operation(*t, index_offset=-1)

    def recorded(*t: Tensor) -> Any:
        with Recorder():
            return call(*t)

    tensors = sample(operation)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager")
    wrong = rf"fusereg\.{operation.op}: index_offset must be an integer and not negative, got -1"
    for surrounded in (call, recorded):
        with pytest.raises(ValueError, match=wrong):
            surrounded(*tensors)
    # Dynamo's own error shows it for functions that it takes as they are.
    with pytest.raises((ValueError, RuntimeError), match=wrong):
        compiled(*tensors)
    with pytest.raises(ValueError, match=wrong):
        torch.vmap(call)(*(t[None] for t in tensors))


# --- random numbers -------------------------------------------------------------------------------


@named(DRAWN)
def test_seeds_and_generators_reproduce(operation: Operation) -> None:
    tensors = sample(operation, "small")
    generator = torch.Generator()
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        generator.manual_seed(3)
        before = generator.get_state()
        drawn.append([as_tuple(operation(*tensors, seed=None))[0] for _ in range(2)])
        assert torch.equal(generator.get_state(), before)
        state = torch.get_rng_state()
        drawn[-1].append(as_tuple(operation(*tensors, seed=None, generator=generator))[0])
        operation(*tensors)
        assert torch.equal(torch.get_rng_state(), state)
    first, second = drawn
    assert_same(first, second)
    assert not torch.equal(first[0], first[1])
    state = torch.tensor([operation.options["seed"], 0])
    assert_same(as_tuple(operation(*tensors, seed=state)), as_tuple(operation(*tensors)))
    wrapped = [as_tuple(operation(*tensors, seed=seed)) for seed in (-1, 2**64 - 1)]
    assert_same(*wrapped)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed must have at most 64 bits"):
            operation(*tensors, seed=seed)


@named(DRAWN)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_numbers_again(operation: Operation, reentrant: bool) -> None:
    tensors = sample(operation, "small")
    seen: list[Tensor] = []

    def block(*t: Tensor) -> Tensor:
        y = as_tuple(operation(*t, seed=None))[0]
        seen.append(y.detach())
        return y.square()  # keeps y, so that it is computed a second time

    for t in operation.differentiable(tensors):
        t.requires_grad_()
    y = checkpoint(block, *tensors, use_reentrant=reentrant)
    torch.rand(8)
    y.sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


# --- derivatives ----------------------------------------------------------------------------------


@named(PURE)
def test_derivatives_of_both_orders_and_batches_of_them(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation, dtype=torch.float64))
    leaves = tuple(t.requires_grad_() for t in leaves)
    batched: Any = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(call, leaves, **batched)
    # With a gradient that nothing is computed from, as that of a sum.
    ones = [torch.ones_like(y) for y in as_tuple(call(*leaves)) if y.requires_grad]
    assert torch.autograd.gradgradcheck(call, leaves, ones, fast_mode=True)


@named(PURE)
@pytest.mark.parametrize("turn", [1, -1])
def test_a_gradient_is_the_same_where_it_may_be_differentiated(
    operation: Operation, turn: int
) -> None:
    """Of arguments that were computed from each other, as a block's input and its shortcut are."""
    call, leaves = operation.as_function(sample(operation, dtype=torch.float64))
    sources = tuple(t.requires_grad_() for t in leaves)[::turn]
    arguments = list(sources)
    for i in range(1, len(sources)):
        arguments[i] = sources[i] + arguments[i - 1].mean() / 8
    y = as_tuple(call(*arguments[::turn]))[0]
    grad = torch.randn_like(y)
    wanted, came = (
        torch.autograd.grad(y, sources, grad, retain_graph=True, create_graph=again)
        for again in (False, True)
    )
    torch.testing.assert_close(came, wanted)


@named(PURE)
def test_forward_mode_does_not_depend_on_gradients(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation, dtype=torch.float64))
    tangents = [torch.randn_like(t) for t in leaves]

    def derived(grad: bool, tangents: list[Tensor]) -> list[Tensor | None]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
            with torch.set_grad_enabled(grad):
                return [forward_ad.unpack_dual(y).tangent for y in as_tuple(call(*duals))]

    came, wanted = derived(False, tangents), derived(True, tangents)
    assert any(t is not None for t in wanted)
    torch.testing.assert_close(came, wanted)

    # Forward over reverse: the tangent of a gradient that nobody differentiates by autograd.
    leaves = tuple(t.requires_grad_() for t in leaves)
    y = as_tuple(call(*leaves))[0]
    grad, moved = torch.randn_like(y), torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, moved, retain_graph=True, allow_unused=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, moved)
        found = torch.autograd.grad(y, leaves, dual, allow_unused=True)
        came = [None if t is None else forward_ad.unpack_dual(t).tangent for t in found]
        torch.testing.assert_close(came, list(wanted))


@named([*PURE, *DRAWN])
def test_the_default_device_is_for_new_tensors_alone(operation: Operation) -> None:
    tensors = sample(operation, "small")
    seed: dict[str, Any] = {"seed": None} if operation in DRAWN else {}

    def call() -> list[Tensor]:
        torch.manual_seed(1)
        return as_tuple(operation(*tensors, **seed))

    wanted = call()
    with torch.device("meta"), ThreadPoolExecutor(1) as fresh:
        came = call()
        torch.set_default_device("meta")
        try:  # a thread that makes what it keeps between calls
            for again in (came, fresh.submit(call).result()):
                assert_same(list(again), list(wanted))
        finally:
            torch.set_default_device(None)


@named(PURE)
def test_derivatives_of_both_orders_through_the_operators(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation, dtype=torch.float64))
    leaves = tuple(t.requires_grad_() for t in leaves)

    def recorded(*t: Tensor) -> Any:
        with Recorder():
            return call(*t)

    assert torch.autograd.gradcheck(recorded, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(recorded, leaves, fast_mode=True)


@named(PURE)
def test_vectorized_jacobians(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation))

    def first(*t: Tensor) -> Tensor:
        return as_tuple(call(*t))[0]

    came = torch.autograd.functional.jacobian(first, leaves, vectorize=True)
    wanted = torch.autograd.functional.jacobian(first, leaves)
    torch.testing.assert_close(came, wanted)


# --- torch.func -----------------------------------------------------------------------------------


@named(PURE)
def test_vmap_is_a_loop(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation))
    batches = tuple(torch.stack([t, t.flip(0), 2 * t], 1) for t in leaves)
    came = torch.vmap(call, in_dims=1)(*batches)
    each = [as_tuple(call(*(b.select(1, i) for b in batches))) for i in range(3)]
    for y, wanted in zip(as_tuple(came), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(y, torch.stack(wanted), rtol=1e-6, atol=1e-6)


@named(DRAWN)
def test_vmap_draws_as_it_is_told(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation, "small"), seed=None)
    batches = tuple(torch.stack([t] * 3) for t in leaves)

    def drawn(*t: Tensor) -> Tensor:
        return as_tuple(call(*t))[0]

    different = torch.vmap(drawn, randomness="different")(*batches)
    assert not torch.equal(different[0], different[1])
    equal = torch.vmap(drawn, randomness="same")(*batches)
    assert torch.equal(equal[0], equal[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(drawn)(*batches)


@named(PURE)
def test_func_grad_and_jvp(operation: Operation) -> None:
    call, leaves = operation.as_function(sample(operation, dtype=torch.float64))

    def loss(*t: Tensor) -> Tensor:
        return sum((y.square().sum() for y in as_tuple(call(*t))), torch.zeros(()))

    numbers = tuple(range(len(leaves)))
    came = torch.func.grad(loss, argnums=numbers)(*leaves)
    fresh = [t.detach().clone().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(loss(*fresh), fresh)
    torch.testing.assert_close(came, wanted)
    batches = [torch.stack([t, 2 * t]) for t in leaves]
    each = torch.vmap(torch.func.grad(loss, argnums=numbers))(*batches)
    torch.testing.assert_close(tuple(g[0] for g in each), wanted)
    tangent = torch.func.jvp(loss, leaves, leaves)[1]
    torch.testing.assert_close(
        tangent, sum((w * t).sum() for w, t in zip(wanted, leaves, strict=True))
    )
    # The Hessian's product with a vector: forward mode over reverse mode, and reverse over reverse.
    first = torch.autograd.grad(loss(*fresh), fresh, create_graph=True)
    product = torch.func.jvp(torch.func.grad(loss, argnums=numbers), leaves, leaves)[1]
    torch.testing.assert_close(product, torch.autograd.grad(first, fresh, leaves))
    # Forward mode over forward mode is right or refused.
    with contextlib.suppress(NotImplementedError):
        twice = torch.func.jvp(lambda *t: torch.func.jvp(loss, t, leaves)[1], leaves, leaves)[1]
        curvature = sum((h * t).sum() for h, t in zip(product, leaves, strict=True))
        torch.testing.assert_close(twice, curvature)


# --- torch.library, compilers ---------------------------------------------------------------------


#: BatchRenorm's row makes its layer in each call.
TRACEABLE = [operation for operation in FUNCTIONS if operation.name != "nn.BatchRenorm"]


def results_of(operation: Operation) -> int:
    """Return how many results an operation has; their strides are promised, its gradients' not."""
    return len(as_tuple(operation(*sample(operation))))


@named(FUNCTIONS)
def test_the_operators_give_the_eager_bits(operation: Operation) -> None:
    for layout in ("permuted", "channels_last"):
        tensors = [laid_out(operation, layout, sample(operation, "small")) for _ in range(2)]
        recorder = Recorder()

        def call(*t: Tensor, recorder: Recorder = recorder) -> Any:
            with recorder:
                return operation(*t)

        came = differentiated(operation, tensors[0], call)
        assert_same(came, differentiated(operation, tensors[1]), results_of(operation))
        assert recorder.calls


@named(TRACEABLE, slow_variants=True)
def test_compiled_is_eager(operation: Operation) -> None:
    torch._dynamo.reset()
    options = {"index_offset": 3} if operation.takes("index_offset") else {}

    def call(*t: Tensor) -> Any:
        return operation(*t, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    tensors = [laid_out(operation, "permuted", sample(operation)) for _ in range(2)]
    # The row's numbers are constants, as they are where a program writes them down.
    with torch._dynamo.config.patch(specialize_float=True):
        came = differentiated(operation, tensors[0], compiled)
    assert_same(came, differentiated(operation, tensors[1], call), results_of(operation))


@named([operation for operation in KINDS if operation in DRAWN])
def test_compiled_draws_anew(operation: Operation) -> None:
    torch._dynamo.reset()
    tensors = sample(operation, "small")
    compiled = torch.compile(
        lambda *t: operation(*t, seed=None), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(1)
    first, second = (as_tuple(compiled(*tensors)) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(1)
    assert_same(as_tuple(compiled(*tensors)), first)


@pytest.mark.slow
@named(KINDS)
def test_inductor_is_eager(operation: Operation) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: operation(*t), fullgraph=True)
    # Inductor's own code for batch norm adds in the dtype of x, whose mean is far from zero here.
    dtype = torch.float64 if operation.technique == "batch_norm" else torch.float32
    tensors = [sample(operation, dtype=dtype) for _ in range(2)]
    came = differentiated(operation, tensors[0], compiled)
    for a, b in zip(came, differentiated(operation, tensors[1]), strict=True):
        torch.testing.assert_close(a, b)


class AsModule(nn.Module):
    """An operation as a module, to be exported."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *tensors: Tensor) -> Any:
        return self.operation(*tensors)


@named(TRACEABLE, slow_variants=True)
def test_export(operation: Operation) -> None:
    program = torch.export.export(AsModule(operation), tuple(sample(operation)))
    assert "fusereg." in str(program)
    tensors = [sample(operation) for _ in range(2)]
    module: Any = program.module()
    assert_same(as_tuple(module(*tensors[0])), as_tuple(operation(*tensors[1])))
    came, wanted = (operation.select(t, operation.written) for t in tensors)
    assert_same(came, wanted)


@named(PURE)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_operators(operation: Operation, mode: Any) -> None:
    tensors = sample(operation)
    graph = make_fx(lambda *t: operation(*t), tracing_mode=mode)(*tensors)
    assert "fusereg." in graph.code
    assert_same(as_tuple(graph(*tensors)), as_tuple(operation(*tensors)))


@named(TRACEABLE)
def test_fake_and_meta_tensors(operation: Operation) -> None:
    for layout in ("permuted", "channels_last"):
        tensors = laid_out(operation, layout, sample(operation, "small", torch.bfloat16))
        wanted = differentiated(operation, tensors)
        mode = FakeTensorMode()
        found: list[Tensor] = [mode.from_tensor(t.detach()) for t in tensors]
        with mode:
            came = differentiated(operation, found)
        metas = [t.detach().to("meta") for t in tensors]
        if "meta" in operation.refuses:
            with pytest.raises(ValueError, match=operation.refuses["meta"]):
                operation(*metas)
            results = wanted[: results_of(operation)]
        else:
            results = as_tuple(operation(*metas))
            assert all(y.is_meta for y in results)
        for a, b in zip(came, wanted, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if operation.technique != "drop_connect":  # its product is torch's
            for a, b in [*zip(came, results, strict=False), *zip(results, wanted, strict=False)]:
                assert a.stride() == b.stride()


# DropConnect's product is torch's, which autocast casts; a loss is float32 there, as torch's is.
@named([op for op in FUNCTIONS if op.technique not in ("drop_connect", "cross_entropy")])
def test_autocast_keeps_the_dtype_that_comes(operation: Operation) -> None:
    for dtype, cast in itertools.product((torch.float32, torch.bfloat16), HALVES):
        tensors = [sample(operation, dtype=dtype) for _ in range(2)]
        with torch.autocast("cpu", cast):
            came = differentiated(operation, tensors[0])
        assert_same(came, differentiated(operation, tensors[1]))


# --- opcheck --------------------------------------------------------------------------------------


@cache
def recorded_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Return the calls of each operator that all operations and their derivatives make."""
    calls: dict[str, list[tuple[Any, ...]]] = {}
    for operation in OPERATIONS:
        recorder = Recorder()
        with recorder:
            if operation.reference is None:
                operation.check(Inputs(CPU, torch.float32, "tiny"))
            else:
                second_derivative(operation)
        for overload, found in recorder.calls.items():
            calls.setdefault(overload._schema.name.removeprefix("fusereg::"), []).extend(found)
    return calls


def second_derivative(operation: Operation) -> None:
    """Differentiate the operation twice where it has derivatives."""
    tensors = sample(operation)
    leaves = [t.requires_grad_() for t in operation.differentiable(tensors)]
    outputs = [y for y in as_tuple(operation(*tensors)) if y.requires_grad]
    if not outputs:
        return
    loss = sum((y.square().sum() for y in outputs), torch.zeros(()))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    sum((g.square().sum() for g in first), torch.zeros(())).backward()


def operators() -> list[str]:
    """Return the names of all operators of fusereg."""
    names = (str(name) for name in torch._C._dispatch_get_all_op_names())
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("fusereg::")})


# optimizer_step_ is called by compiled steps alone: see test_optimizer_compile.py.
@pytest.mark.parametrize("name", sorted({*operators()} - {"optimizer_step_"}))
def test_opcheck(name: str) -> None:
    """With what the operations call it, each set of constants once; compiled for the first."""
    overload = getattr(torch.ops.fusereg, name).default
    # These refuse to be differentiated with respect to all they take, with an error.
    refuses = ("batch_norm_backward", "cross_entropy", "cross_entropy_backward")
    constant = any(a.alias_info is not None for a in overload._schema.arguments)
    constant = constant or name in refuses

    def as_leaf(t: Tensor) -> Tensor:
        return t.clone().requires_grad_(t.is_floating_point() and not constant)

    seen: set[str] = set()
    for args in recorded_calls()[name]:
        constants = str(torch.utils._pytree.tree_map_only(Tensor, lambda t: t.dim(), args))
        if constants in seen:
            continue
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not seen:
            checks.append("test_aot_dispatch_dynamic")
        seen.add(constants)
        arguments = torch.utils._pytree.tree_map_only(Tensor, as_leaf, args)
        torch.library.opcheck(overload, arguments, test_utils=tuple(checks))
