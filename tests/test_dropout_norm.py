"""Dropout + addition + normalization on every backend, against the steps in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fusereg
import reference_philox
from conftest import TOLERANCES, Backend
from fusereg import functional as F
from fusereg import nn

SEED = 0x1234_5678_9ABC_DEF0
EPS = 1e-5

#: One element, less than a group of 8, odd, whole vectors, more than 2048 (a piece of draws).
LENGTHS = [1, 5, 33, 64, 127, 768]
HALVES = (torch.float16, torch.bfloat16)


def fused(
    rms: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    **options: Any,
) -> Any:
    if rms:
        return F.dropout_add_rms_norm(x, residual, weight, p, EPS, **options)
    return F.dropout_add_layer_norm(x, residual, weight, bias, p, EPS, **options)


def normalized(
    rms: bool, s: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """By the formula, in the dtype that comes: torch's own is not exact enough at a large mean."""
    d = s if rms else s - s.mean(-1, keepdim=True)
    y = d / (d.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def unfused(
    rms: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    mask: Tensor,
    rounded_to: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(y, s) of float64 arguments; what is normalized is s as it is returned."""
    keep = reference_philox.keep_probability(p) if p else 1.0
    s = torch.where(mask.to(x.device).view(x.shape), x / keep if keep else x, 0.0)
    s = s if residual is None else residual + s
    s = s + (s.detach().to(rounded_to).double() - s.detach())
    return normalized(rms, s, weight, None if rms else bias), s


def make(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(backend.device)


def assert_close(came: Tensor | None, wanted: Tensor, tolerance: float) -> None:
    """Relative to the largest magnitude, and to 1 where that is smaller still."""
    assert came is not None
    assert came.shape == wanted.shape
    if wanted.numel():
        error = (came.double() - wanted).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), 1.0)


def row_mask(shape: tuple[int, ...], p: float, index_offset: int = 0) -> Tensor:
    """From plain Python, unless that would take seconds."""
    if math.prod(shape) > 4000:
        return fusereg.dropout_mask(shape, p, SEED, index_offset=index_offset).flatten()
    return reference_philox.mask(math.prod(shape), p, SEED, 0, index_offset)


# --- values and gradients -------------------------------------------------------------------------


def check(
    rms: bool,
    backend: Backend,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    p: float,
    wide_sum: bool = False,
    wide_weight: bool = False,
    has_residual: bool = True,
    has_weight: bool = True,
    has_bias: bool = True,
    index_offset: int = 0,
    return_sum: bool = True,
) -> None:
    wide = torch.float32
    x = make(shape, dtype, backend)
    residual = make(shape, wide if wide_sum else dtype, backend) if has_residual else None
    of_weights = wide if wide_weight else dtype
    weight = make(shape[-1:], of_weights, backend) if has_weight else None
    bias = make(shape[-1:], of_weights, backend) if has_bias and not rms else None
    given = [x, residual, weight, bias]
    leaves = [None if t is None else t.requires_grad_() for t in given]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    result = fused(
        rms,
        *leaves,
        p,
        seed=SEED,
        index_offset=index_offset,
        return_sum=return_sum,  # type: ignore[arg-type]
    )
    sum_dtype = wide if wide_sum else dtype
    mask = row_mask(shape, p, index_offset)
    wanted = unfused(rms, *exact, p, mask, sum_dtype)  # type: ignore[arg-type]
    tolerance = TOLERANCES[dtype]
    results = result if return_sum else (result,)
    assert results[0].dtype is dtype
    if return_sum:
        assert results[1].dtype is sum_dtype
    for came, reference in zip(results, wanted, strict=False):
        assert came.is_contiguous()
        assert_close(came, reference, tolerance)
    gradients = [torch.randn_like(t) for t in results]
    torch.autograd.backward(results, gradients)
    torch.autograd.backward(wanted[: len(results)], [g.double() for g in gradients])
    for leaf, reference_leaf in zip(leaves, exact, strict=True):
        if leaf is not None:
            assert reference_leaf is not None
            assert leaf.grad is not None
            assert leaf.grad.dtype is leaf.dtype
            assert reference_leaf.grad is not None
            # rstd is 300 where a row of one element has no variance.
            scale = 300.0 if shape[-1] == 1 else 3.0
            assert_close(leaf.grad, reference_leaf.grad, scale * tolerance)


@pytest.mark.sanitizer
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_values_and_gradients(rms: bool, dtype: torch.dtype, backend: Backend) -> None:
    for i, length in enumerate(LENGTHS):
        p = (0.3, 0.001, 0.5)[i % 3]
        check(rms, backend, dtype, (3, length) if backend.on_host else (2, 9, length), p)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 1.0, 0.9997])
def test_probabilities_at_the_ends(rms: bool, p: float, backend: Backend) -> None:
    check(rms, backend, torch.float32, (5, 40), p)
    check(rms, backend, torch.float32, (5, 40), p, has_residual=False)
    check(rms, backend, torch.bfloat16, (5, 40), p, wide_sum=True)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_arguments_that_may_be_missing(rms: bool, backend: Backend) -> None:
    for residual, weight, bias in itertools.product((False, True), repeat=3):
        check(
            rms,
            backend,
            torch.float32,
            (4, 24),
            0.3,
            has_residual=residual,
            has_weight=weight,
            has_bias=bias,
            return_sum=bias,
        )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("wide_sum", [False, True])
def test_mixed_precision(
    wide_sum: bool, wide_weight: bool, dtype: torch.dtype, backend: Backend
) -> None:
    for rms, length in ((False, 40), (True, 17)):
        check(rms, backend, dtype, (5, length), 0.3, wide_sum=wide_sum, wide_weight=wide_weight)


def test_long_rows(backend: Backend) -> None:
    """More than a piece of draws; more than CUDA's registers hold; more than the CPU's buffer."""
    for length in (2050, 8200) if backend.on_host else (2050, 8200, 20000, 65541):
        check(False, backend, torch.float32, (2, length), 0.3, index_offset=3)
        check(True, backend, torch.bfloat16, (2, length), 0.3)


def test_many_rows(backend: Backend) -> None:
    """More than one chunk of rows adds to the gradients of weight and bias."""
    rows = 40 if backend.on_host else 3001
    check(False, backend, torch.float32, (rows, 24), 0.3)
    check(True, backend, torch.bfloat16, (rows, 9), 0.3)


@pytest.mark.parametrize("index_offset", [1, 100, 2**32 - 3, 2**40 + 5])
def test_index_offset(index_offset: int, backend: Backend) -> None:
    check(False, backend, torch.float32, (3, 43), 0.4, index_offset=index_offset)
    check(True, backend, torch.float32, (3, 43), 0.001, index_offset=index_offset)


def test_the_mask_is_dropouts(backend: Backend) -> None:
    """What is added is bit for bit what dropout gives."""
    x = make((6, 77), torch.float32, backend)
    zeros = torch.zeros_like(x)
    for p in (0.3, 0.001):
        _, s = F.dropout_add_layer_norm(x, zeros, None, None, p, seed=SEED, return_sum=True)
        assert torch.equal(s, F.dropout(x, p, seed=SEED))
        mask = fusereg.dropout_mask(x.shape, p, SEED, device=backend.device)
        assert torch.equal(s != 0, mask)
    pair = torch.tensor([SEED, 12], device=backend.device)
    _, s = F.dropout_add_rms_norm(x, None, None, 0.3, seed=pair, return_sum=True)
    assert torch.equal(s, F.dropout(x, 0.3, seed=pair))


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_above_the_deviation(ratio: float, backend: Backend) -> None:
    """y is right to float32 of the sum that is returned, however large its mean."""
    for length in (768, 4099):
        x = make((4, length), torch.float32, backend)
        residual = torch.full_like(x, ratio)
        y, s = F.dropout_add_layer_norm(
            x, residual, None, None, 0.1, EPS, seed=SEED, return_sum=True
        )
        assert_close(y, normalized(False, s.double()), TOLERANCES[torch.float32])


def test_rows_without_variance(dtype: torch.dtype, backend: Backend) -> None:
    x = torch.full((3, 50), 1 / 3, dtype=dtype, device=backend.device, requires_grad=True)
    bias = torch.arange(50, dtype=dtype, device=backend.device)
    weight = torch.ones(50, dtype=dtype, device=backend.device, requires_grad=True)
    y = F.dropout_add_layer_norm(x, x.detach() * 3, weight, bias, 0.0)
    assert torch.equal(y, bias.expand_as(y))
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    zeros = torch.zeros_like(x)
    assert not F.dropout_add_rms_norm(zeros, None, None, 0.5).any()


def test_dropped_inf_and_nan_become_zero_and_kept_ones_stay_in_their_row(backend: Backend) -> None:
    mask = row_mask((4, 20), 0.5).view(4, 20)
    clean = make((4, 20), torch.float32, backend)
    for bad in (math.inf, math.nan):
        x = clean.masked_fill(~mask.to(clean.device), bad)
        wanted = F.dropout_add_layer_norm(clean, clean, None, None, 0.5, seed=SEED)
        y = F.dropout_add_layer_norm(x, clean, None, None, 0.5, seed=SEED)
        assert torch.equal(y, wanted)
        x[2, mask[2].nonzero()[0]] = bad
        leaf = x.requires_grad_()
        y = F.dropout_add_layer_norm(leaf, clean, None, None, 0.5, seed=SEED)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], wanted[[0, 1, 3]])
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[[0, 1, 3]].isfinite().all()
        assert not leaf.grad[2][~mask[2].to(x.device)].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "permuted": lambda t: t.permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "negated": lambda t: torch.complex(t, -t).conj().imag if t.dtype is torch.float32 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: Backend) -> None:
    """Indices are in row-major order, wherever the elements lie."""
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = (LAYOUTS[layout](make((3, 4, 16), dtype, backend)) for _ in range(2))
        weight = LAYOUTS["misaligned"](make((16,), dtype, backend))
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
        plain = [t.detach().clone().contiguous().requires_grad_() for t in (x, residual, weight)]
        upstream = LAYOUTS[layout](make((3, 4, 16), dtype, backend))
        for came, wanted in zip(
            torch.autograd.grad(fused(False, *leaves, None, 0.4, seed=SEED), leaves, upstream),
            torch.autograd.grad(
                fused(False, *plain, None, 0.4, seed=SEED), plain, upstream.clone().contiguous()
            ),
            strict=True,
        ):
            assert torch.equal(came, wanted)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_empty(rms: bool, shape: tuple[int, ...], backend: Backend) -> None:
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    weight = torch.ones(shape[-1:], device=backend.device, requires_grad=True)
    y, s = fused(rms, x, x.detach(), weight, None, 0.5, return_sum=True)
    (y.sum() + s.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == y.shape == s.shape == shape
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_threads_and_instruction_sets_do_not_change_a_bit(backend: Backend) -> None:
    """Nor does where a row lies: every row's bits are its own."""
    shape = (70, 100) if backend.on_host else (1000, 333)
    x, residual, weight = (
        make(s, torch.float32, backend).requires_grad_() for s in (shape, shape, shape[-1:])
    )
    upstream = make(shape, torch.float32, backend)
    before, isa = torch.get_num_threads(), fusereg._C.cpu_isa()
    results = []
    for threads, name in itertools.product((1, 3), [backend.isa, "baseline"]):
        torch.set_num_threads(threads)
        if name is not None:
            fusereg._C.set_cpu_isa(name)
        y, s = fused(False, x, residual, weight, None, 0.3, seed=SEED, return_sum=True)
        results.append([y, s, *torch.autograd.grad((y, s), (x, residual, weight), (upstream, s))])
    torch.set_num_threads(before)
    fusereg._C.set_cpu_isa(isa)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    part = slice(10, 12)
    y, s = fused(
        False,
        x[part],
        residual[part],
        weight,
        None,
        0.3,
        seed=SEED,
        index_offset=10 * shape[1],
        return_sum=True,
    )
    assert torch.equal(y, results[0][0][part])
    assert torch.equal(s, results[0][1][part])


def test_evaluation_and_no_grad(backend: Backend) -> None:
    x, residual = make((4, 30), torch.float32, backend), make((4, 30), torch.float32, backend)
    weight = make((30,), torch.float32, backend)
    wanted = fused(False, x.clone().requires_grad_(), residual, weight, weight, 0.0).detach()
    state = torch.get_rng_state()
    for options in ({"p": 0.5, "training": False}, {"p": 0.0}):
        y = F.dropout_add_layer_norm(x, residual, weight, weight, eps=EPS, **options)  # type: ignore[call-overload]
        assert torch.equal(y, wanted)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    y, s = F.dropout_add_rms_norm(x, None, None, 0.0, return_sum=True)
    assert s is x
    y, s = F.dropout_add_rms_norm(x, residual, None, 0.0, return_sum=True)
    assert torch.equal(s, residual + x)


def test_only_the_sum_is_used(backend: Backend) -> None:
    x = make((4, 30), torch.float32, backend).requires_grad_()
    weight = torch.ones(30, device=backend.device, requires_grad=True)
    _, s = F.dropout_add_layer_norm(x, x.detach(), weight, weight, 0.5, seed=SEED, return_sum=True)
    s.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, F.dropout(torch.ones_like(x), 0.5, seed=SEED))


# --- derivatives and memory -----------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("p", "has_residual"), [(0.4, True), (0.4, False), (0.0, False)])
def test_gradcheck(rms: bool, p: float, has_residual: bool) -> None:
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [x, residual, weight, bias]

    def f(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = residual if has_residual else None
        return fused(rms, x, given, weight, bias, p, seed=5, return_sum=has_residual)

    def operator(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = (x, residual if has_residual else None, weight, None if rms else bias)
        pair = torch.tensor([5, 0]) if p else None
        y, s, _ = torch.ops.fusereg.dropout_norm(*given, pair, p, EPS, rms, 0, True)
        return (y, s) if has_residual else y

    names = {"allow_unused": True} if not has_residual or rms else {}
    used = inputs if not names else [t for t in inputs if t is not residual or has_residual]
    for function in (f, operator):

        def of_used(*arguments: Tensor, function: Callable[..., Any] = function) -> Any:
            given = list(arguments)
            if not has_residual:
                given.insert(1, residual.detach())
            return function(*given, *([bias.detach()] if rms else []))

        arguments = tuple(used[:-1] if rms else used)
        assert torch.autograd.gradcheck(of_used, arguments, check_forward_ad=function is f)
        assert torch.autograd.gradgradcheck(of_used, arguments)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_third_derivative(rms: bool) -> None:
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask = row_mask((2, 4), 0.3)

    def derivatives(y: Tensor) -> list[Tensor]:
        found = [(y**3).sum()]
        for _ in range(3):
            found += torch.autograd.grad((found[-1] ** 2).sum(), x, create_graph=True)
        return found

    ours = fused(rms, x, x, None, None, 0.3, seed=SEED)
    theirs, _ = unfused(rms, x, x, None, None, 0.3, mask)
    for came, wanted in zip(derivatives(ours), derivatives(theirs), strict=True):
        torch.testing.assert_close(came, wanted, rtol=1e-9, atol=1e-9)


def kept_bytes(call: Callable[[], object], *alive: Tensor) -> int:
    """Storage that autograd keeps, other than that of tensors that are alive anyway."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result is not None
    for t in alive:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward(dtype: torch.dtype) -> None:
    """The sum and 12 or 4 bytes a row; nothing of the mask, of x or residual."""
    rows, length = 64, 100
    x = torch.randn(rows, length, dtype=dtype, requires_grad=True)
    weight = torch.ones(length, dtype=dtype, requires_grad=True)
    whole = rows * length * dtype.itemsize
    layer = kept_bytes(lambda: F.dropout_add_layer_norm(x, x, weight, None, 0.5), weight)
    assert layer == whole + 12 * rows
    rms = kept_bytes(lambda: F.dropout_add_rms_norm(x, x, weight, 0.5), weight)
    assert rms == whole + 4 * rows
    plain = kept_bytes(lambda: F.dropout_add_layer_norm(x, None, weight, None, 0.0), weight, x)
    assert plain == 12 * rows, "x itself is the sum"
    both = kept_bytes(
        lambda: F.dropout_add_layer_norm(x, x, weight, p=0.5, return_sum=True), weight
    )
    assert both == layer, "the sum is kept once, for the caller and for backward"
    steps = kept_bytes(
        lambda: torch.nn.functional.layer_norm(
            torch.nn.functional.dropout(x, 0.5) + x, (length,), weight
        ),
        weight,
    )
    assert steps > layer


# --- checkpoint, torch.library, compile -----------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_mask_again(reentrant: bool) -> None:
    x = torch.randn(40, 10, requires_grad=True)
    sums: list[Tensor] = []

    def block(t: Tensor) -> Tensor:
        y, s = F.dropout_add_layer_norm(t * 2, t, None, None, 0.5, return_sum=True)
        sums.append(s.detach())
        return y.square()  # keeps y, so there is something to do again

    y = checkpoint(block, x, use_reentrant=reentrant)
    F.dropout(torch.ones(8))
    y.sum().backward()
    assert len(sums) == 2
    assert torch.equal(*sums)


_OPS = torch.ops.fusereg


def arguments_of_the_operator(
    requires_grad: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    shapes = ((3, 4, 6), (3, 4, 6), (6,), (6,))
    return tuple(torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_opcheck_dropout_norm(rms: bool, requires_grad: bool) -> None:
    x, residual, weight, bias = arguments_of_the_operator(requires_grad)
    pair = torch.tensor([1, 0])
    norm = _OPS.dropout_norm.default
    given_bias = None if rms else bias
    torch.library.opcheck(norm, (x, residual, weight, given_bias, pair, 0.3, EPS, rms, 3, True))
    torch.library.opcheck(norm, (x, None, None, None, None, 0.0, EPS, rms, 0, True))
    if not requires_grad:
        torch.library.opcheck(norm, (x, residual, weight, None, pair, 0.3, EPS, rms, 0, False))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("has_grad_sum", [False, True])
def test_opcheck_dropout_norm_backward(has_grad_sum: bool, rms: bool) -> None:
    grad, s, weight, _ = arguments_of_the_operator(True)
    statistics = torch.rand(3, 4, 1 if rms else 3) + 0.5
    if not rms:
        statistics[..., 0] = s.detach().mean(-1)
        statistics[..., 1] = 0.0
    grad_sum = torch.randn_like(s).requires_grad_() if has_grad_sum else None
    constants = (torch.tensor([1, 0]), 0.3, EPS, rms, 3)
    for wanted in ([True, True, True, not rms], [True, False, False, False]):
        torch.library.opcheck(
            _OPS.dropout_norm_backward.default,
            (grad, grad_sum, s, statistics, weight, *constants, wanted),
        )


def test_an_operator_that_kept_nothing_has_no_gradient() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    y, _, _ = _OPS.dropout_norm(x, None, None, None, None, 0.0, EPS, False, 0, False)
    with pytest.raises(RuntimeError, match="keep=False"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_compile_fullgraph_is_eager(kind: str) -> None:
    x, residual, weight, bias = arguments_of_the_operator(True)
    rms = kind == "rms"

    def f(*t: Tensor) -> Any:
        return fused(rms, *t, 0.4, seed=5, index_offset=3, return_sum=True)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    given = (x, residual, weight, bias)
    wanted = [t for t in given if not (rms and t is bias)]
    upstream = (torch.randn_like(x), torch.randn_like(x))
    results = [g(*given) for g in (f, compiled)]
    gradients = [torch.autograd.grad(r, wanted, upstream) for r in results]
    for k in range(2):
        assert torch.equal(results[0][k], results[1][k])
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    layer = nn.DropoutAddLayerNorm(8, 0.5)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(16, 8, requires_grad=True)
    first, second = compiled(x, x), compiled(x, x)
    assert not torch.equal(first, second)
    first.sum().backward()
    layer.eval()
    assert torch.equal(compiled(x, x), layer(x, x))


def test_export_and_fake_tensors() -> None:
    layer = nn.DropoutAddRMSNorm(8, 0.5, return_sum=True)
    x = torch.randn(3, 8)
    program = torch.export.export(layer, (x, x))
    assert "fusereg.dropout_norm" in str(program.graph)
    y, s = program.module()(x, x)
    assert y.shape == s.shape == x.shape
    with FakeTensorMode():
        half = torch.empty(3, 8, dtype=torch.bfloat16)
        wide = torch.empty(3, 8)
        y, s = F.dropout_add_layer_norm(half, wide, return_sum=True)
        assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert F.dropout_add_rms_norm(torch.empty(3, 8, device="meta"), None).is_meta


def test_torch_func() -> None:
    x, _, weight, bias = (t.double() for t in arguments_of_the_operator(False))

    def loss(t: Tensor) -> Tensor:
        y, s = F.dropout_add_layer_norm(t, 2 * t, weight, bias, 0.5, seed=4, return_sum=True)
        return (y**2).sum() + s.sum()

    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(x), wanted, rtol=1e-12, atol=1e-12)
    per_sample = torch.vmap(torch.func.grad(loss))(x)
    assert torch.allclose(per_sample[0], torch.func.grad(loss)(x[0]))
    y = torch.vmap(lambda t: F.dropout_add_rms_norm(t, None, None, 0.5), randomness="different")(
        torch.ones(6, 100)
    )
    assert len({tuple(r.tolist()) for r in y}) == 6


@pytest.mark.parametrize("amp_dtype", HALVES)
def test_autocast_keeps_xs_dtype(amp_dtype: torch.dtype) -> None:
    linear, layer = torch.nn.Linear(6, 8), nn.DropoutAddLayerNorm(8, 0.5)
    residual = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=amp_dtype):
        y = layer(linear(torch.randn(4, 6)), residual)
        assert isinstance(y, Tensor)
        assert y.dtype is amp_dtype
        assert layer(residual, residual).dtype is torch.float32
    y.float().square().sum().backward()
    for parameter in (linear.weight, layer.weight, layer.bias):
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.any()


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_are_torchs_norms_with_their_state(name: str) -> None:
    ours, theirs = getattr(nn, f"DropoutAdd{name}"), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    for shape in (12, (3, 4)):
        layer, plain = ours(shape, 0.5, eps=EPS), theirs(shape, eps=EPS)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.normal_()
        layer.load_state_dict(plain.state_dict())
        theirs(shape).load_state_dict(layer.state_dict())
        x, residual = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
        if shape == 12:
            x, residual = x.flatten(1), residual.flatten(1)
        wanted = plain(residual + x)
        torch.testing.assert_close(layer.eval()(x, residual), wanted)
        torch.testing.assert_close(copy.deepcopy(layer)(residual + x), wanted)
        torch.manual_seed(3)
        y = layer.train()(x, residual)
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.5)
        torch.testing.assert_close(y, plain(residual + dropped))
        y, s = ours(shape, 0.5, return_sum=True)(x, residual)
        assert s.shape == y.shape == x.shape
    assert "p=0.5" in repr(layer)
    assert repr(layer).startswith(f"DropoutAdd{name}((3, 4), eps=1e-05, elementwise_affine=True")
    without = ours(12, 0.1, elementwise_affine=False)
    assert not list(without.parameters())
    assert without(torch.randn(2, 12)).shape == (2, 12)
    with pytest.raises(ValueError, match=r"p must be within"):
        ours(12, 1.5)
    with pytest.raises(ValueError, match=r"input must have shape|x must have shape"):
        layer(torch.randn(2, 5))


def test_layer_norm_without_bias_and_rms_default_eps() -> None:
    layer = nn.DropoutAddLayerNorm(6, 0.0, bias=False)
    assert set(layer.state_dict()) == {"weight"}
    x = torch.randn(3, 6) * 1e-4
    torch.testing.assert_close(
        nn.DropoutAddRMSNorm(6, 0.0)(x), torch.nn.functional.rms_norm(x, (6,))
    )


# --- errors ---------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_change_nothing() -> None:
    x, weight = torch.randn(3, 6), torch.ones(6)
    state = torch.get_rng_state()
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "p must be within", lambda: F.dropout_add_layer_norm(x, x, p=1.5)),
        (TypeError, "p must be a number", lambda: F.dropout_add_layer_norm(x, x, p="a")),  # type: ignore[call-overload]
        (ValueError, "eps must not be neg", lambda: F.dropout_add_rms_norm(x, x, eps=-1.0)),
        (TypeError, "eps must be a number", lambda: F.dropout_add_layer_norm(x, x, eps="a")),  # type: ignore[call-overload]
        (ValueError, "x has dtype", lambda: F.dropout_add_rms_norm(x.long(), None)),
        (TypeError, "x must be a torch.Tensor", lambda: F.dropout_add_layer_norm([1.0], None)),  # type: ignore[call-overload]
        (TypeError, "x must be a torch.Tensor", lambda: F.dropout_add_rms_norm([1.0], None)),  # type: ignore[call-overload]
        (ValueError, "at least 1 dimension", lambda: F.dropout_add_layer_norm(x[0, 0], None)),
        (
            ValueError,
            r"residual must have shape \(3, 6\), got \(6,\)",
            lambda: F.dropout_add_layer_norm(x, weight),
        ),
        (
            ValueError,
            r"weight must have shape \(6,\), got \(3,\)",
            lambda: F.dropout_add_rms_norm(x, None, torch.ones(3)),
        ),
        (
            ValueError,
            r"residual must have x's dtype torch.float32, got torch.bfloat16",
            lambda: F.dropout_add_layer_norm(x, x.bfloat16()),
        ),
        (
            ValueError,
            r"x's dtype torch.bfloat16 or torch.float32, got torch.float64",
            lambda: F.dropout_add_layer_norm(x.bfloat16(), None, weight.double()),
        ),
        (
            ValueError,
            r"bias must have weight's dtype",
            lambda: F.dropout_add_layer_norm(x.bfloat16(), None, weight, weight.bfloat16()),
        ),
        (
            ValueError,
            "index_offset must be",
            lambda: F.dropout_add_layer_norm(x, x, index_offset=-1),
        ),
        (TypeError, "seed must be", lambda: F.dropout_add_layer_norm(x, x, seed="a")),  # type: ignore[call-overload]
    ]
    for error, text, call in wrong:
        with pytest.raises(error, match=text) as caught:
            call()
        assert str(caught.value).startswith("fusereg.dropout_add_")
    assert torch.equal(torch.get_rng_state(), state)
