"""What an eager call costs beside the kernel, counted instead of timed: frames of the interpreter.

On a tensor of 64 floats the kernel is a hundredth of the time; the rest is what Python runs before
and after it. The counts are those of the package's own files, as each stands: more of them is a
decision.
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import fusereg
from fusereg import _C
from fusereg.augment import MixedLabels
from fusereg.core import random
from fusereg.core.checks import check_input
from kernels_by_name import kernels_by_name
from ops import FUNCTIONS, sample

F = fusereg.functional
PACKAGE = str(Path(fusereg.__file__).parent)


def watched(call: Callable[[], Any], note: Callable[[Any], None], within: str = PACKAGE) -> Any:
    """Return the result of a call; ``note`` is given the frame of each function in these files."""

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(within):
            note(frame)

    sys.setprofile(watch)
    try:
        return call()
    finally:
        sys.setprofile(None)


def frames(call: Callable[[], Any], within: str = PACKAGE) -> tuple[Any, list[str]]:
    """Return the result of a call, and the functions in these files that it ran."""
    found: list[str] = []
    result = watched(call, lambda frame: found.append(frame.f_code.co_name), within)
    return result, found


def _of(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    x = torch.linspace(-2.0, 2.0, 64).view(8, 8).requires_grad_()
    return lambda: function(x)


def _norm(x: Tensor) -> Tensor:
    return F.dropout_add_layer_norm(x, x.detach(), torch.ones(8), torch.zeros(8), 0.5)


def _biased(x: Tensor) -> Tensor:
    return F.bias_dropout_add(x, torch.ones(8, requires_grad=True), x, 0.5)


_BATCH_NORM = fusereg.nn.BatchNorm2d(4, activation="relu", dropout=0.5)
_IMAGES = torch.linspace(-2.0, 2.0, 256).view(2, 4, 4, 8).requires_grad_()

_INDICES = torch.arange(8)
_MIXED = MixedLabels(_INDICES, _INDICES.flip(0), torch.linspace(0, 1, 8))

#: (call, functions of the package in forward, and in backward)
CALLS: dict[str, tuple[Callable[[], Tensor], int, int]] = {
    "Dropout": (_of(fusereg.nn.Dropout(0.5)), 3, 0),
    "Dropout1d": (_of(fusereg.nn.Dropout1d(0.5)), 5, 0),
    "gaussian_dropout": (_of(F.gaussian_dropout), 1, 0),
    "dropout_add": (_of(lambda x: F.dropout_add(x, x.detach(), 0.5)), 2, 0),
    "bias_dropout_add": (_of(_biased), 2, 0),
    "activation_dropout": (_of(lambda x: F.activation_dropout(x, 0.5, "gelu")), 1, 0),
    "dropout_add_layer_norm": (_of(_norm), 2, 0),
    "BatchNorm1d": (_of(fusereg.nn.BatchNorm1d(8)), 4, 0),
    "BatchNorm2d": (lambda: _BATCH_NORM(_IMAGES, residual=_IMAGES), 5, 0),
    "cross_entropy": (_of(lambda x: F.cross_entropy(x, _INDICES, label_smoothing=0.1)), 1, 0),
    "cross_entropy, mixed": (_of(lambda x: F.cross_entropy(x, _MIXED)), 1, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_eager_call_runs_few_functions(name: str) -> None:
    call, most_forward, most_backward = CALLS[name]
    call().sum().backward()  # imports, and this thread's memory
    for expanded in (False, True):  # a sum's gradient is one number, expanded
        y, forward = frames(call)
        grad = torch.ones(()).expand_as(y) if expanded else torch.ones_like(y)
        _, backward = frames(partial(torch.autograd.backward, (y,), (grad,)))
        assert len(forward) <= most_forward, forward
        assert len(backward) <= most_backward, backward


def test_a_dropout_layer_runs_nine_functions_of_python_at_most() -> None:
    """Those of torch.nn.Module are among them."""
    layer, x = fusereg.nn.Dropout(0.5), torch.ones(8, 8, requires_grad=True)
    layer(x)
    _, found = frames(partial(layer, x), within="")
    assert 4 <= len(found) <= 9, found


def checks(call: Callable[[], Any]) -> Counter[tuple[Any, ...]]:
    """Return how often a call ran each check on the same arguments."""
    found: Counter[tuple[Any, ...]] = Counter()
    kept: list[Any] = []  # so that no two objects have one address

    def note(frame: Any) -> None:
        code = frame.f_code
        if "check" in code.co_name or "checks.py" in code.co_filename:
            given = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]]
            kept.extend(given)
            values = (g if isinstance(g, str | int | float | None) else id(g) for g in given)
            found[(code.co_filename, code.co_name, *values)] += 1

    watched(call, note)
    return found


def test_nothing_is_checked_three_times_on_one_call() -> None:
    layer = torch.nn.Linear(4, 4)
    layer(torch.ones(2, 4)).sum().backward()
    augment = fusereg.augment.Augment(8, degrees=10, hflip=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)
    images = torch.rand(2, 3, 16, 16)
    calls: dict[str, Callable[[], Any]] = {
        operation.name: partial(operation, *sample(operation)) for operation in FUNCTIONS
    }
    calls["Augment"] = partial(augment, images)
    for kind in (fusereg.optim.SGD, fusereg.optim.AdamW, fusereg.optim.LAMB):
        optimizer: Any = kind(layer.parameters(), lr=0.1, l1=1e-3, l2=1e-3)
        calls[kind.__name__] = optimizer.step
    counts = {name: checks(call) for name, call in calls.items()}
    assert sum(map(len, counts.values())) > 200, "the checks were not found"
    often = {
        name: [check[:2] for check, times in found.items() if times > 2]
        for name, found in counts.items()
    }
    assert {name: found for name, found in often.items() if found} == {}


def test_what_is_checked_three_times_is_found() -> None:
    x = torch.ones(3)
    found = checks(lambda: [check_input(x, "snow") for _ in range(3)])
    assert max(found.values()) == 3


def _gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Return gradients that compiled functions take, and others that they leave to Python."""
    swapped = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    return [torch.randn(shape), swapped, torch.randn(1).expand(shape), torch.zeros(shape).conj()]


