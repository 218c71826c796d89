"""The stand-in device itself; two devices, contexts and streams; launches that are refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
from fusereg import _C
from fusereg import functional as F
from fusereg.core import memory
from fusereg.core.inventory import Inputs, Operation
from fusereg.core.random import State, _cuda_state
from ops import FUNCTIONS, differentiated, named
from standin_device import device

CUDA, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
ROWS = [operation for operation in FUNCTIONS if not operation.name.startswith("nn.")]


# --- what the device finds ------------------------------------------------------------------------


def test_a_wait_is_found_with_its_line() -> None:
    x = torch.ones(3).to(CUDA)
    for call, what in (
        (lambda: x.sum().item(), "cudaStreamSynchronize"),
        (lambda: x.cpu(), "a copy between host and device"),
        (lambda: torch.ones(3).to(CUDA), "pageable memory"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x[x > 0], "index"),
        (lambda: torch.cuda.synchronize(), "cudaDeviceSynchronize"),
    ):
        with device.waits() as found:
            call()
        assert what in found[0].what
        assert __file__ in found[0].where[0] + "".join(found[0].where[1:5])
    with device.waits() as found:
        x + 1
        torch.empty(3).pin_memory().to(CUDA, non_blocking=True)
    assert found == []


def test_a_wait_in_a_capture_is_an_error() -> None:
    x = torch.ones(3).to(CUDA)
    for call in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.ones(3).to(CUDA)):
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()


def test_a_graph_runs_nothing_until_it_is_replayed() -> None:
    """Operators, kernels of fusereg, fills and copies, between tensors and from pinned memory."""
    x, copied, given = (torch.ones(3).to(CUDA) for _ in range(3))
    pinned = torch.zeros(3).pin_memory()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        y = x * 2
        copied.copy_(y)
        given.copy_(pinned, non_blocking=True)
        dropped = F.dropout(y, 1.0)
    assert [t.tolist() for t in (x, copied, given)] == [[1, 1, 1]] * 3
    graph.replay()
    pinned.fill_(7)
    graph.replay()
    found = [t.tolist() for t in (x, y, copied, given, dropped)]
    assert found == [[3, 3, 3], [6, 6, 6], [6, 6, 6], [7, 7, 7], [0, 0, 0]]


def test_fresh_memory_is_poisoned() -> None:
    """What the allocator has just got is no zeros that a kernel could do with by luck."""
    torch.cuda.empty_cache()
    x = torch.empty(1 << 22, dtype=torch.uint8, device=CUDA)
    assert set(x[:: 1 << 16].tolist()) == {0xA5}


def test_work_of_two_streams_without_an_event_between_is_an_error() -> None:
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with device.order_checked():
        with torch.cuda.stream(first):
            x = torch.ones(3, device=CUDA)
        with torch.cuda.stream(second):
            with pytest.raises(device.OrderError, match="reads memory"):
                x + 1
            second.wait_stream(first)
            x + 1
        with torch.cuda.stream(first):
            with pytest.raises(device.OrderError, match="writes memory"):
                x.zero_()
            torch.cuda.synchronize()
            x.zero_()


# --- two devices ----------------------------------------------------------------------------------


@named(ROWS)
def test_tensors_on_the_device_that_is_not_current(operation: Operation) -> None:
    """A launch on the wrong device, on another's stream or with another's memory is an error."""
    options = {"seed": 5} if operation.takes("seed") else {}

    def call(*given: Tensor) -> object:
        return operation(*given, **options)

    assert torch.cuda.current_device() == 0
    found = differentiated(operation, operation.sample(Inputs(SECOND)), call)
    assert torch.cuda.current_device() == 0
    assert all(t.device == SECOND for t in found)
    wanted = differentiated(operation, operation.sample(Inputs(CUDA)), call)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0.0, atol=0.0, equal_nan=True)


def test_a_capture_on_the_device_that_is_not_current_is_seen() -> None:
    """Masks of two replays differ, and a capture elsewhere changes nothing for other devices."""
    x, other = torch.ones(1000).to(SECOND), torch.ones(1000).to(CUDA)
    with torch.cuda.device(1):
        F.dropout(x, 0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()), torch.cuda.device(0):
            y = F.dropout(x, 0.5)
            before = torch.cuda.default_generators[0].get_offset()
            F.dropout(other, 0.5)
            assert torch.cuda.default_generators[0].get_offset() > before
        graph.replay()
        first = y.clone()
        graph.replay()
    assert not torch.equal(y, first)


def of_two_devices(*places: torch.device) -> list[torch.nn.Parameter]:
    values = torch.linspace(-1, 1, 7).reshape(7, 1)
    params = [torch.nn.Parameter(values.to(places[i % 2], copy=True)) for i in range(4)]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 0.5 + i)
    return params


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB", "Lion"])
def test_a_model_on_two_devices_is_trained_as_on_the_cpu(name: str) -> None:
    results = []
    for places in ((torch.device("cpu"),) * 2, (CUDA, SECOND)):
        params = of_two_devices(*places)
        optimizer = getattr(fusereg.optim, name)(params, lr=0.1, l1=0.01, max_grad_norm=1.0)
        for _ in range(3):
            optimizer.step()
        results.append([t.detach().cpu() for t in (*params, optimizer.grad_norm)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.cuda.current_device() == 0


def test_a_model_on_two_devices_is_penalized_and_clipped_as_on_the_cpu() -> None:
    results = []
    for places in ((torch.device("cpu"),) * 2, (CUDA, SECOND)):
        params = of_two_devices(*places)
        norm = fusereg.optim.clip_grad_norm_(params, 1.0)
        model = torch.nn.ParameterList(params)
        value = fusereg.WeightPenalty(model, l1=0.1, group=0.1).penalty()
        value.backward()
        fusereg.prox.elastic_net_(params, 0.1, 0.1)
        grads = [p.grad for p in params if p.grad is not None]
        results.append([t.detach().cpu() for t in (*params, *grads, norm, value)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


_IN_A_THREAD = """
import ctypes, sys, threading
sys.path[:0] = [{tests!r}]
import conftest, torch
from fusereg import functional as F
x = torch.ones(8, requires_grad=False).to("cuda:1")
runtime = ctypes.CDLL("libcudart.so.13")
found = []
def work():
    F.dropout(x, 0.5, inplace=True, seed=1)  # before any operator of torch
    found.append(torch.cuda.current_device())
    found.append(runtime.standin_has_context(0))
    torch.empty(1, device="cuda")
    found.append(runtime.standin_has_context(0))
