"""Values, gradients and proximal steps of the penalties, on every backend, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusereg
import reference
from conftest import DTYPES, TOLERANCES, Backend, make
from fusereg import functional as F

# Empty anywhere (also last), one element, odd, more than one chunk, four dimensions.
SHAPES = [
    (0,),
    (),
    (1,),
    (3,),
    (31,),
    (5, 7),
    (0, 4),
    (33, 65),
    (2, 3, 5, 7),
    (1000,),
    (16385,),
    (4, 0),
]


def make_list(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    return [make(s, dtype, backend) for s in SHAPES]


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    factor: float = 1.0,
    scale: float | None = None,
) -> None:
    """Compare relative to the largest expected magnitude, or to ``scale`` if terms cancel."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])
    if finite.any():
        error = (actual[finite] - expected[finite]).abs().max()
        scale = expected[finite].abs().max().item() if scale is None else scale
        assert error <= factor * TOLERANCES[dtype] * scale, f"error {error:g} at scale {scale:g}"


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


PENALTIES: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "l1": (lambda p: F.l1_penalty(p, 0.3), {"l1": 0.3}),
    "l2": (lambda p: F.l2_penalty(p, 0.7), {"l2": 1.4}),
    "l2_half": (lambda p: F.l2_penalty(p, 0.7, half=True), {"l2": 0.7}),
    "elastic_net": (lambda p: F.elastic_net_penalty(p, 0.3, 0.7), {"l1": 0.3, "l2": 0.7}),
    "group": (lambda p: F.group_lasso_penalty(p, 0.5), {"group": 0.5}),
}


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", PENALTIES)
def test_value_and_gradient(name: str, dtype: torch.dtype, backend: Backend) -> None:
    penalty, strengths = PENALTIES[name]
    params = [p.requires_grad_() for p in make_list(dtype, backend)]
    value = penalty(params)
    assert value.shape == ()
    assert value.dtype is value_dtype(dtype)
    assert value.device.type == backend.device.type
    assert_close(value, reference.total(params, **strengths), value.dtype)
    (3 * value).backward()
    for p in params:
        assert p.grad is not None
        assert_close(p.grad, 3 * reference.gradient(p, **strengths), dtype)


def test_tensor_list_and_module_agree(backend: Backend) -> None:
    layer = torch.nn.Linear(7, 5).to(backend.device)
    values = [
        F.l1_penalty(layer, 0.5),
        F.l1_penalty(layer.parameters(), 0.5),
        F.l1_penalty(tuple(layer.parameters()), 0.5),
        F.l1_penalty(layer.weight, 0.5) + F.l1_penalty(layer.bias, 0.5),
    ]
    for value in values[:3]:
        assert torch.equal(value, values[0])
    assert_close(values[3], values[0], torch.float32)


def test_strength_per_tensor(backend: Backend) -> None:
    params = [make((9,), torch.float32, backend), make((4, 4), torch.float32, backend)]
    params = [p.requires_grad_() for p in params]
    value = F.elastic_net_penalty(params, [0.1, 0.0], torch.tensor([0.0, 0.2]))
    wanted = reference.penalty(params[0], l1=0.1) + reference.penalty(params[1], l2=0.2)
    assert_close(value, wanted, torch.float32)
    value.backward()
    assert params[0].grad is not None
    assert params[1].grad is not None
    assert_close(params[0].grad, reference.gradient(params[0], l1=0.1), torch.float32)
    assert_close(params[1].grad, reference.gradient(params[1], l2=0.2), torch.float32)


def test_no_tensors_give_zero(backend: Backend) -> None:
    assert F.l1_penalty([], 1.0).item() == 0.0
    assert fusereg.add_penalty_grad_([], l1=1.0).item() == 0.0
    fusereg.prox.l1_([], 1.0)
    empty = torch.zeros(0, 3, device=backend.device, requires_grad=True)
    value = F.group_lasso_penalty(empty, 1.0)
    assert value.item() == 0.0
    value.backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


def test_an_empty_last_tensor_drops_nothing(backend: Backend) -> None:
    w = make((100,), torch.float32, backend)
    empty = torch.zeros(0, device=backend.device)
    assert torch.equal(F.l1_penalty([w, empty], 1.0), F.l1_penalty(w, 1.0))
    assert torch.equal(F.l1_penalty([empty, w], 1.0), F.l1_penalty(w, 1.0))