def test_the_backward_without_python_is_that_of_the_general_function() -> None:
    general: list[Any] = []
    for grad in _gradients((8, 8)):
        for function in (F.dropout, F.alpha_dropout, F.gaussian_dropout, *_ACTIVATIONS):
            for dtype in (torch.float64, torch.bfloat16):
                x = torch.randn(8, 8, dtype=dtype, requires_grad=True)
                options = {"training": True, "seed": 5}
                y = function(x, 0.25, **options)
                (eager,) = torch.autograd.grad(y, x, grad.to(dtype), retain_graph=True)
                again = grad.to(dtype).detach().requires_grad_()
                (differentiable,) = torch.autograd.grad(y, x, again, create_graph=True)
                assert torch.equal(eager, differentiable)
                general.append(differentiable.grad_fn)
    assert all(general), "a gradient that is differentiated again takes the general function"


_ACTIVATIONS = [partial(F.activation_dropout, activation=name) for name in ("relu", "gelu")]


def _laid(x: Tensor, layout: str) -> Tensor:
    """Return x as it is, with its channels innermost, or with its dimensions in reverse."""
    if layout == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order) if layout == "reversed" else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
def test_batch_norm_without_python_is_the_general_one(
    activation: str | None, training: bool, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"activation": activation, "dtype": dtype}
    for shape, layout, dropout, inputs in (
        ((6, 8), "contiguous", 0.0, 1),
        ((6, 8), "reversed", 0.25, 2),
        ((2, 8, 3, 5), "channels last", 0.25, 1),
        ((2, 8, 3, 5), "contiguous", 0.0, 2),
        ((2, 8, 1, 1), "channels last", 0.0, 2),
        ((2, 1, 3, 5), "channels last", 0.0, 1),
    ):
        results: list[list[Tensor]] = []
        for general in (False, True):
            torch.manual_seed(3)
            kind = fusereg.nn.BatchNorm1d if len(shape) == 2 else fusereg.nn.BatchNorm2d
            layer = kind(shape[1], dropout=dropout, **options).train(training)
            values = [_laid(torch.randn(shape, dtype=dtype), layout) for _ in range(inputs)]
            leaves = [t.requires_grad_() for t in values] + list(layer.parameters())
            grads = [grad.to(dtype) for grad in _gradients(shape)]
            with kernels_by_name() if general else nullcontext():
                y = layer(*values)
                found = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in grads]
            results.append([y, *(t for of_grad in found for t in of_grad), *layer.buffers()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), (shape, layout)
            assert a.stride() == b.stride(), (shape, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (6, 40), (3, 5, 2, 4)])
