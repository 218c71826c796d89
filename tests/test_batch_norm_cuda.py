"""What only the CUDA kernels of batch normalization have: two kinds of them, teams, semaphores.

The values are also tested in test_batch_norm.py, with the kernels that the plan chooses; here each
kind is forced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from conftest import Backend
from fusereg import _C
from fusereg import functional as F
from fusereg.batch_norm import kernels
from fusereg.batch_norm.kernels import Call, Constants, Inputs
from fusereg.core import memory
from test_batch_norm import assert_near, exact, make, ours

#: (shape, channels_last): lines of whole octets; lines that begin anywhere; lines shorter than a
#: vector, 8 and 2 channels together; columns, of one slab and several, the last one narrower.
WIDE = [
    ((3, 3, 16, 24), False),
    ((2, 3, 37, 37), False),
    ((9, 24, 7, 7), False),
    ((5, 6, 14, 14), False),
    ((3, 72, 5, 5), True),
    ((70, 16), False),
]
#: Element by element.
NARROW = [((4, 5, 3, 3), True), ((300, 3), False), ((5, 3, 7, 7), False)]


@pytest.fixture
def cuda(backend: Backend) -> Backend:
    if backend.isa is not None:
        pytest.skip("CUDA kernels only")
    return backend


@contextlib.contextmanager
def forced(kind: str, splits: int = 0, counters: int = 0) -> Iterator[None]:
    _C.batch_norm_force(kind, splits, counters)
    try:
        yield
    finally:
        _C.batch_norm_force("")


KINDS = [("streaming", 0), ("resident", 0), ("resident", 1), ("resident", 3)]


def assert_semaphores_are_zero(device: torch.device) -> None:
    _, semaphores = memory.scratch(device, 0)
    assert semaphores is not None
    assert int(semaphores.count_nonzero()) == 0


@pytest.mark.sanitizer
@pytest.mark.parametrize(("kind", "splits"), KINDS)
@pytest.mark.parametrize(("shape", "channels_last"), WIDE, ids=str)
def test_each_kind_of_kernel(
    shape: tuple[int, ...], channels_last: bool, kind: str, splits: int, cuda: Backend
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for activation, residual in ((None, False), ("relu", False), ("leaky_relu", True)):
            lines = len(shape) > 2 and not channels_last
            whole = not lines or shape[2] * shape[3] % 8 == 0
            if kind == "resident" and residual and not whole:
                continue  # bits want the lines' own octets
            case = make(shape, dtype, cuda, channels_last, residual)
            with forced(kind, splits):
                found = ours(case, True, activation)
            assert_near(found, exact(case, True, activation), dtype)
    assert_semaphores_are_zero(cuda.device)


@pytest.mark.parametrize(("shape", "channels_last"), NARROW, ids=str)
def test_element_by_element(shape: tuple[int, ...], channels_last: bool, cuda: Backend) -> None:
    case = make(shape, torch.float16, cuda, channels_last, True)
    assert_near(ours(case, True, "relu"), exact(case, True, "relu"), torch.float16)
    with (
        forced("resident"),
        pytest.raises(RuntimeError, match="does not fit the device's shared memory"),
    ):
        ours(case, True, "relu")


@pytest.mark.sanitizer
@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_and_running_statistics(channels_last: bool, cuda: Backend) -> None:
    # The groups' moments, the running statistics of all of them together, and the batch counted.
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    x = (2 * torch.randn(7, 16, 4, 8) + 3).to(cuda.device).contiguous(memory_format=format_)
    exact_x = x.double().cpu()
    groups = [exact_x[i : i + 2] for i in range(0, 7, 2)]
    for kind, splits in KINDS:
        running_mean = torch.zeros(16, device=cuda.device)
        running_var = torch.ones(16, device=cuda.device)
        batches = torch.tensor(3, device=cuda.device)
        call = Call(
            Inputs(x, running_mean=running_mean, running_var=running_var),
            Constants(group_samples=2),
            batches=batches,
            momentum=kernels.CUMULATIVE,
        )
        with forced(kind, splits):
            y = kernels.forward(call)
        assert call.moments is not None
        mean, var, count = call.moments.cpu().view(3, 4, 16)
        for i, g in enumerate(groups):
            torch.testing.assert_close(mean[i], g.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                var[i], g.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=0.0
            )
            assert count[i].tolist() == [g.numel() / 16] * 16
            wanted = torch.nn.functional.batch_norm(g, None, None, training=True)
            torch.testing.assert_close(
                y[2 * i : 2 * i + 2].double().cpu(), wanted, rtol=0.0, atol=2e-6
            )
        assert int(batches) == 4
        torch.testing.assert_close(
            running_mean.double().cpu(), exact_x.mean((0, 2, 3)) / 4, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            running_var.double().cpu(), 0.75 + exact_x.var((0, 2, 3)) / 4, rtol=1e-6, atol=0.0
        )
    assert_semaphores_are_zero(cuda.device)


@pytest.mark.parametrize(("shape", "channels_last"), WIDE[:1] + WIDE[2:3] + WIDE[4:5], ids=str)
def test_kinds_agree_on_dropout_and_heavy_activations(
    shape: tuple[int, ...], channels_last: bool, cuda: Backend
) -> None:
    for activation, dtype in (("silu", torch.float32), ("gelu", torch.float16)):
        case = make(shape, dtype, cuda, channels_last, True)
        results = []
        for kind, splits in KINDS:
            with forced(kind, splits):
                results.append(ours(case, True, activation, dropout=0.4, seed=11))
        first = results[0]
        assert 0.3 < float((first["y"] == 0).float().mean()) < 0.5
        for other in results[1:]:
            assert torch.equal(other["y"] == 0, first["y"] == 0)
            assert_near(other, {k: t.double().cpu() for k, t in first.items()}, dtype)


@pytest.mark.parametrize("kind", ["streaming", "resident"])
def test_large_means_and_large_numbers(kind: str, cuda: Backend) -> None:
    for shape, channels_last in (((4, 8, 16, 24), False), ((4, 8, 16, 24), True)):
        format_ = torch.channels_last if channels_last else torch.contiguous_format
        noise = torch.randn(shape).contiguous(memory_format=format_).to(cuda.device)
        for offset, scale in ((1e5, 1.0), (0.0, 1e25)):
            x = noise * scale + offset
            with forced(kind):
                y = F.batch_norm(x, None, None, training=True, eps=1e-5)
            wanted = torch.nn.functional.batch_norm(
                x.double().cpu(), None, None, training=True, eps=1e-5
            )
            error = float((y.double().cpu() - wanted).abs().max() / wanted.abs().max())
            assert error < 1e-6, (offset, scale, error)


@pytest.mark.parametrize("kind", ["streaming", "resident"])
def test_nan_stays_in_its_channel(kind: str, cuda: Backend) -> None:
    for shape, channels_last in WIDE:
        x = make(shape, torch.float32, cuda, channels_last).x
        clean = x.clone(memory_format=torch.preserve_format)
        x[-1, 1] = float("nan")
        with forced(kind):
            y = F.batch_norm(x, None, None, training=True)
            wanted = F.batch_norm(clean, None, None, training=True)
        others = [c for c in range(shape[1]) if c != 1]
        assert bool(y[:, 1].isnan().all())
        assert torch.equal(y[:, others], wanted[:, others])


@pytest.mark.sanitizer
def test_masked_rows_and_elements(cuda: Backend) -> None:
    # What is masked may be anything: NaN must not reach the statistics. The first elements too.
    for shape, channels_last in (((5, 8, 24), False), ((5, 8, 13), False), ((6, 72), False)):
        x = torch.randn(shape)
        mask = torch.rand(shape[0], *shape[2:]) < 0.6
        mask.view(-1)[:2] = False
        dead = (~mask).unsqueeze(1).expand(shape)
        x[dead] = float("nan")
        gradient = torch.randn(shape)
        del channels_last
        ours_x = x.to(cuda.device).requires_grad_()
        y = F.batch_norm(ours_x, None, None, training=True, mask=mask.to(cuda.device))
        (grad_x,) = torch.autograd.grad(y, ours_x, gradient.to(cuda.device))
        for c in range(shape[1]):
            live = x[:, c][mask].double().requires_grad_()
            wanted = (live - live.mean()) / (live.var(unbiased=False) + 1e-5).sqrt()
            (wanted_grad,) = torch.autograd.grad(wanted, live, gradient[:, c][mask].double())
            for got, want in ((y, wanted), (grad_x, wanted_grad)):
                kept = got[:, c].detach().cpu()[mask].double()
                torch.testing.assert_close(kept, want.detach(), rtol=1e-5, atol=2e-6)
        assert not bool(y.detach().cpu()[dead].any())
        assert not bool(grad_x.cpu()[dead].any())


def test_a_team_that_could_not_be_resident_is_refused(cuda: Backend) -> None:
    case = make((4, 3, 16, 24), torch.float32, cuda)
    before = case.mean.clone()
    with (
        forced("resident", 100_000),
        pytest.raises(RuntimeError, match="does not fit the device's shared memory"),
    ):
        F.batch_norm(case.x, case.mean, case.var, training=True)
    assert torch.equal(case.mean, before)
    double = case.x.double()
    with forced("resident"), pytest.raises(RuntimeError, match="or is none that it can do"):
        F.batch_norm(double, None, None, training=True)
    assert_semaphores_are_zero(cuda.device)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("kind", "splits"), KINDS)
def test_scratch_is_as_large_as_asked_for(kind: str, splits: int, cuda: Backend) -> None:
    # Memory of exactly that size: on the host, what lies behind it is a red zone.
    constants = (*Constants(activation=1)[:6], 0, 0, 0, "batch_norm")
    zeros = torch.zeros(_C.BATCH_NORM_SEMAPHORE_BYTES, dtype=torch.uint8, device=cuda.device)
    for shape, channels_last in WIDE[:3] + WIDE[4:5]:
        x = make(shape, torch.float32, cuda, channels_last).x
        y, grad_x = torch.empty_like(x), torch.empty_like(x)
        moments = torch.empty((3, shape[1]), dtype=torch.float64, device=cuda.device)
        sums = torch.empty((2, shape[1]), dtype=torch.float64, device=cuda.device)

        nothing = [None] * 2
        first = (y, moments, None, x, *nothing, *nothing, *nothing, None)
        second = (grad_x, None, *nothing, sums, x, x, None, *nothing, moments, *nothing, *nothing)
        runs = (
            lambda memory, a=first: _C.batch_norm_forward(*a, memory, zeros, 0.1, *constants),
            lambda memory, a=second: _C.batch_norm_backward(
                *a, memory, zeros, True, False, *constants
            ),
        )
        with forced(kind, splits):
            for run in runs:
                status = run(None)
                assert status < 0
                assert run(torch.empty(-status, dtype=torch.uint8, device=cuda.device)) == 0
        assert int(zeros.count_nonzero()) == 0
        wanted = torch.nn.functional.batch_norm(x.double(), None, None, training=True).relu()
        torch.testing.assert_close(y.double(), wanted, rtol=0.0, atol=4e-6)


@pytest.mark.sanitizer
def test_more_slabs_than_counters(cuda: Backend) -> None:
    # Slabs then share counters, three and three and one.
    for kind, splits in KINDS:
        case = make((3, 7, 8, 16), torch.float32, cuda)
        batches = torch.tensor(0, device=cuda.device)
        with forced(kind, splits, counters=3):
            found = ours(case, True, None, num_batches_tracked=batches)
        assert_near(found, exact(case, True, None), torch.float32)
        assert int(batches) == 1
        assert_semaphores_are_zero(cuda.device)


@pytest.mark.parametrize("kind", ["streaming", "resident"])
def test_in_place(kind: str, cuda: Backend) -> None:
    # y may be x or the residual.
    for shape, channels_last in (WIDE[0], WIDE[1], WIDE[4]):
        case = make(shape, torch.float32, cuda, channels_last, True)
        x, residual = case.x, case.residual
        assert residual is not None
        with forced(kind), torch.no_grad():
            wanted = F.batch_norm(x, None, None, training=True, residual=residual)
            for target in (x, residual):
                copies = {
                    id(t): t.clone(memory_format=torch.preserve_format) for t in (x, residual)
                }
                out = copies[id(target)]
                F.batch_norm(
                    copies[id(x)], None, None, training=True, residual=copies[id(residual)], out=out
                )
                assert torch.equal(out, wanted)