# --- groups ---------------------------------------------------------------------------------------

# Every way in which groups lie in memory: rows, short rows, columns, columns of runs shorter and
# longer than a vector, many rows, more columns than a tile, one group, one element a group.
GROUP_CASES = [
    ((6, 40), 0),
    ((300, 3), 0),
    ((3, 3000), 0),
    ((40, 6), 1),
    ((200, 700), 1),
    ((9, 5, 7), 1),
    ((9, 5, 100), 1),
    ((4, 3, 5, 5), 0),
    ((4, 3, 5, 5), 1),
    ((4, 3, 5, 5), -1),
    ((1, 50), 0),
    ((50, 1), 1),
    ((50,), 0),
    ((5, 1), 0),
]


@pytest.mark.sanitizer
@pytest.mark.parametrize(("shape", "dim"), GROUP_CASES, ids=str)
def test_group_lasso_over_shapes(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, backend: Backend
) -> None:
    w = make(shape, dtype, backend)
    w.select(dim, shape[dim] // 2).zero_()
    w.requires_grad_()
    value = F.group_lasso_penalty(w, 0.5, dim)
    assert_close(value, reference.penalty(w, group=0.5, dim=dim), value.dtype)
    value.backward()
    assert w.grad is not None
    assert_close(w.grad, reference.gradient(w, group=0.5, dim=dim), dtype)
    stepped = w.detach().clone()
    fusereg.prox.group_lasso_(stepped, 0.4, dim)
    assert_close(stepped, reference.prox(w, group=0.4, dim=dim), dtype)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_group_lasso_in_channels_last(dim: int, backend: Backend) -> None:
    w = make((6, 5, 4, 3), torch.float32, backend).contiguous(memory_format=torch.channels_last)
    w.requires_grad_()
    value = F.group_lasso_penalty(w, 0.5, dim)
    assert_close(value, reference.penalty(w, group=0.5, dim=dim), torch.float32)
    value.backward()
    assert w.grad is not None
    assert w.grad.stride() == w.stride()
    assert_close(w.grad, reference.gradient(w, group=0.5, dim=dim), torch.float32)


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 150_000), 0), ((150_000, 2), 1), ((1, 150_000), 0)]
)
def test_groups_larger_than_a_task(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, backend: Backend
) -> None:
    w = make(shape, dtype, backend).requires_grad_()
    value = fusereg.add_penalty_grad_(w, l1=0.1, l2=0.2, group=0.3 if dim == 0 else 0.0)
    strengths = {"l1": 0.1, "l2": 0.2, "group": 0.3 if dim == 0 else 0.0}
    assert_close(value, reference.penalty(w, **strengths), value.dtype)
    assert w.grad is not None
    assert_close(w.grad, reference.gradient(w, **strengths), dtype)
    stepped = w.detach().clone()
    fusereg.prox.group_lasso_(stepped, 0.5, dim)
    assert_close(stepped, reference.prox(w, group=0.5, dim=dim), dtype)


#: Groups along a dimension by the way in which a GPU's threads share them: columns in vectors of
#: 16 bytes, one by one, several to a group; rows for a warp, for a block, for a block's warps.
GROUP_LAYOUTS = [
    ((9, 24), 1), ((150, 24), 1), ((3, 4224), 1), ((70, 23), 1), ((70, 4, 6), 1),
    ((3, 5, 40), 1), ((2, 2104), 0), ((3, 2101), 0), ((60, 2, 49), 1),
]  # fmt: skip