def test_cross_entropy_without_python_is_the_general_one(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    classes, *rest = shape if len(shape) == 1 else (shape[1], shape[0], *shape[2:])
    first = torch.arange(torch.Size(rest).numel()).mul(5).remainder(classes).view(rest)
    if rest:
        first.view(-1)[2] = 1 - classes
    targets: list[Any] = [first]
    if rest:
        targets.append(MixedLabels(first, first.flip(0), torch.linspace(0, 1, shape[0])))
    weight = torch.linspace(0.5, 2, classes, dtype=dtype)
    values = _laid(torch.randn(shape, dtype=dtype), "channels last")
    for target, w, e, reduction in itertools.product(
        targets, (None, weight), (0, 0.1), ("mean", "sum", "none")
    ):
        options: dict[str, Any] = {"label_smoothing": e, "ignore_index": 1 - classes}
        results: list[list[Tensor]] = []
        for general in (False, True):
            x = values.detach().requires_grad_()
            with kernels_by_name() if general else nullcontext():
                loss = F.cross_entropy(x, target, w, reduction=reduction, **options)
                with torch.no_grad():
                    alone = F.cross_entropy(x, target, w, reduction=reduction, **options)
                grads = [torch.randn(loss.shape, dtype=dtype).fill_(0.5)]
                if loss.dim() > 0:
                    grads += [torch.full((1,), 0.5, dtype=dtype).expand(loss.shape)]
                found = [
                    torch.autograd.grad(loss, x, grad, retain_graph=True, create_graph=again)[0]
                    for grad in grads
                    for again in (False, True)
                ]
            results.append([loss, alone, *found])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        of_loss = results[0][2:]
        assert all(torch.equal(grad, of_loss[0]) for grad in of_loss)
        assert [grad.requires_grad for grad in of_loss] == [False, True] * len(grads)


#: Calls whose autograd functions are compiled, on (x, residual).
_COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropout": lambda x, _: F.dropout(x, 0.5),
    "gaussian_dropout": lambda x, _: F.gaussian_dropout(x, 0.5),
    "activation_dropout, relu": lambda x, _: F.activation_dropout(x, 0.5, "relu"),
    "activation_dropout, gelu": lambda x, _: F.activation_dropout(x, 0.5, "gelu"),
    "dropout_add": lambda x, r: F.dropout_add(x, r, 0.5),
    "batch_norm": fusereg.nn.BatchNorm1d(8, activation="silu", dropout=0.5),
    # A loss for each element: of one class.
    "cross_entropy": lambda x, _: F.cross_entropy(
        x.unsqueeze(1), torch.zeros(8, 8, dtype=torch.int64), reduction="none"
    ),
}


#: All ones: as kernels take them, made dense first, and left to the general function.
_GRADS: dict[str, Callable[[], Tensor]] = {
    "taken": lambda: torch.ones(8, 8),
    "made dense": lambda: torch.ones(1).expand(8, 8),
    "left to Python": lambda: torch._neg_view(-torch.ones(8, 8)),
}


