"""Penalties of activations and matrices, the max-norm constraint, and groups along a dimension."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
import other_libraries  # noqa: F401  # before transformers
from fusereg import optim

F = fusereg.functional
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 7), (7, 3), (4, 2, 3, 3), (5,)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def orthogonality(w: Tensor) -> Tensor:
    rows = w.flatten(1)
    rows = rows if len(rows) <= rows.shape[1] else rows.T
    return (rows @ rows.T - torch.eye(len(rows), dtype=w.dtype)).pow(2).sum()


def spectral(w: Tensor) -> Tensor:
    return torch.linalg.svdvals(w.flatten(1))[0] ** 2 / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "reference"),
    [(F.orthogonality_penalty, orthogonality), (F.spectral_norm_penalty, spectral)],
)
def test_penalties_of_matrices_are_their_formulas(
    function: Any, reference: Any, dtype: torch.dtype
) -> None:
    """With a strength for each; tensors without columns are left out."""
    params, strengths = weights(dtype), [0.3, 0.0, 0.7, 1.0]
    exact = [w.detach().double().requires_grad_() for w in params]
    value = function(params, strengths)
    wanted = sum(s * reference(w) for s, w in zip(strengths[:3], exact[:3], strict=True))
    grads = torch.autograd.grad(value, (params[0], params[2]))
    exact_grads = torch.autograd.grad(wanted, (exact[0], exact[2]))
    for a, b in zip((value, *grads), (wanted, *exact_grads), strict=True):
        bound = DTYPES[dtype] * float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)


def test_rows_along_another_dimension_are_those_of_the_transpose() -> None:
    w = weights()[2]
    for function in (F.orthogonality_penalty, F.spectral_norm_penalty):
        came = function(w, 0.5, dim=1)
        assert torch.allclose(came, function(w.transpose(0, 1), 0.5), rtol=1e-12)


def test_an_orthogonal_matrix_has_no_orthogonality_penalty() -> None:
    tall = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q
    for w in (tall, tall.T):
        assert float(F.orthogonality_penalty(w, 1.0)) < 1e-25


def test_the_activity_penalty_is_keras_s() -> None:
    x = torch.tensor([[1.0, -2.0], [0.0, 3.0]], requires_grad=True)
    value = F.activity_penalty(x, l1=0.1, l2=0.01)
    assert float(value.detach()) == pytest.approx((0.1 * 6 + 0.01 * 14) / 2)
    value.backward()
    wanted = (0.1 * x.sign() + 0.02 * x).detach() / 2
    torch.testing.assert_close(x.grad, wanted)
    with pytest.raises(ValueError, match="l1 must be finite and not negative"):
        F.activity_penalty(x, l1=-1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_no_slice_is_longer_than_its_limit(dtype: torch.dtype, dim: int) -> None:
    params = weights(dtype)
    before = [w.detach().clone() for w in params]
    fusereg.prox.max_norm_(params, 1.5, dim=dim)
    shrunk = 0
    for w, old in zip(params, before, strict=True):
        if w.dim() < 2:
            assert torch.equal(w, old)
            continue
        wanted = torch.renorm(old.double(), 2, dim % w.dim(), 1.5)
        torch.testing.assert_close(w.double(), wanted, rtol=DTYPES[dtype], atol=1e-6)
        rows = old.double().movedim(dim, 0).flatten(1).norm(dim=1)
        kept = rows <= 1.4
        shrunk += int((~kept).sum())
        assert torch.equal(w.movedim(dim, 0)[kept], old.movedim(dim, 0)[kept])
    assert shrunk


def test_max_norm_after_each_step_holds_through_training() -> None:
    model = nn.Linear(5, 3)
    optimizer = fusereg.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: fusereg.prox.max_norm_(model, 0.5))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        assert float(model.weight.detach().norm(dim=1).max()) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: F.orthogonality_penalty(w, 1.0, dim=2),
        lambda w: F.spectral_norm_penalty(w, 1.0, dim=-3),
        lambda w: fusereg.prox.max_norm_(w, 1.0, dim=2),
    ],
)
def test_a_dimension_that_is_not_there_is_refused(call: Any) -> None:
    w = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"dim must be a dimension of params\[0\]"):
        call(w)
    assert torch.equal(w, torch.ones(3, 4))


# --- groups along a dimension ---------------------------------------------------------------------


def group_norms(w: Tensor, dim: int) -> Tensor:
    rows = w.movedim(dim, 0).flatten(1)
    return math.sqrt(rows.shape[1]) * rows.norm(dim=1).sum()


def test_add_penalty_grad_takes_the_dimension_of_the_groups() -> None:
    w = weights()[0]
    value = fusereg.add_penalty_grad_(w, group=0.3, group_dim=1)
    wanted = 0.3 * group_norms(w, 1)
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(w.grad, torch.autograd.grad(wanted, w)[0])
    with pytest.raises(TypeError, match="group_dim must be an int, got float"):
        fusereg.add_penalty_grad_(w, group=0.3, group_dim=1.0)  # type: ignore[arg-type]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.up = nn.ConvTranspose2d(4, 2, 3)
        self.depthwise = nn.ConvTranspose2d(4, 4, 3, groups=4)


#: The dimension of the outputs of each.
OUTPUTS = {"linear.weight": 0, "up.weight": 1, "depthwise.weight": 0}


def penalty_of(model: nn.Module, dims: dict[str, int], strength: float = 0.3) -> Tensor:
    params = dict(model.named_parameters())
    values = [strength * group_norms(params[name], dim) for name, dim in dims.items()]
    return torch.stack(values).sum()


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        ({}, OUTPUTS),
        ({"group_dim": 1}, dict.fromkeys(OUTPUTS, 1)),
        ({"group_dim": -4}, dict.fromkeys(("up.weight", "depthwise.weight"), 0)),
        ({"rules": {"linear.*": {"group_dim": 1}}}, {**OUTPUTS, "linear.weight": 1}),
        (
            {"group_dim": 1, "rules": {nn.ConvTranspose2d: {"group_dim": None}}},
            {**OUTPUTS, "linear.weight": 1},
        ),
    ],
)
def test_groups_are_the_outputs_of_a_layer_unless_told_otherwise(
    options: dict[str, Any], dims: dict[str, int]
) -> None:
    model = Layers().double()
    if options.get("group_dim") == -4:
        options = {**options, "exclude": ("bias", "linear.*")}
    penalty = fusereg.WeightPenalty(model, group=0.3, **options)
    wanted = penalty_of(model, dims)
    torch.testing.assert_close(penalty.penalty(), wanted)
    torch.testing.assert_close(penalty.add_grad_(), wanted.detach())
    for name in dims:
        param = dict(model.named_parameters())[name]
        torch.testing.assert_close(
            param.grad, torch.autograd.grad(wanted, param, retain_graph=True)[0]
        )


def test_param_groups_are_by_the_outputs_of_a_layer_unless_told_otherwise() -> None:
    model = Layers()
    named = dict(model.named_parameters())
    groups = optim.param_groups_weight_decay(model, 0.1, group=0.3)
    dims = {
        n: g["group_dim"]
        for g in optim.SGD(groups, lr=0.1).param_groups
        for n in names_in(g, named)
    }
    assert {name: dims[name] for name in OUTPUTS} == OUTPUTS
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    groups = optim.param_groups_weight_decay(model, 0.1, group=0.3, group_dim=0)
    assert [g.get("group_dim") for g in groups] == [0, 0]
    assert len(optim.param_groups_weight_decay(model, 0.1, l1=0.3)) == 2


def names_in(group: dict[str, Any], named: dict[str, Any]) -> list[str]:
    return [name for name, p in named.items() if any(p is q for q in group["params"])]


def test_a_state_says_along_which_dimensions_the_groups_are() -> None:
    model = Layers()
    state = fusereg.WeightPenalty(model, group=0.3).state_dict()
    assert state["groups"]["default"]["group_dim"] == list(OUTPUTS.values())
    fusereg.WeightPenalty(model, group=0.1).load_state_dict(state)
    other = fusereg.WeightPenalty(model, group=0.1, group_dim=1)
    with pytest.raises(
        ValueError, match=r"dimensions \[0, 1, 0\] of its parameters, .* \[1, 1, 1\]"
    ):
        other.load_state_dict(state)
    assert other.group == 0.1
    state["groups"]["default"]["group"] = 0.0  # dimensions do not matter then
    other.load_state_dict(state)
    del state["groups"]["default"]["group_dim"]  # a state of before
    other.load_state_dict(state)


def test_an_input_of_gpt2_s_conv1d_is_no_output() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utils.Conv1D(6, 4), nn.Linear(6, 2)).double()
    penalty = fusereg.WeightPenalty(model, group=0.3)
    wanted = penalty_of(model, {"0.weight": 1, "1.weight": 0})
    torch.testing.assert_close(penalty.penalty(), wanted)


def test_a_group_dim_that_a_parameter_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"group_dim must be a dimension of linear.weight"):
        fusereg.WeightPenalty(Layers(), group=0.1, group_dim=2)
    with pytest.raises(TypeError, match="group_dim must be an int or None"):
        fusereg.WeightPenalty(Layers(), group=0.1, group_dim="in")  # type: ignore[arg-type]