@pytest.mark.sanitizer
@pytest.mark.parametrize(("shape", "dim"), GROUP_LAYOUTS, ids=str)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (0, 1)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e20])
def test_groups_in_every_layout(
    shape: tuple[int, ...], dim: int, offsets: tuple[int, int], size: float, dtype: torch.dtype,
    backend: Backend,
) -> None:  # fmt: skip
    if size != 1.0 and dtype is torch.float16:
        pytest.skip("float16 has no such numbers")

    def placed(t: Tensor, offset: int) -> Tensor:
        whole = torch.cat([t.new_zeros(offset), t.flatten()])
        return whole[offset:].view(shape).movedim(dim, 0)

    w = placed(make(shape, torch.float64, backend).mul(size).to(dtype), offsets[0])
    w[len(w) // 2] = 0.0
    w.requires_grad_()
    before = make(shape, dtype, backend)
    w.grad = placed(before, offsets[1])
    strengths = {"l1": 0.1, "group": 0.3}
    value = fusereg.add_penalty_grad_(w, **strengths)
    assert_close(value, reference.penalty(w, **strengths), value.dtype)
    wanted = before.movedim(dim, 0).double() + reference.gradient(w, **strengths)
    assert_close(w.grad, wanted, dtype)
    stepped = w.detach()
    wanted = reference.prox(w, group=0.2 * size)
    fusereg.prox.group_lasso_(stepped, 0.2 * size)
    assert_close(stepped, wanted, dtype)


def test_a_list_longer_than_a_small_table(backend: Backend) -> None:
    params = [make((3, 5), torch.float32, backend).requires_grad_() for _ in range(40)]
    for strengths in ({"l1": 0.3}, {"group": 0.3}):
        for count in (1, 16, 17, 40):
            value = fusereg.add_penalty_grad_(params[:count], **strengths)
            assert_close(value, reference.total(params[:count], **strengths), torch.float32)
        for p in params:
            assert p.grad is not None
            p.grad.zero_()


def test_group_of_tiny_weights_is_not_a_zero_group(backend: Backend) -> None:
    for shape, dim in (((4, 8), 0), ((8, 4), 1)):
        w = (make(shape, torch.float32, backend) * 1e-25).requires_grad_()
        F.group_lasso_penalty(w, 1.0, dim).backward()
        assert w.grad is not None
        assert_close(w.grad, reference.gradient(w, group=1.0, dim=dim), torch.float32)


def test_group_lasso_of_a_vector_is_l1(backend: Backend) -> None:
    w = make((1000,), torch.float32, backend)
    assert torch.equal(F.group_lasso_penalty(w, 0.3), F.l1_penalty(w, 0.3))


# --- add_penalty_grad_ ----------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "strengths",
    [
        {"l1": 0.3},
        {"l2": 0.7},
        {"l1": 0.3, "l2": 0.7},
        {"group": 0.2},
        {"l1": 0.3, "l2": 0.7, "group": 0.2},
        {"l1": 0.0},
    ],
    ids=str,
)
def test_add_penalty_grad(
    strengths: dict[str, float], dtype: torch.dtype, backend: Backend
) -> None:
    params = [p.requires_grad_() for p in make_list(dtype, backend)]
    before = []
    for p in params:
        p.grad = torch.randn_like(p)
        before.append(p.grad.clone())
    value = fusereg.add_penalty_grad_(params, **strengths)
    assert not value.requires_grad
    assert value.dtype is value_dtype(dtype)
    assert_close(value, reference.total(params, **strengths), value.dtype)
    for p, g in zip(params, before, strict=True):
        assert p.grad is not None
        added = reference.gradient(p, **strengths)
        largest = max((x.abs().max().item() for x in (g, added) if x.numel()), default=0.0)
        assert_close(p.grad, g.double() + added, dtype, scale=largest)


def test_add_penalty_grad_equals_backward(backend: Backend) -> None:
    params = [p.requires_grad_() for p in make_list(torch.float32, backend)]
    for p in params:
        p.grad = torch.randn_like(p)
    grads = [p.grad.clone() for p in params if p.grad is not None]
    F.elastic_net_penalty(params, 0.3, 0.7).backward()
    through_autograd = [p.grad.clone() for p in params if p.grad is not None]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    fusereg.add_penalty_grad_(params, l1=0.3, l2=0.7)
    for p, wanted in zip(params, through_autograd, strict=True):
        assert p.grad is not None
        assert_close(p.grad, wanted, torch.float32)


