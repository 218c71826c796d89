"""Each operation in a CUDA graph, and what of the graph's memory it keeps."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
from fusereg import augment
from fusereg import functional as F
from fusereg.core import memory
from fusereg.core.groups import CoupledChannels, Groups, Member
from fusereg.core.inventory import Inputs, Operation
from ops import FUNCTIONS, differentiated, named

CUDA = torch.device("cuda", 0)
#: Rows that make a layer move it to the device, which no graph can do.
CAPTURED = [operation for operation in FUNCTIONS if not operation.name.startswith("nn.")]


def captured(
    call: Callable[[], object], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of the call and its result, after a warm-up as torch advises it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


@named(CAPTURED)
def test_a_replay_computes_what_a_call_does(operation: Operation) -> None:
    """From the values that are in the arguments by then; the graph holds no memory but its own."""
    tensors = operation.sample(Inputs(CUDA))
    options = {"seed": 5} if operation.takes("seed") else {}

    def call(*given: Tensor) -> object:
        return operation(*given, **options)

    fresh = [t.detach().clone() for t in tensors]
    written = operation.select(tensors, operation.written)
    graph, found = captured(lambda: differentiated(operation, tensors, call))
    with torch.no_grad():
        for t, value in zip(tensors, fresh, strict=True):
            t.copy_(value.flip(0) if t.dim() and not any(t is w for w in written) else value)
    again = [t.detach().clone() for t in tensors]
    graph.replay()
    wanted = differentiated(operation, again, call)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def test_masks_of_two_replays_differ() -> None:
    x = torch.ones(1000).to(CUDA)
    graph, y = captured(lambda: F.dropout(x, 0.5))
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)
    assert set(y.tolist()) == {0.0, 2.0}


def test_an_optimizer_step_in_a_graph() -> None:
    results = []
    for in_graph in (False, True):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n).to(CUDA)) for n in (3, 70)]
        optimizer = fusereg.optim.AdamW(params, lr=0.1, l1=0.01, max_grad_norm=1.0)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        if in_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            graph.replay()
        else:
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def many(count: int) -> list[torch.nn.Parameter]:
    """Return more parameters than fit beside a launch: their table lies in memory that is kept."""
    values = torch.linspace(-1, 1, 3).to(CUDA)
    return [torch.nn.Parameter(values.clone()) for _ in range(count)]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
def test_no_other_step_writes_what_the_graph_of_a_long_one_reads(name: str) -> None:
    results = []
    for in_graph in (False, True):
        params = many(400)
        optimizer = getattr(fusereg.optim, name)(params, lr=0.1, l1=0.01)
        own, others = ([torch.full_like(p, value) for p in params] for value in (1.0, 2.0))

        def step(gradients: list[Tensor]) -> None:
            for p, g in zip(params, gradients, strict=True):  # noqa: B023
                p.grad = g
            optimizer.step()  # noqa: B023

        step(own)
        step(own)
        graph = torch.cuda.CUDAGraph()
        if in_graph:
            with torch.cuda.graph(graph):
                step(own)
        step(others)
        if in_graph:
            graph.replay()
        else:
            step(own)
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_no_other_call_writes_what_the_graph_of_a_long_clipping_reads() -> None:
    params, others = many(1200), many(1200)
    ones, threes = torch.ones(3600).to(CUDA), torch.full((3600,), 3.0).to(CUDA)
    for i, (p, other) in enumerate(zip(params, others, strict=True)):
        p.grad, other.grad = (t[3 * i : 3 * i + 3] for t in (ones, threes))
    graph, norm = captured(lambda: fusereg.optim.clip_grad_norm_(params, 1.0))
    fusereg.optim.clip_grad_norm_(others, 1.0)
    ones.fill_(2.0)
    graph.replay()
    assert norm.item() == pytest.approx(2 * 3600**0.5)
    assert ones.tolist() == pytest.approx([1 / 60] * 3600)


# --- memory pools ---------------------------------------------------------------------------------


def _nothing_lives(pool: Any) -> bool:
    """Return whether nothing of a pool is in use; autograd's thread may yet let go of its last."""
    for _ in range(50):
        gc.collect()
        if torch._C._cuda_checkPoolLiveAllocations(0, pool, set()):
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def warming_up() -> Iterator[Callable[[], bool]]:
    """Do with this thread what torch.compile(mode="reduce-overhead") does in its first call.

    What the thread allocates comes from the graphs' pool. Gives a function that returns whether
    nothing of it is in use.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            pass
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch._C._cuda_beginAllocateCurrentThreadToPool(0, pool)
        try:
            yield functools.partial(_nothing_lives, pool)
        finally:
            torch._C._cuda_endAllocateToPool(0, pool)
            torch._C._cuda_releasePool(0, pool)
    torch.cuda.current_stream().wait_stream(stream)


def test_what_is_kept_in_a_pool_is_found() -> None:
    with warming_up() as empty:
        assert empty()
        kept = torch.ones(3, device=CUDA)
        assert not empty()
        del kept
        assert empty()


@named(FUNCTIONS)
def test_nothing_is_kept_in_the_pool_of_a_graph(operation: Operation) -> None:
    tensors = operation.sample(Inputs(CUDA, size="large" if "norm" in operation.name else "small"))
    with warming_up() as empty:
        differentiated(operation, tensors)
        assert empty()


def test_no_optimizer_keeps_tables_in_the_pool_of_a_graph() -> None:
    params = many(1200)
    for p in params:
        p.grad = torch.ones_like(p)
    for optimizer in (
        fusereg.optim.SGD(params, lr=0.1),
        fusereg.optim.AdamW(params, lr=0.1, max_grad_norm=1.0),
    ):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()  # makes the states, which are meant to stay
        with warming_up() as empty:
            fusereg.optim.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer._norm = None  # what grad_norm returns, which is to stay
            assert empty()


# --- tables that graphs read ----------------------------------------------------------------------


def other_sizes() -> None:
    """Resize to more sizes than tables are kept for."""
    x = torch.ones(1, 1, 3, 3).to(CUDA)
    for side in range(3, 3 + memory._MOST_CONSTANTS):
        augment.resize(x, (side, 2))


def test_a_graph_keeps_the_tables_that_it_reads() -> None:
    x = torch.rand(2, 3, 8, 9).to(CUDA)
    graph, y = captured(lambda: augment.resize(x, (5, 4)))
    wanted = augment.resize(x, (5, 4))
    other_sizes()
    torch.cuda.empty_cache()
    taken = [torch.full((4096,), 7.0, device=CUDA) for _ in range(64)]
    graph.replay()
    assert torch.equal(y, wanted)
    del taken


def test_tables_are_bounded() -> None:
    other_sizes()
    assert len(memory._constants) <= memory._MOST_CONSTANTS


def test_a_new_size_in_a_capture_is_refused_in_words() -> None:
    x = torch.rand(1, 1, 31, 3).to(CUDA)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once with these sizes before"), torch.cuda.graph(graph):
        augment.resize(x, (29, 2))


# --- parameters on the CPU ------------------------------------------------------------------------

IMAGES = (4, 3, 5, 5)


def _augment() -> augment.Augment:
    return augment.Augment(size=4, hflip=0.5, mix=augment.Mix(mixup=0.3, num_classes=5))


def on_the_cpu() -> dict[str, Callable[[], object]]:
    x = torch.rand(IMAGES).to(CUDA)
    labels = torch.tensor([0, 1, 4, 2]).to(CUDA)
    params = _augment().sample_params(4, input_size=(5, 5))
    matrix = torch.eye(2, 3)
    points, boxes = torch.rand(4, 2, 2).to(CUDA), torch.rand(4, 2, 4).to(CUDA)
    member = Member("w", torch.rand(6, 2).to(CUDA), 0, torch.arange(6))
    groups = Groups([CoupledChannels("w", 6, (member,), (), None)])
    return {
        "Augment": lambda: _augment()(x),
        "Augment with parameters": lambda: _augment()(x, params=params),
        "warp_affine": lambda: augment.warp_affine(x, matrix),
        "crop_flip_normalize": lambda: augment.crop_flip_normalize(x, 4, top=torch.ones(4).long()),
        "erase": lambda: augment.erase(x, torch.ones(4, 4, dtype=torch.int64)),
        "mix": lambda: augment.mix(x, torch.arange(4), 0.5),
        "mix_labels": lambda: augment.mix_labels(labels, params, 5),
        "AugmentParams.keypoints": lambda: params.keypoints(points),
        "AugmentParams.boxes": lambda: params.boxes(boxes),
        "AugmentParams.mask": lambda: params.mask(x),
        "AugmentParams.warp": lambda: params.warp(x),
        "group_lasso_penalty": lambda: F.group_lasso_penalty(groups, 0.1),
        "prox.group_lasso_": lambda: fusereg.prox.group_lasso_(groups, 0.1),
    }


@pytest.mark.parametrize("name", on_the_cpu())
def test_parameters_on_the_cpu_are_refused_in_a_capture(name: str) -> None:
    call = on_the_cpu()[name]
    call()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph that is captured"), torch.cuda.graph(graph):
        call()


def test_augmentation_with_parameters_on_the_device_can_be_captured() -> None:
    x, labels = torch.rand(IMAGES).to(CUDA), torch.tensor([0, 1, 4, 2]).to(CUDA)
    chain = _augment()
    params = chain.sample_params(4, input_size=(5, 5)).to(CUDA)
    graph, (y, soft) = captured(lambda: chain(x, labels, params=params))
    x.copy_(torch.rand(IMAGES))
    other = chain.sample_params(4, input_size=(5, 5), epoch=9).to(CUDA)
    params.records.copy_(other.records)
    params.keys.copy_(other.keys)
    graph.replay()
    wanted, wanted_soft = chain(x, labels, params=other)
    assert torch.equal(y, wanted)
    assert torch.equal(soft, wanted_soft)


def test_batch_norm_in_place_is_refused_in_a_capture() -> None:
    """Before anything is written: the host would have to wait for the weights."""
    x, weight = torch.rand(IMAGES).to(CUDA), torch.ones(3).to(CUDA)
    before = x.clone()
    with (
        pytest.raises(RuntimeError, match=r"inplace=True .* while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        F.batch_norm(x, None, None, weight.requires_grad_(), training=True, inplace=True)
    assert torch.equal(x, before)
