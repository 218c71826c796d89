"""Every operation on a CUDA device in what surrounds it there: graphs, streams, reduce-overhead.

The values themselves are compared with float64 by `fusereg verify` and the other tests; here a call
in its surroundings must give the bits of a plain call.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusereg.core.inventory import Operation, as_tuple
from ops import DRAWN, FUNCTIONS, KINDS, named, sample

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
#: A layer's row makes the layer anew with each call, and moves it to the device.
CAPTURED = [operation for operation in FUNCTIONS if not operation.name.startswith("nn.")]
#: The others drop too little of a small tensor for two masks to differ.
OFTEN_DROPPED = [operation for operation in DRAWN if "32 bits" not in operation.name]


def step(operation: Operation, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a call, forward and backward, of tensors that it reads anew each time."""
    call, leaves = operation.as_function(tensors)
    trained = [t.requires_grad_() for t in operation.differentiable(tensors)]

    def run() -> list[Tensor]:
        results = as_tuple(call(*leaves))
        ends = [y for y in results if y.requires_grad]
        if not trained or not ends:
            return [y.detach() for y in results]
        gradients = torch.autograd.grad(ends, trained, [torch.ones_like(y) for y in ends])
        return [y.detach() for y in (*results, *gradients)]

    return run


def assert_same(came: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(came, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def moved(tensors: list[Tensor]) -> list[Tensor]:
    """Return other numbers of the same kind: what is not floating point stays."""
    return [(t.detach() * 0.75 if t.is_floating_point() else t) for t in tensors]


def fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            if 0 not in tensor.stride():  # one number for many elements cannot be written
                tensor.copy_(value)


@named(CAPTURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_replays_the_call_on_new_numbers(operation: Operation, dtype: torch.dtype) -> None:
    tensors = sample(operation, "small", dtype, CUDA)
    run = step(operation, tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    refused = ""
    captured: list[Tensor] = []
    try:
        with torch.cuda.graph(graph):
            captured = run()
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    if refused:  # what cannot be replayed says so in its own words, and leaves the device usable
        assert re.search(r"fusereg\.\S+: .*(graph|captur)", refused), refused
        assert torch.isfinite(torch.ones(4, device=CUDA).sum())
        return
    before = [t.detach().clone() for t in tensors]
    for values in (moved(before), before):
        fill(tensors, values)
        graph.replay()
        came = [y.clone() for y in captured]
        assert_same(came, run())


@named(OFTEN_DROPPED)
def test_a_graph_draws_anew_with_each_replay(operation: Operation) -> None:
    tensors = [t.detach() for t in sample(operation, "small", torch.float32, CUDA)]
    operation(*tensors, seed=None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y, *_) = as_tuple(operation(*tensors, seed=None))
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(y.clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@named(FUNCTIONS)
def test_two_streams_at_once_give_what_one_gives(operation: Operation) -> None:
    first = sample(operation, "large", torch.float32, CUDA)
    runs = [step(operation, tensors) for tensors in (first, moved(first))]
    wanted = [run() for run in runs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    came: list[list[list[Tensor]]] = [[], []]
    for _ in range(8):
        for stream, run, results in zip(streams, runs, came, strict=True):
            with torch.cuda.stream(stream):
                results.append(run())
    torch.cuda.synchronize()
    for results, right in zip(came, wanted, strict=True):
        for result in results:
            assert_same(result, right)


@named(KINDS)
def test_reduce_overhead_gives_the_eager_values(operation: Operation) -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    tensors = sample(operation, "small", torch.float32, CUDA)
    call, leaves = operation.as_function(tensors)
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for scale in (1.0, 0.75, 0.5, 1.25):  # the first calls warm up and record, the others replay
        torch.compiler.cudagraph_mark_step_begin()
        inputs = [
            (t.detach() * scale).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in leaves
        ]
        came = [y.clone() for y in as_tuple(compiled(*inputs))]
        for a, b in zip(came, as_tuple(call(*inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@named(KINDS)
def test_reduce_overhead_trains(operation: Operation) -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    tensors = sample(operation, "small", torch.float32, CUDA)
    trained = [t.requires_grad_() for t in operation.differentiable(tensors)]
    if not trained:
        pytest.skip("it has no gradient")
    call, leaves = operation.as_function(tensors)

    def total(function: Callable[..., object]) -> list[Tensor]:
        ends = [y for y in as_tuple(function(*leaves)) if y.requires_grad]
        loss = torch.stack([y.float().square().sum() for y in ends]).sum()
        return [g.clone() for g in torch.autograd.grad(loss, trained)]

    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    wanted = total(call)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(total(compiled), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