def test_missing_grads_are_created_and_frozen_tensors_left_alone(backend: Backend) -> None:
    trained = make((5, 7), torch.float32, backend).requires_grad_()
    frozen = make((3,), torch.float32, backend)
    value = fusereg.add_penalty_grad_([trained, frozen], l1=0.5)
    assert trained.grad is not None
    assert frozen.grad is None
    assert_close(trained.grad, reference.gradient(trained, l1=0.5), torch.float32)
    assert_close(value, reference.total([trained, frozen], l1=0.5), torch.float32)
    frozen.requires_grad_()
    frozen.grad = torch.ones_like(frozen)
    frozen.requires_grad_(False)
    fusereg.add_penalty_grad_([trained, frozen], l1=0.5)
    assert torch.equal(frozen.grad, torch.ones_like(frozen))


@pytest.mark.parametrize("on_device", [False, True])
def test_grad_scale_multiplies_the_gradient_only(on_device: bool, backend: Backend) -> None:
    w = make((100,), torch.float32, backend).requires_grad_()
    scale = torch.tensor(64.0, device=backend.device) if on_device else 64.0
    value = fusereg.add_penalty_grad_(w, l1=0.5, l2=0.25, grad_scale=scale)
    assert_close(value, reference.penalty(w, l1=0.5, l2=0.25), torch.float32)
    assert w.grad is not None
    assert_close(w.grad, 64 * reference.gradient(w, l1=0.5, l2=0.25), torch.float32)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_another_layout_or_dtype(grad_dtype: torch.dtype, backend: Backend) -> None:
    w = make((6, 8), torch.float32, backend).requires_grad_()
    base = torch.randn(8, 6, device=backend.device).to(grad_dtype)
    if grad_dtype is not torch.float32:
        w.grad_dtype = grad_dtype
    w.grad = base.t()
    wanted = base.t().double() + reference.gradient(w, l1=0.5, l2=0.25)
    fusereg.add_penalty_grad_(w, l1=0.5, l2=0.25)
    assert w.grad.stride() == (1, 6)
    assert_close(w.grad, wanted, grad_dtype)


# --- proximal steps -------------------------------------------------------------------------------


@pytest.mark.sanitizer
def test_prox(dtype: torch.dtype, backend: Backend) -> None:
    for step, strengths in (
        (lambda p: fusereg.prox.l1_(p, 0.5), {"l1": 0.5}),
        (lambda p: fusereg.prox.elastic_net_(p, 0.5, 0.25), {"l1": 0.5, "l2": 0.25}),
        (lambda p: fusereg.prox.group_lasso_(p, 0.6), {"group": 0.6}),
    ):
        params = make_list(dtype, backend)
        wanted = [reference.prox(p, **strengths) for p in params]
        assert step(params) is None
        for p, w in zip(params, wanted, strict=True):
            assert_close(p, w, dtype)
            zeros = p[p == 0]
            assert not torch.signbit(zeros).any(), "a zero must be +0.0"
        assert fusereg.sparsity(params) > 0.1


def test_prox_zeros_what_lies_on_the_threshold(dtype: torch.dtype, backend: Backend) -> None:
    w = torch.tensor([-0.5, 0.5, -0.0, 0.0, 0.75, -0.75], dtype=dtype, device=backend.device)
    fusereg.prox.l1_(w, 0.5)
    assert w.tolist() == [0.0, 0.0, 0.0, 0.0, 0.25, -0.25]
    assert not torch.signbit(w[:4]).any()


def test_prox_gives_positive_zero_where_half_precision_underflows(backend: Backend) -> None:
    tiny = torch.tensor([-6e-8, 6e-8, 1e-7], dtype=torch.float16, device=backend.device)
    fusereg.prox.elastic_net_(tiny, 0.0, 3.0)  # a quarter of the smallest float16
    assert tiny.tolist() == [0.0, 0.0, 0.0] or (tiny[:2] == 0).all()
    assert not torch.signbit(tiny[tiny == 0]).any()


def test_prox_with_threshold_zero_changes_nothing_but_signs_of_zero(
    dtype: torch.dtype, backend: Backend
) -> None:
    w = make((1000,), dtype, backend)
    before = w.clone()
    fusereg.prox.l1_(w, 0.0)
    assert torch.equal(w, before)


def test_sparsity_counts_both_zeros_and_no_nan(backend: Backend) -> None:
    w = torch.tensor([0.0, -0.0, 1.0, float("nan")], device=backend.device)
    assert fusereg.sparsity(w) == 0.5
    assert fusereg.sparsity([w, torch.ones(4, device=backend.device)]) == 0.25
    assert fusereg.sparsity([]) == 0.0