@pytest.mark.parametrize("name", _COMPILED)
@pytest.mark.parametrize("grad", [*_GRADS, "refused"])
def test_nothing_is_left_behind_by_thousands_of_calls(name: str, grad: str) -> None:
    call = _COMPILED[name]
    x, residual = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    given = {name: make() for name, make in _GRADS.items()}

    def calls(count: int) -> int:
        for _ in range(count):
            y = call(x, residual)
            if grad == "refused":
                with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
                    torch.autograd.grad(y, x, torch.ones(3))
            else:
                torch.autograd.grad(y, (x, residual), given[grad], allow_unused=True)
        del y
        gc.collect()
        return sys.getallocatedblocks()

    calls(300)
    held = [sys.getrefcount(t) for t in (x, residual, *given.values())]
    before = calls(50)
    count = 600 if grad == "refused" else 1200
    # The interpreter keeps some hundred free objects of each size.
    assert calls(count) - before < count // 2, "a call leaves objects behind"
    assert [sys.getrefcount(t) for t in (x, residual, *given.values())] == held


def _noted(asked: list[Tensor], held: Tensor) -> Tensor:
    asked.append(held)
    return held


def _fail(*_: object) -> Tensor:
    raise ZeroDivisionError("of the hook")


@pytest.mark.parametrize(
    "name",
    ["activation_dropout, relu", "activation_dropout, gelu", "batch_norm", "cross_entropy"],
)
def test_saved_tensors_are_asked_for_once_and_their_errors_are_shown(name: str) -> None:
    call = _COMPILED[name]
    x, residual = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    for make in _GRADS.values():
        grad = make()
        asked: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, partial(_noted, asked)):
            y = call(x, residual)
        (first,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert 0 < len(asked) == len({id(t) for t in asked})
        (second,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(y, x, grad)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, _fail):
            y = call(x, residual)
        with pytest.raises(ZeroDivisionError, match="of the hook"):
            torch.autograd.grad(y, x, grad)
        other = x.detach().clone().requires_grad_()
        between = other * 1.0
        y = call(between, residual)
        with torch.no_grad():
            (y if "relu" in name else between).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, other, grad)


