"""WeightPenalty: what it penalizes and how much, against plain PyTorch in float64."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Backend
from fusereg import PenaltyGroup, WeightPenalty
from penalized_models import (
    MODELS,
    MyRMSNorm,
    Net,
    Tied,
    assert_same,
    clear,
    conv_bn,
    gradients,
    mlp,
    obvious,
    strengths,
    transformer_layer,
)

# --- what is penalized --------------------------------------------------------------------------

ALL = ["scale", "body.0.weight", "body.0.bias", "body.1.weight", "body.2.weight", "body.2.bias"]
ALL += ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        (("bias", "norm"), ["body.0.bias", "body.1.weight", "body.2.bias", "head.bias"]),
        ((), []),
        (("bias",), ["body.0.bias", "body.2.bias", "head.bias"]),
        (("norm",), ["body.1.weight"]),
        ("norm", ["body.1.weight"]),
        (("head.*", "scale"), ["scale", "head.weight", "head.bias"]),
        (("*.weight",), ["body.0.weight", "body.1.weight", "body.2.weight", "head.weight"]),
        (("body.[02].bias",), ["body.0.bias", "body.2.bias"]),
        ((nn.Linear,), [n for n in ALL if n not in ("scale", "body.1.weight")]),
        (nn.Linear, [n for n in ALL if n not in ("scale", "body.1.weight")]),
        ((MyRMSNorm, "head.bias"), ["body.1.weight", "head.bias"]),
        ((Net,), ["scale"]),
        pytest.param(
            iter(("bias", "norm")),
            ["body.0.bias", "body.1.weight", "body.2.bias", "head.bias"],
            id="iterator",
        ),
    ],
    ids=str,
)
def test_exclude(exclude: Any, excluded: list[str]) -> None:
    penalty = WeightPenalty(Net(), l1=0.5, exclude=exclude)
    assert penalty.excluded == [n for n in ALL if n in excluded]
    assert strengths(penalty) == {n: (0.5, 0.0, 0.0) for n in ALL if n not in excluded}


def test_biases_and_norms_are_excluded_by_default() -> None:
    excluded = ["0.bias", "1.weight", "1.bias", "4.bias"]
    assert WeightPenalty(conv_bn(), l1=1.0).excluded == excluded
    layer = WeightPenalty(transformer_layer(), l1=1.0)
    assert set(strengths(layer)) == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.RMSNorm(4),
        nn.LazyBatchNorm1d(),
        MyRMSNorm(4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_normalization_layer_is_known(norm: nn.Module) -> None:
    penalty = WeightPenalty(nn.Sequential(nn.Linear(4, 4), norm), l1=1.0, exclude=("norm",))
    assert set(strengths(penalty)) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, 2, bidirectional=True), nn.GRUCell(3, 4)], ids=str)
def test_biases_of_recurrent_layers_are_biases(layer: nn.Module) -> None:
    penalty = WeightPenalty(layer, l1=1.0)
    assert strengths(penalty)
    assert all(name.startswith("weight") for name in strengths(penalty))
    assert all(name.startswith("bias") for name in penalty.excluded)


def test_biases_of_attention_are_biases() -> None:
    penalty = WeightPenalty(nn.MultiheadAttention(4, 2, add_bias_kv=True), l1=1.0)
    assert set(strengths(penalty)) == {"in_proj_weight", "out_proj.weight"}


def test_rules_by_pattern_and_type_and_the_last_wins() -> None:
    penalty = WeightPenalty(
        Net(),
        l1=0.1,
        l2=0.2,
        group=0.3,
        rules={
            nn.Linear: {"l1": 1.0},
            "body.*": {"l2": 2.0, "group": 0.0},
            "body.2.*": {"l1": 3.0, "l2": 0.0},
            "scale": None,
        },
    )
    assert strengths(penalty) == {
        "head.weight": (1.0, 0.2, 0.3),
        "body.0.weight": (0.1, 2.0, 0.0),  # not l1=1: rules replace one another, they do not add up
        "body.2.weight": (3.0, 0.0, 0.3),
    }
    assert [g.label for g in penalty.groups] == ["default", "Linear", "body.*", "body.2.*"]
    assert all(isinstance(g, PenaltyGroup) for g in penalty.groups)
    assert "scale" in penalty.excluded


def test_a_later_rule_wins_over_none_and_none_over_an_earlier_rule() -> None:
    rules: dict[Any, Any] = {"body.*": None, "body.2.*": {"l1": 2.0}}
    assert strengths(WeightPenalty(Net(), l1=1.0, rules=rules)) == {
        "scale": (1.0, 0.0, 0.0),
        "body.2.weight": (2.0, 0.0, 0.0),
        "head.weight": (1.0, 0.0, 0.0),
    }
    rules = {"body.2.*": {"l1": 2.0}, "body.*": None}
    assert set(strengths(WeightPenalty(Net(), l1=1.0, rules=rules))) == {"scale", "head.weight"}


def test_what_exclude_names_stays_excluded() -> None:
    rules: dict[Any, Any] = {"head.*": {"l1": 2.0}}
    penalty = WeightPenalty(Net(), l1=1.0, rules=rules)
    assert "head.bias" in penalty.excluded
    assert strengths(penalty)["head.weight"] == (2.0, 0.0, 0.0)


def test_rules_for_biases_and_norms() -> None:
    rules: dict[Any, Any] = {"bias": {"l1": 2.0}, "norm": {"l1": 3.0}}
    found = strengths(WeightPenalty(Net(), l1=1.0, exclude=(), rules=rules))
    assert {n for n, s in found.items() if s[0] == 2.0} == {
        "body.0.bias",
        "body.2.bias",
        "head.bias",
    }
    assert {n for n, s in found.items() if s[0] == 3.0} == {"body.1.weight"}


def test_rules_of_one_name_stay_apart() -> None:
    first = type("Block", (nn.Linear,), {})
    second = type("Block", (nn.Linear,), {})
    model = nn.ModuleDict({"a": first(2, 2), "b": second(2, 2)})
    model.register_parameter("default", nn.Parameter(torch.randn(2)))
    model.register_parameter("Block", nn.Parameter(torch.randn(2)))
    model.register_parameter("other", nn.Parameter(torch.randn(2)))
    rules: dict[Any, Any] = {
        first: {"l1": 1.0},
        second: {"l1": 2.0},
        "default": {"l1": 3.0},
        "Block": {"l1": 4.0},
    }
    penalty = WeightPenalty(model, l1=0.5, exclude=("bias",), rules=rules)
    assert {n: s[0] for n, s in strengths(penalty).items()} == {
        "a.weight": 1.0,
        "b.weight": 2.0,
        "default": 3.0,
        "Block": 4.0,
        "other": 0.5,
    }
    assert penalty.l1 == 0.5
    labels = [g.label for g in penalty.groups]
    assert len(set(labels)) == len(labels) == 5
    again = WeightPenalty(model, exclude=("bias",), rules={k: {"l1": 9.0} for k in rules})
    again.load_state_dict(penalty.state_dict())
    assert strengths(again) == strengths(penalty)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"exclude": ("heads.*",)}, "heads.*"),
        ({"exclude": ("bias", nn.Conv2d)}, "Conv2d"),
        ({"rules": {"haed.*": {"l1": 0.0}}}, "haed.*"),
        ({"rules": {"haed.*": None}}, "haed.*"),
        ({"rules": {nn.Embedding: None, nn.Bilinear: {"l1": 0.0}}}, "Bilinear, Embedding"),
        ({"rules": {"head.bias": {"l1": 1.0}}}, "head.bias"),  # excluded as a bias
        ({"rules": {"bias": {"l1": 1.0}}}, "bias"),
    ],
    ids=str,
)
def test_a_pattern_that_concerns_no_parameter(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"no parameter .* matches {re.escape(named)}$"):
        WeightPenalty(Net(), l1=1.0, **arguments)


def test_default_exclusions_need_no_match() -> None:
    assert WeightPenalty(nn.Linear(2, 2, bias=False), l1=1.0).excluded == []


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"l1": -1.0}, ValueError, "l1 must be finite and not negative, got -1.0"),
        ({"l2": math.inf}, ValueError, "l2 must be finite"),
        ({"group": math.nan}, ValueError, "group must be finite"),
        ({"l1": "0.1"}, TypeError, "l1 must be a number, got str"),
        ({"l1": torch.tensor(0.1)}, TypeError, "l1 must be a number, got Tensor"),
        ({"l2": None}, TypeError, "l2 must be a number, got NoneType"),
        ({"rules": {"head.*": {"l3": 1.0}}}, ValueError, r"head\.\*: unknown strength 'l3'"),
        ({"rules": {"head.*": {"lr": 1.0}}}, ValueError, "known: l1, l2, group"),
        ({"rules": {"head.*": {"l1": -2.0}}}, ValueError, r"head\.\*: l1 must be finite"),
        ({"rules": {"head.*": 0.1}}, TypeError, r"the rule for head\.\* must be a mapping"),
        ({"rules": {7: None}}, TypeError, "name patterns or module types, got 7"),
        ({"exclude": (int,)}, TypeError, "name patterns or module types, got <class 'int'>"),
        ({"exclude": (nn.Linear(1, 1),)}, TypeError, "name patterns or module types, got Linear"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=r"fusereg\.WeightPenalty.*" + said):
        WeightPenalty(Net(), **arguments)


@pytest.mark.parametrize("model", [None, [nn.Linear(1, 1)], torch.zeros(3)], ids=str)
def test_something_else_than_a_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        WeightPenalty(model, l1=1.0)


# --- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_three_ways(name: str, half: bool, seed: int) -> None:
    """In the loss, after backward, and in plain PyTorch: one value, the same gradients."""
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    arguments: dict[str, Any] = {"l1": 0.03, "l2": 0.07, "group": 0.02, "half": half}
    if name == "mlp":
        arguments |= {"exclude": (), "rules": {"2.*": {"l1": 0.5, "l2": 0.0}, "4.bias": None}}
    penalty = WeightPenalty(model, **arguments)

    def loss() -> Tensor:
        return model(x).square().mean()  # type: ignore[no-any-return]

    wanted = obvious(model, strengths(penalty), half=half)
    (loss() + wanted).backward()
    wanted_grads = gradients(model)

    clear(model)
    value = penalty.penalty()
    assert value.shape == ()
    assert value.dtype is torch.float64
    assert_same(value, wanted)
    (loss() + value).backward()
    assert_same(gradients(model), wanted_grads)

    clear(model)
    loss().backward()
    value = penalty.add_grad_()
    assert value.shape == ()
    assert not value.requires_grad
    assert_same(value, wanted.detach())
    assert_same(gradients(model), wanted_grads)


def test_both_conventions_of_l2() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
    assert WeightPenalty(model, l2=0.5).penalty().item() == 0.25 * 14
    assert WeightPenalty(model, l2=0.5, half=False).penalty().item() == 0.5 * 14
    WeightPenalty(model, l2=0.5).add_grad_()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, 0.5 * model.weight)
    WeightPenalty(model, l2=0.5, half=False).add_grad_()
    assert torch.equal(model.weight.grad, 1.5 * model.weight)


def test_on_every_backend(backend: Backend) -> None:
    model = mlp().to(backend.device)
    penalty = WeightPenalty(model, l1=0.03, l2=0.07, group=0.02, rules={"2.*": {"l1": 0.5}})
    double = copy.deepcopy(model).cpu().double()
    wanted = obvious(double, strengths(penalty))
    wanted.backward()
    value = penalty.penalty()
    assert value.device.type == backend.device.type
    assert_same(value.detach().cpu().double(), wanted.detach(), 1e-6)
    value.backward()
    added = copy.deepcopy(model)
    clear(added)
    WeightPenalty(added, l1=0.03, l2=0.07, group=0.02, rules={"2.*": {"l1": 0.5}}).add_grad_()
    for p, q, r in zip(model.parameters(), added.parameters(), double.parameters(), strict=True):
        if r.grad is None:
            assert p.grad is q.grad is None
        else:
            assert p.grad is not None
            assert q.grad is not None
            assert_same(p.grad.cpu().double(), r.grad, 1e-6)
            assert torch.equal(p.grad, q.grad)


def test_excluded_parameters_get_no_gradient() -> None:
    model = mlp()
    WeightPenalty(model, l1=1.0).add_grad_()
    for name, grad in gradients(model).items():
        assert (grad is None) == name.endswith("bias")


def test_mixed_dtypes_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).bfloat16(), nn.Linear(5, 2).double())
    penalty = WeightPenalty(model, l1=0.5, l2=0.25)
    value = penalty.add_grad_()
    assert value.dtype is torch.float64
    grads = {n: g.dtype for n, g in gradients(model).items() if g is not None}
    assert list(grads.values()) == [torch.float32, torch.bfloat16, torch.float64]
    wanted = obvious(copy.deepcopy(model).double(), strengths(penalty))
    assert_same(value, wanted.detach(), 1e-6)


# --- changing strengths -------------------------------------------------------------------------


def test_strengths_may_change_between_steps() -> None:
    model = mlp().double()
    penalty = WeightPenalty(model, l1=0.1, rules={"2.*": {"l1": 0.2}, "4.*": {"l2": 0.3}})
    for l1, l2, group in [(0.0, 0.5, 0.0), (0.4, 0.0, 0.2), (0.0, 0.0, 0.0)]:
        penalty.l1 = l1
        penalty.groups[1].l2 = l2
        penalty.groups[2].group = group
        assert strengths(penalty) == {
            "0.weight": (l1, 0.0, 0.0),
            "2.weight": (0.2, l2, 0.0),
            "4.weight": (0.1, 0.3, group),
        }
        wanted = obvious(model, strengths(penalty))
        assert_same(penalty.penalty(), wanted)
        clear(model)
        wanted.backward()
        wanted_grads = gradients(model)
        clear(model)
        assert_same(penalty.add_grad_(), wanted.detach())
        assert_same(gradients(model), wanted_grads)


def test_the_whole_strengths_are_the_default_groups() -> None:
    penalty = WeightPenalty(mlp(), l1=1, l2=2, group=3, rules={"2.*": {"l1": 4}})
    assert (penalty.l1, penalty.l2, penalty.group) == (1.0, 2.0, 3.0)
    penalty.l1, penalty.l2, penalty.group = 5, 6, 7
    default, other = penalty.groups
    assert (default.l1, default.l2, default.group) == (5.0, 6.0, 7.0)
    assert (other.l1, other.l2, other.group) == (4.0, 2.0, 3.0)
    default.l1 = 8.0
    assert penalty.l1 == 8.0


@pytest.mark.parametrize("name", ["l1", "l2", "group"])
def test_refused_strengths_change_nothing(name: str) -> None:
    penalty = WeightPenalty(mlp(), l1=1.0, l2=2.0, group=3.0)
    before = penalty.state_dict()
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be finite and not negative"):
            setattr(penalty, name, wrong)
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        setattr(penalty, name, "1")
    assert penalty.state_dict() == before


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_wrong_strength_in_a_group_is_found_before_anything_is_written(wrong: float) -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=1.0, rules={"4.*": {}})
    penalty.groups[1].l1 = wrong
    with pytest.raises(ValueError, match="l1 must be finite and not negative"):
        penalty.penalty()
    with pytest.raises(ValueError, match="l1 must be finite and not negative"):
        penalty.add_grad_()
    assert all(p.grad is None for p in model.parameters())


def test_schedule() -> None:
    model = mlp().double()
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return min(1.0, step / 4)

    penalty = WeightPenalty(model, l1=0.1, l2=0.2, group=0.3, schedule=schedule)
    full = obvious(model, strengths(penalty))
    full.backward()
    full_grads = gradients(model)
    for step in range(6):
        assert penalty.steps == step
        factor = min(1.0, step / 4)
        assert penalty.factor == factor
        assert_same(penalty.penalty(), factor * full)
        clear(model)
        assert_same(penalty.add_grad_(), factor * full.detach())
        scaled = {n: None if g is None else factor * g for n, g in full_grads.items()}
        assert_same(gradients(model), scaled)
        assert (penalty.l1, penalty.l2, penalty.group) == (0.1, 0.2, 0.3)
        penalty.step()
    assert set(seen) == set(range(6))


def test_steps_are_counted_without_a_schedule() -> None:
    penalty = WeightPenalty(mlp(), l1=0.1)
    value = penalty.penalty()
    penalty.step()
    assert penalty.steps == 1
    assert penalty.factor == 1.0
    assert torch.equal(penalty.penalty(), value)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_schedule_that_goes_wrong(wrong: float) -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=1.0, schedule=lambda t: wrong if t else 1.0)
    penalty.penalty()
    penalty.step()
    for call in (penalty.penalty, penalty.add_grad_):
        with pytest.raises(ValueError, match=r"schedule\(1\) must be finite and not negative"):
            call()
    assert all(p.grad is None for p in model.parameters())


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(TypeError, match="schedule must be a function of the step"):
        WeightPenalty(mlp(), l1=1.0, schedule=0.5)  # type: ignore[arg-type]
    penalty = WeightPenalty(mlp(), l1=1.0, schedule=lambda t: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"schedule\(0\) must be a number, got NoneType"):
        penalty.add_grad_()


def test_a_penalty_of_no_parameter_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="no parameter of the model is penalized"):
        WeightPenalty(nn.BatchNorm1d(3), l1=0.1)


# --- parameters of all kinds --------------------------------------------------------------------


def test_tied_parameters_count_once() -> None:
    model = Tied().double()
    penalty = WeightPenalty(model, l1=0.5, l2=0.25)
    w = model.embedding.weight
    wanted = 0.5 * w.abs().sum() + 0.125 * w.square().sum()
    assert list(strengths(penalty)) == ["embedding.weight"]
    assert_same(penalty.penalty(), wanted)
    wanted.backward()
    wanted_grads = gradients(model)
    clear(model)
    assert_same(penalty.add_grad_(), wanted.detach())
    assert_same(gradients(model), wanted_grads)


def test_a_module_used_twice_counts_once() -> None:
    shared = nn.Linear(3, 3)
    penalty = WeightPenalty(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), l1=1.0)
    assert list(strengths(penalty)) == ["a.weight"]


def test_frozen_parameters_count_in_the_value_only() -> None:
    model = mlp().double()
    model[0].requires_grad_(False)
    penalty = WeightPenalty(model, l1=0.1, l2=0.2, group=0.3)
    wanted = obvious(model, strengths(penalty))
    value = penalty.penalty()
    assert_same(value, wanted)
    value.backward()
    assert model[0].weight.grad is None
    through_autograd = gradients(model)
    clear(model)
    assert_same(penalty.add_grad_(), wanted.detach())
    assert model[0].weight.grad is None
    assert_same(gradients(model), through_autograd)
    model.requires_grad_(False)
    clear(model)
    assert not penalty.penalty().requires_grad
    assert_same(penalty.add_grad_(), wanted.detach())
    assert all(p.grad is None for p in model.parameters())


def test_freezing_and_thawing_needs_no_refresh() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=1.0)
    model.requires_grad_(False)
    penalty.add_grad_()
    model.requires_grad_(True)
    penalty.add_grad_()
    assert model[0].weight.grad is not None
    assert torch.equal(model[0].weight.grad, model[0].weight.sign())


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (nn.ReLU(), {}),
        (nn.Sequential(), {}),
        (nn.LayerNorm(3), {}),
        (mlp(), {"exclude": ("*",)}),
        (mlp(), {"rules": {nn.Linear: None}}),
    ],
    ids=["no_parameters", "empty", "norm_only", "all_excluded", "no_rule_left"],
)
def test_nothing_to_penalize(model: nn.Module, arguments: dict[str, Any]) -> None:
    penalty = WeightPenalty(model, l1=1.0, l2=1.0, group=1.0, **arguments)
    assert strengths(penalty) == {}
    value = penalty.penalty()
    assert value.shape == ()
    assert value.item() == 0.0
    w = torch.randn(3, requires_grad=True)
    (w.sum() + value).backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.ones(3))
    assert penalty.add_grad_().item() == 0.0
    assert all(p.grad is None for p in model.parameters())
    again = WeightPenalty(model, l1=0.0, **arguments)
    again.load_state_dict(penalty.state_dict())
    assert again.l1 == 1.0
    assert repr(penalty).startswith("WeightPenalty(half=True")


def test_all_strengths_zero() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=0.0)
    value = penalty.penalty()
    assert value.item() == 0.0
    value.backward()
    grad = model[0].weight.grad
    assert grad is not None
    assert not grad.any()
    assert penalty.add_grad_().item() == 0.0


def test_deep_models_of_small_and_empty_parameters() -> None:
    layers: list[nn.Module] = [nn.Linear(3, 3) for _ in range(200)]
    odd = nn.ParameterList(torch.randn(s) for s in [(), (0,), (0, 3), (3, 0), (2, 1, 3), (0,)])
    model = nn.Sequential(*layers, odd).double()
    penalty = WeightPenalty(model, l1=0.1, l2=0.2, group=0.3, rules={"1?.*": {"l1": 0.7}})
    assert len(strengths(penalty)) == 206
    assert strengths(penalty)["15.weight"] == (0.7, 0.2, 0.3)
    wanted = obvious(model, strengths(penalty))
    value = penalty.penalty()
    assert_same(value, wanted)
    value.backward()
    through_autograd = gradients(model)
    clear(model)
    assert_same(penalty.add_grad_(), wanted.detach())
    assert_same(gradients(model), through_autograd)


def test_nan_shows_in_value_and_gradient() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[1, 2] = math.nan
    assert WeightPenalty(model, l1=1.0).penalty().isnan()
    assert WeightPenalty(model, l1=1.0).add_grad_().isnan()
    assert model.weight.grad is not None
    assert model.weight.grad.isnan().sum() == 1


def test_lazy_modules_are_seen_once_they_have_their_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    penalty = WeightPenalty(model, l1=0.5)
    assert "0.weight" in repr(penalty)
    model(torch.randn(3, 5))
    assert_same(penalty.penalty(), sum(0.5 * model[i].weight.abs().sum() for i in (0, 2)), 1e-6)
    assert "2 tensors, 28 elements" in repr(penalty)


def test_parametrized_weights() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    penalty = WeightPenalty(layer, l1=0.5)
    assert set(strengths(penalty)) == {"parametrizations.weight.original0"}
    assert "parametrizations.weight.original1" in penalty.excluded  # zeros would make NaN of it
    penalty.add_grad_()
    assert layer.bias.grad is None