# --- special values -------------------------------------------------------------------------------


def test_nan_stays_visible(dtype: torch.dtype, backend: Backend) -> None:
    for name, (penalty, _) in PENALTIES.items():
        w = make((4, 5), dtype, backend)
        w[1, 2] = float("nan")
        w.requires_grad_()
        value = penalty(w)
        value.backward()
        assert value.isnan(), name
        assert w.grad is not None
        assert w.grad[1, 2].isnan(), name
        wrong = w.grad.isnan().sum().item()
        assert wrong == (5 if name == "group" else 1), name
    w = make((4, 5), dtype, backend)
    w[1, 2] = float("nan")
    fusereg.prox.l1_(w, 0.1)
    assert w.isnan().sum() == 1


def test_a_term_of_strength_zero_is_left_out(dtype: torch.dtype, backend: Backend) -> None:
    """Of NaN and infinities, too, which a multiplication by zero would make NaN."""
    w = torch.tensor([[float("nan"), float("inf"), 1.0]], dtype=dtype, device=backend.device)
    w.requires_grad_()
    for penalty in (F.l1_penalty, F.l2_penalty, F.group_lasso_penalty):
        value = penalty(w, 0.0)
        value.backward()
        assert value == 0.0
    assert fusereg.add_penalty_grad_(w, l1=0.0) == 0.0
    assert w.grad is not None
    assert not w.grad.any()


def test_infinity(dtype: torch.dtype, backend: Backend) -> None:
    w = torch.tensor([float("inf"), -float("inf"), 1.0], dtype=dtype, device=backend.device)
    w.requires_grad_()
    value = F.l1_penalty(w, 0.5)
    value.backward()
    assert value.item() == math.inf
    assert w.grad is not None
    assert w.grad.tolist() == [0.5, -0.5, 0.5]
    fusereg.prox.l1_(w, 0.5)
    assert w.tolist() == [math.inf, -math.inf, 0.5]


def test_gradient_at_zero_is_zero(dtype: torch.dtype, backend: Backend) -> None:
    for name, (penalty, _) in PENALTIES.items():
        w = torch.zeros(3, 4, dtype=dtype, device=backend.device, requires_grad=True)
        penalty(w).backward()
        assert w.grad is not None
        assert torch.equal(w.grad, torch.zeros_like(w)), name


def test_squares_that_overflow_float32(backend: Backend) -> None:
    w = torch.full((3000,), 1e20, device=backend.device)
    assert_close(F.l2_penalty(w, 1e-10), torch.tensor(3e33).double(), torch.float32, 2)
    groups = w.view(3, 1000)
    wanted = reference.penalty(groups, group=1.0)
    assert_close(F.group_lasso_penalty(groups, 1.0), wanted, torch.float32)
    assert_close(
        F.group_lasso_penalty(groups, 1.0, 1),
        reference.penalty(groups, group=1.0, dim=1),
        torch.float32,
    )


def test_seventy_thousand_ones_in_half_precision(backend: Backend) -> None:
    ones = torch.ones(70_000, dtype=torch.float16, device=backend.device)
    assert F.l1_penalty(ones, 1.0).item() == 70_000
    assert F.l2_penalty(ones, 1.0).item() == 70_000


def test_sums_are_accurate(backend: Backend) -> None:
    """A million equal terms lose nothing: a running float32 sum is off by a percent."""
    n = 20_000 if backend.on_host else 1_000_000
    w = torch.full((n,), 0.1, device=backend.device)
    exact = n * float(torch.tensor(0.1).double())
    assert abs(F.l1_penalty(w, 1.0).item() / exact - 1) < 2e-7


# --- layouts, dtypes, devices ---------------------------------------------------------------------


