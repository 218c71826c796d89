"""What an eager call costs beside the kernel, counted instead of timed: frames of the interpreter.

On a tensor of 64 floats the kernel is a hundredth of the time; the rest is what Python runs before
and after it. The counts are those of the package's own files, as each stands: more of them is a
decision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusereg
from fusereg import _C

F = fusereg.functional
PACKAGE = str(Path(fusereg.__file__).parent)


def frames(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a call, and the functions of the package that it ran."""
    found: list[str] = []

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return result, found


def _of(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    x = torch.linspace(-2.0, 2.0, 64).view(8, 8).requires_grad_()
    return lambda: function(x)


def _norm(x: Tensor) -> Tensor:
    return F.dropout_add_layer_norm(x, x.detach(), torch.ones(8), torch.zeros(8), 0.5)


#: (call, functions of the package in forward, and in backward)
CALLS: dict[str, tuple[Callable[[], Tensor], int, int]] = {
    "Dropout": (_of(fusereg.nn.Dropout(0.5)), 4, 0),
    "Dropout1d": (_of(fusereg.nn.Dropout1d(0.5)), 5, 0),
    "gaussian_dropout": (_of(F.gaussian_dropout), 16, 0),
    "dropout_add": (_of(lambda x: F.dropout_add(x, x.detach(), 0.5)), 8, 3),
    "activation_dropout": (_of(lambda x: F.activation_dropout(x, 0.5, "gelu")), 9, 8),
    "dropout_add_layer_norm": (_of(_norm), 22, 13),
    "BatchNorm1d": (_of(fusereg.nn.BatchNorm1d(8)), 15, 5),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_eager_call_runs_few_functions(name: str) -> None:
    call, most_forward, most_backward = CALLS[name]
    call().sum().backward()  # imports, and this thread's memory
    y, forward = frames(call)
    _, backward = frames(lambda: torch.autograd.backward((y,), (torch.ones_like(y),)))
    assert len(forward) <= most_forward, forward
    assert len(backward) <= most_backward, backward


def test_the_backward_without_python_is_that_of_the_general_function() -> None:
    general: list[Any] = []
    for grad in (torch.randn(8, 8), torch.randn(8, 8).t(), torch.randn(1).expand(8, 8)):
        for function in (F.dropout, F.alpha_dropout, F.gaussian_dropout):
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


def test_the_gate_is_closed_while_something_traces() -> None:
    x = torch.ones(3)
    assert _C.ready(x, x)
    assert _C.direct(x, None)
    assert _C.direct()
    meta = torch.ones(3, device="meta")
    for other in (torch.ones(4), x.double(), x.long(), None, x.to_sparse(), meta):
        assert not _C.ready(x, other)
    assert not _C.direct(torch.ones(3, device="meta"))
    assert not _C.direct(x.as_subclass(type("Own", (Tensor,), {})))
    with FakeTensorMode():
        assert not _C.direct()
    with _compiling():
        assert not _C.direct()
    seen: list[bool] = []
    torch.func.vmap(lambda t: (seen.append(_C.ready(x)), t)[1])(x)
    torch.jit.trace(lambda t: (seen.append(_C.ready(x)), t + 1)[1], x, check_trace=False)
    assert seen == [False, False]
    assert _C.ready(x)


@contextmanager
def _compiling() -> Iterator[None]:
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = False


def test_a_pair_is_read_of_two_integers_alone() -> None:
    assert _C.pair_of(torch.tensor([-(2**63), 7])) == (-(2**63), 7)
    for wrong in (torch.ones(2), torch.tensor([1, 2, 3]), torch.ones(2, dtype=torch.int32), None):
        with pytest.raises(TypeError, match="two int64 numbers"):
            _C.pair_of(wrong)  # type: ignore[arg-type]