thread = threading.Thread(target=work)
thread.start(); thread.join()
print(runtime.standin_has_context(1), *found)
"""


def test_no_context_on_a_device_that_is_not_used() -> None:
    """A rank that works on cuda:N from a thread of its own makes none (500 MB) on cuda:0."""
    tests = str(Path(__file__).parent)
    program = _IN_A_THREAD.format(tests=tests)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0", "0", "1"]


# --- cooperative launches -------------------------------------------------------------------------


@pytest.fixture
def one_multiprocessor() -> Iterator[None]:
    """Have the driver grant fewer multiprocessors than the device says it has, as under MPS."""
    _C._grant_sms(1)  # type: ignore[attr-defined]
    yield
    _C._grant_sms(0)  # type: ignore[attr-defined]


@named([operation for operation in ROWS if "norm" in operation.name])
def test_refused_cooperative_launches_have_a_way_back(
    operation: Operation, one_multiprocessor: None
) -> None:
    for size in ("small", "large"):
        pairs = operation.compare(operation.sample(Inputs(CUDA, size=size)))
        for found, wanted in pairs:
            torch.testing.assert_close(
                found.double().cpu(), wanted.double(), rtol=1e-4, atol=1e-4, equal_nan=True
            )


@pytest.mark.parametrize("layout", [(8, 3, 64 * 64), (4096, 64, 1)], ids=["lines", "columns"])
def test_teams_of_batch_norm_that_are_refused_give_way(
    layout: tuple[int, int, int], one_multiprocessor: None
) -> None:
    """Slabs that take more blocks than one multiprocessor holds, as lines and as rows."""
    outer, channels, inner = layout
    limits = (4, 228 * 1024, 227 * 1024)
    for backward in (False, True):
        plan = _C.batch_norm_plan((outer, channels, inner, outer), "float32", backward, limits)
        assert plan["kind"] == "resident"
        assert plan["reduce"]["splits"] > 1
        assert plan["teams"] * plan["reduce"]["splits"] > 2
    x = torch.randn(outer, channels, inner).requires_grad_()
    ours = x.detach().to(CUDA).requires_grad_()
    results = []
    for leaf, function in ((ours, F.batch_norm), (x, torch.nn.functional.batch_norm)):
        y = function(leaf, None, None, training=True)
        y.sin().sum().backward()
        results.append((y.detach().cpu(), leaf.grad.cpu() if leaf.grad is not None else None))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# --- the generator --------------------------------------------------------------------------------


def test_threads_that_draw_at_once_get_states_of_their_own() -> None:
    x = torch.ones(64).to(CUDA)
    masks: list[Tensor] = []

    def draw() -> None:
        for _ in range(20):
            masks.append(F.dropout(x, 0.5))

    workers = [threading.Thread(target=draw) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({tuple(m.tolist()) for m in masks}) == 80


class Slow:
    """A generator between whose reading and moving on another thread can come."""

    offset = 0

    def initial_seed(self) -> int:
        return 3

    def get_offset(self) -> int:
        found = self.offset
        time.sleep(0.01)
        return found

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_no_thread_comes_between_reading_an_offset_and_moving_it() -> None:
    generator: Any = Slow()
    states: list[State] = []
    workers = [
        threading.Thread(target=lambda: states.append(_cuda_state(CUDA, generator)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(states) == [(3, 0), (3, 4), (3, 8), (3, 12)]


# --- streams --------------------------------------------------------------------------------------


def kept() -> list[Any]:
    return list(memory._kept.values())


@named(ROWS)
def test_two_streams_share_no_memory(operation: Operation) -> None:
    """What is kept for kernels is of one stream: no event orders the two."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    tensors = [operation.sample(Inputs(CUDA)) for _ in streams]
    with device.order_checked(), device.kernels_noted(_C, kept):
        for _ in range(2):
            for stream, own in zip(streams, tensors, strict=True):
                with torch.cuda.stream(stream):
                    differentiated(operation, own)


def test_fusereg_works_on_the_streams_that_it_is_called_on() -> None:
    x = torch.ones(8).to(CUDA)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with device.order_checked(), device.kernels_noted(_C, kept):
        with torch.cuda.stream(first):
            y = F.dropout(x, 0.5)
        with torch.cuda.stream(second), pytest.raises(device.OrderError):
            F.l1_penalty([y], 1.0)


def long_list() -> list[torch.nn.Parameter]:
    """Return parameters whose table lies in memory that is kept."""
    params = [torch.nn.Parameter(torch.ones(3).to(CUDA)) for _ in range(1200)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def test_tables_of_long_lists_are_those_of_a_stream() -> None:
    step = fusereg.optim.AdamW(long_list(), lr=0.1).step
    model = torch.nn.ParameterList(long_list())
    penalty = fusereg.WeightPenalty(model, l1=0.1)
    step()
    penalty.penalty()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    with device.order_checked(), device.kernels_noted(_C, kept):
        for turn in range(4):
            stream, other = streams[turn % 2], streams[1 - turn % 2]
            with torch.cuda.stream(stream):
                penalty.penalty()  # no event orders the two streams
            stream.wait_stream(other)
            with torch.cuda.stream(stream):
                step()