def layouts(dtype: torch.dtype, backend: Backend) -> dict[str, Tensor]:
    base = make((9, 8, 6, 4), dtype, backend)
    flat = make((4099,), dtype, backend)
    return {
        "misaligned by one element": flat[1:],
        "misaligned by three elements": flat[3:4000],
        "transposed": make((13, 11), dtype, backend).t(),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "permuted": base.permute(2, 0, 3, 1),
        "every second": flat[::2],
        "narrowed": base[:, 2:5],
        "expanded": make((1, 7), dtype, backend).expand(5, 7),
        "size-1 dimension": base[:, :1].transpose(0, 1),
    }


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", layouts(torch.float32, Backend("x", torch.device("cpu"))))
def test_layouts(name: str, dtype: torch.dtype, backend: Backend) -> None:
    w = layouts(dtype, backend)[name]
    leaf = w.detach().requires_grad_()
    value = F.elastic_net_penalty(leaf, 0.3, 0.7)
    assert_close(value, reference.penalty(w, l1=0.3, l2=0.7), value.dtype)
    value.backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, reference.gradient(w, l1=0.3, l2=0.7), dtype)
    if name != "expanded":
        wanted = reference.prox(w, l1=0.5)
        fusereg.prox.l1_(w, 0.5)
        assert_close(w, wanted, dtype)


def test_neighbors_of_a_slice_are_untouched(dtype: torch.dtype, backend: Backend) -> None:
    for start, stop in ((1, 2), (1, 9), (3, 100), (5, 4098)):
        flat = make((4099,), dtype, backend)
        before = flat.clone()
        fusereg.prox.l1_(flat[start:stop], 100.0)
        assert (flat[start:stop] == 0).all()
        assert torch.equal(flat[:start], before[:start])
        assert torch.equal(flat[stop:], before[stop:])
        grad = torch.zeros_like(flat)
        w = flat[start:stop].clone().requires_grad_()
        w.grad = grad[start:stop]
        fusereg.add_penalty_grad_(w, l1=1.0, l2=1.0)
        assert (grad[:start] == 0).all()
        assert (grad[stop:] == 0).all()


def test_dtypes_may_be_mixed(backend: Backend) -> None:
    params = [make((50, 3), d, backend).requires_grad_() for d in DTYPES]
    value = fusereg.add_penalty_grad_(params, l1=0.3, l2=0.7, group=0.1)
    assert value.dtype is torch.float64
    wanted = reference.total(params, l1=0.3, l2=0.7, group=0.1)
    assert abs(value.cpu() - wanted) < 1e-6 * wanted
    for p in params:
        assert p.grad is not None
        assert p.grad.dtype is p.dtype
        assert_close(p.grad, reference.gradient(p, l1=0.3, l2=0.7, group=0.1), p.dtype)


@pytest.mark.all_cases("host")
def test_long_lists_span_launches(backend: Backend) -> None:
    """More tensors than fit one launch's parameters."""
    params = [make((1 + i % 5, 2), torch.float32, backend).requires_grad_() for i in range(1600)]
    value = fusereg.add_penalty_grad_(params, l1=0.3, l2=0.7)
    assert_close(value, reference.total(params, l1=0.3, l2=0.7), torch.float32)
    value = fusereg.add_penalty_grad_(params, group=0.3)
    assert_close(value, reference.total(params, group=0.3), torch.float32)
    for p in params[:3] + params[-3:]:
        assert p.grad is not None
        wanted = reference.gradient(p, l1=0.3, l2=0.7) + reference.gradient(p, group=0.3)
        assert_close(p.grad, wanted, torch.float32)


# --- determinism ----------------------------------------------------------------------------------


def run_everything(params: list[Tensor]) -> list[Tensor]:
    """Run every operation once and return all results."""
    leaves = [p.detach().clone().requires_grad_() for p in params]
    results = [fusereg.add_penalty_grad_(leaves, l1=0.3, l2=0.7, group=0.1)]
    results += [p.grad for p in leaves if p.grad is not None]
    results.append(F.elastic_net_penalty(leaves, 0.3, 0.7).detach())
    for dim in (0, 1):
        matrices = [p for p in leaves if p.dim() > 1]
        results.append(F.group_lasso_penalty(matrices, 0.3, dim).detach())
        stepped = [p.detach().clone() for p in matrices]
        fusereg.prox.group_lasso_(stepped, 0.3, dim)
        results += stepped
    stepped = [p.detach().clone() for p in params]
    fusereg.prox.elastic_net_(stepped, 0.3, 0.2)
    return results + stepped


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip((t.reshape(-1) for t in a), (t.reshape(-1) for t in b), strict=True)
    )