class _Interrupts(TorchFunctionMode):
    """Raises where a function of torch is called."""

    def __init__(self, of: Callable[..., Any], raises: Callable[..., None]) -> None:
        super().__init__()
        self.of, self.raises = of, raises

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function == self.of:
            self.raises()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["activation_dropout, relu", "batch_norm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_in_the_middle_of_a_call_is_not_lost(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8, 8, requires_grad=True)
    raised: list[object] = []

    def interrupted(*_: object) -> None:
        raised.append(error)
        raise error

    def call() -> None:
        _COMPILED[name](x, x)

    for where in ("random_", "empty_like", "save_for_backward"):
        raised.clear()
        with monkeypatch.context() as patch:
            mode: AbstractContextManager[object] = nullcontext()
            if where == "save_for_backward":
                patch.setattr(torch.autograd.function.FunctionCtx, where, interrupted)
            else:
                mode = _Interrupts(getattr(Tensor, where, None) or torch.empty_like, interrupted)
            with mode, pytest.raises(error):
                call()
        # An error may be made again by Python, which says what is wrong; an interruption is one.
        assert len(raised) == 1 or error is ZeroDivisionError, where


def test_calls_from_several_threads_are_each_their_own() -> None:
    def work(seed: int) -> list[Tensor]:
        x = torch.linspace(-1.0, 1.0, 64).view(8, 8).requires_grad_()
        layer = fusereg.nn.BatchNorm1d(8, activation="relu")
        found = []
        for i in range(50):
            y = layer(F.activation_dropout(F.dropout(x, 0.5, seed=seed + i), 0.25, "gelu", seed=i))
            found.append(torch.autograd.grad(y.square().sum(), x)[0])
        return found

    wanted = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for came, right in zip(pool.map(work, range(4)), wanted, strict=True):
            assert all(map(torch.equal, came, right))


def test_the_gate_is_closed_while_something_traces() -> None:
    x = torch.ones(3)
    assert _C.direct(x, None)
    assert _C.direct()
    assert not _C.direct(torch.ones(3, device="meta"))
    assert not _C.direct(x.as_subclass(type("Own", (Tensor,), {})))
    with FakeTensorMode():
        assert not _C.direct()
    with _compiling():
        assert not _C.direct()
    seen: list[bool] = []
    torch.func.vmap(lambda t: (seen.append(_C.direct(x)), t)[1])(x)
    torch.jit.trace(lambda t: (seen.append(_C.direct(x)), t + 1)[1], x, check_trace=False)
    assert seen == [False, False]
    assert _C.direct(x)


@contextmanager
def _compiling() -> Iterator[None]:
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = False


def test_a_state_is_two_numbers_of_the_generator() -> None:
    generator = torch.Generator()
    for seed in range(3):
        generator.manual_seed(seed)
        torch.manual_seed(seed)
        wanted = tuple(torch.empty(2, dtype=torch.int64).random_(generator=generator).tolist())
        assert _C.random_state(None) == wanted
        assert _C.random_state(generator.manual_seed(seed)) == wanted
        with torch.inference_mode():
            assert _C.random_state(generator.manual_seed(seed)) == wanted
    with pytest.raises(TypeError, match="generator"):
        _C.random_state(5)  # type: ignore[arg-type]


def test_a_usual_call_draws_nothing_where_it_does_nothing() -> None:
    x, vector = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    state = torch.get_rng_state()

    def call(*tensors: Any, roles: str = "xvx") -> Any:
        return _C.drawn_at_once(_fail, _fail, roles, (0.5, 0, 0, "op"), *tensors)

    for other in (vector, x[:2], x.double(), x.t(), x.to("meta"), x.long(), 5, x.view(4, 8, 1)):
        assert call(x, None, other) is None
    for other in (x, vector[:4], vector.double(), vector.to("meta"), 5):
        assert call(x, other, x) is None
    assert call(5, None, x) is None
    assert call(torch.ones(()), None, torch.ones(())) is None
    assert _C.drawn_at_once(_fail, None, "x", (0.5, "op"), x.detach()) is None
    with torch.autograd.forward_ad.dual_level():
        assert call(x, roles="x") is None
    with FakeTensorMode():
        assert call(x, roles="x") is None
    for roles in ("", "xx", "xvx"):
        with pytest.raises(TypeError, match="other arguments"):
            call(x, roles=roles)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ZeroDivisionError, match="of the hook"):
        call(x, vector, x)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_with_dropout_are_those_of_the_general_function(
    bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = fusereg.fused_dropout.op
    forward, backward = op.add.general
    for grad in _gradients((4, 8)):
        for wanted in ((True, True, True), (False, True, False), (True, False, True)):
            for p in (0.25, 1.0):
                sizes = ((4, 8), (8,), (4, 8))
                tensors: list[Any] = [
                    torch.randn(size, dtype=dtype, requires_grad=want)
                    for size, want in zip(sizes, wanted, strict=True)
                ]
                if not bias:
                    tensors[1] = None
                x, vector, residual = tensors
                asked = [t for t in tensors if t is not None and t.requires_grad]
                if not asked:
                    continue

                def run(draw: Any, asked: list[Tensor] = asked, grad: Tensor = grad) -> Any:
                    torch.manual_seed(3)
                    y = draw()
                    return y, *torch.autograd.grad(y, asked, grad.to(dtype))

                def draw(x: Any = x, v: Any = vector, r: Any = residual, p: float = p) -> Tensor:
                    return F.bias_dropout_add(x, v, r, p)

                found = run(draw)
                with monkeypatch.context() as patch:
                    patch.setattr(op.add._function, "forward", staticmethod(forward))
                    patch.setattr(op.add._function._backward_cls, "apply", backward)
                    assert all(map(torch.equal, found, run(draw)))


def test_the_compiled_module_without_the_package_refuses_instead_of_aborting() -> None:
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for function in (module.random_state, module.direct):
    try:
        print(function(object()))
    except RuntimeError as error:
        print(error)
print(module.batch_norm_at_once(None, None, (None,) * 9, None, None, ""))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1:] == ["False", "None", ""]
    assert "is used through the package fusereg" in done.stdout


@pytest.mark.skipif(not hasattr(Tensor, "_use_count"), reason="torch < 2.13 does not count owners")
def test_the_memory_of_states_has_an_owner_besides_its_python_object() -> None:
    seen: list[int] = []

    def ask() -> None:
        seen.append(random._numbers()._use_count())  # type: ignore[attr-defined]

    for target in (ask, torch.inference_mode()(ask)):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert seen == [2, 2]