@pytest.mark.all_cases("host")
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(
    dtype: torch.dtype, backend: Backend
) -> None:
    large = (70, 300) if backend.on_host else (700, 700)
    params = [*make_list(dtype, backend), make(large, dtype, backend)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_everything(params)
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            assert same_bits(first, run_everything(params)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype) -> None:
    cpu = Backend("cpu", torch.device("cpu"))
    params = [*make_list(dtype, cpu), make((300, 200), dtype, cpu)]
    params[4].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0]).to(dtype)
    before = fusereg._C.cpu_isa()
    try:
        results = {}
        for isa in fusereg._C.cpu_isas():
            fusereg._C.set_cpu_isa(isa)
            results[isa] = run_everything(params)
    finally:
        fusereg._C.set_cpu_isa(before)
    for isa, result in results.items():
        assert same_bits(results["baseline"], result), isa


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend: Backend) -> None:
    """4 GiB of bfloat16 zeros, which the system hands out untouched, but for two."""
    if backend.isa is not None and backend.isa != fusereg._C.cpu_isas()[-1]:
        pytest.skip("indices are the launcher's: one instruction set is enough")
    n = 2**31 + 8191
    try:
        w = torch.zeros(n, dtype=torch.bfloat16, device=backend.device)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    w[-1] = 3.0
    w[2**31] = 5.0
    assert F.elastic_net_penalty(w, 1.0, 2.0).item() == 8.0 + 34.0
    if not backend.on_host:
        assert F.group_lasso_penalty(w.view(1, -1), 1.0).item() == pytest.approx(
            math.sqrt(n) * math.sqrt(34.0), rel=1e-6
        )
        fusereg.prox.l1_(w, 1.0)
        assert w[-1].item() == 2.0
        assert w[2**31].item() == 4.0


# --- properties -----------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    generator = torch.Generator().manual_seed(seed)
    padded = [n + draw(st.integers(0, 2)) for n in shape]
    base = (torch.randn(padded, generator=generator, dtype=torch.float64) * scale).to(dtype)
    view = base[tuple(slice(0, n) for n in shape)]
    return view.permute(draw(st.permutations(range(len(shape)))))


strengths = st.sampled_from([0.0, 1e-3, 0.5, 2.0])


@given(params=st.lists(tensors(), max_size=6), l1=strengths, l2=strengths, group=strengths)
def test_any_list_of_any_shapes_dtypes_and_strides(
    backend: Backend, params: list[Tensor], l1: float, l2: float, group: float
) -> None:
    s = {"l1": l1, "l2": l2, "group": group}
    leaves = [p.to(backend.device).detach().requires_grad_() for p in params]
    value = fusereg.add_penalty_grad_(leaves, **s)
    wanted = reference.total(leaves, **s)
    assert abs(value.cpu().double() - wanted) <= 1e-6 * wanted
    for p in leaves:
        assert p.grad is not None
        assert_close(p.grad, reference.gradient(p, **s), p.dtype, 2)


@given(w=tensors(), l1=strengths, l2=strengths, group=strengths)
def test_proximal_step_against_its_formula_and_its_purpose(
    backend: Backend, w: Tensor, l1: float, l2: float, group: float
) -> None:
    w = w.to(backend.device)
    for step, s in (
        (lambda p: fusereg.prox.elastic_net_(p, l1, l2), {"l1": l1, "l2": l2}),
        (lambda p: fusereg.prox.group_lasso_(p, group), {"group": group}),
    ):
        stepped = w.clone()
        step(stepped)
        assert_close(stepped, reference.prox(w, **s), w.dtype, 2)

        # It minimizes |p - w|^2 / 2 + R(p): no worse than staying, than zero, than half way.
        def objective(p: Tensor, s: dict[str, float] = s) -> float:
            distance = (p.double() - w.double()).square().sum() / 2
            return float(distance + reference.penalty(p, **s))

        best = objective(stepped)
        slack = 10 * TOLERANCES[w.dtype] * (1e-6 + objective(w) + objective(torch.zeros_like(w)))
        for other in (w, torch.zeros_like(w), (w + stepped) / 2):
            assert best <= objective(other) + slack
