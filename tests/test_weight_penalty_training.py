"""WeightPenalty in training: scaled and accumulated gradients, refresh, state, copies, compile."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fusereg
from fusereg import WeightPenalty
from penalized_models import (
    MODELS,
    Net,
    Tied,
    assert_same,
    clear,
    conv_bn,
    gradients,
    mlp,
    obvious,
    strengths,
)

# --- gradients, accumulated and scaled ----------------------------------------------------------


def test_accumulation() -> None:
    """Micro-batches, then one add_grad_: the gradient of the mean loss plus the penalty."""
    model = mlp().double()
    x = torch.randn(8, 6, dtype=torch.float64)
    penalty = WeightPenalty(model, l1=0.1, l2=0.2)
    for part in x.chunk(4):
        (model(part).square().mean() / 4).backward()
    penalty.add_grad_()
    accumulated = gradients(model)
    clear(model)
    (model(x).square().mean() + obvious(model, strengths(penalty))).backward()
    assert_same(accumulated, gradients(model))


def test_add_grad_adds() -> None:
    model = mlp()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    kept = [p.grad for p in model.parameters()]
    before = gradients(model)
    WeightPenalty(model, l1=0.5).add_grad_()
    for (name, p), grad in zip(model.named_parameters(), kept, strict=True):
        assert p.grad is grad, "the gradient is written in place"
        old = before[name]
        assert old is not None
        wanted = old if name.endswith("bias") else old + 0.5 * p.sign()
        assert_same(p.grad, wanted.detach(), 1e-6)


@pytest.mark.parametrize(
    "scale", [4.0, 4, torch.tensor(4.0), torch.tensor([4.0]), 65536.0], ids=str
)
def test_grad_scale(scale: float | Tensor) -> None:
    model = mlp().double()
    penalty = WeightPenalty(model, l1=0.1, l2=0.2, group=0.3)
    value = penalty.add_grad_()
    plain = gradients(model)
    clear(model)
    assert torch.equal(penalty.add_grad_(grad_scale=scale), value)
    assert_same(
        gradients(model), {n: None if g is None else float(scale) * g for n, g in plain.items()}
    )


@pytest.mark.parametrize(
    ("scale", "error", "said"),
    [
        (torch.ones(2), ValueError, "must be a number or a"),
        (torch.ones((), dtype=torch.int64), ValueError, "has dtype torch.int64; wanted float64"),
        ("2", TypeError, "must be a number or a"),
        ([2.0], TypeError, "must be a number or a"),
    ],
    ids=str,
)
def test_wrong_grad_scale(scale: Any, error: type[Exception], said: str) -> None:
    model = mlp()
    with pytest.raises(error, match=f"grad_scale {said}"):
        WeightPenalty(model, l1=1.0).add_grad_(grad_scale=scale)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_a_grad_scaler(on_device: bool) -> None:
    """The usual loop with a GradScaler, one overflow included, against the term in the loss."""

    def train(after_backward: bool) -> tuple[list[Tensor], float, int]:
        torch.manual_seed(5)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=3)
        penalty = WeightPenalty(model, l1=1e-3, l2=1e-2, group=1e-3)
        skipped = 0
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(16, 6)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
                if step == 4:
                    loss = loss * math.inf
                if not after_backward:
                    loss = loss + penalty.penalty()
            scaler.scale(loss).backward()
            if after_backward:
                scale = scaler.scale(torch.ones(())) if on_device else scaler.get_scale()
                penalty.add_grad_(grad_scale=scale)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
        return [p.detach() for p in model.parameters()], scaler.get_scale(), skipped

    weights, scale, skipped = train(after_backward=True)
    wanted, wanted_scale, wanted_skipped = train(after_backward=False)
    assert scale == wanted_scale
    assert skipped == wanted_skipped == 1
    assert all(w.isfinite().all() for w in weights)
    assert_same(weights, wanted, 1e-5)


def test_autocast_leaves_the_penalty_in_full_precision() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=1e-3, l2=1e-2)
    outside = penalty.penalty()
    outside.backward()
    wanted = gradients(model)
    clear(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty.penalty()
        assert value.dtype is torch.float32
        assert torch.equal(value, outside)
        value.backward()
        assert_same(gradients(model), wanted, 0.0)
        clear(model)
        assert torch.equal(penalty.add_grad_(), outside)
    assert_same(gradients(model), wanted, 0.0)


def test_without_grad_mode() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=0.5, l2=0.5)
    wanted = penalty.penalty()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = penalty.penalty()
            assert not value.requires_grad
            assert torch.equal(value, wanted.detach())
    with torch.no_grad():
        penalty.add_grad_()
    assert model[0].weight.grad is not None


def test_second_derivative() -> None:
    """Hessian-vector product of the loss with its penalty, as curvature methods take it."""
    model = mlp().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    penalty = WeightPenalty(model, l1=0.1, l2=0.2, group=0.3)
    params = [p for g in penalty.groups for p in g.params]
    vectors = [torch.randn_like(p) for p in params]

    def product(value: Tensor) -> list[Tensor]:
        loss = model(x).square().mean() + value
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return list(torch.autograd.grad(grads, params, vectors))

    assert_same(product(penalty.penalty()), product(obvious(model, strengths(penalty))))


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("after_backward", [False, True], ids=["in_the_loss", "after_backward"])
@pytest.mark.parametrize("name", MODELS)
def test_training_gives_the_weights_of_plain_pytorch(name: str, after_backward: bool) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(3)
    ours = make().double()
    theirs = copy.deepcopy(ours)
    data = [torch.randn(shape, dtype=torch.float64) for _ in range(20)]

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    step_ours, step_theirs = optimizer(ours), optimizer(theirs)
    penalty = WeightPenalty(
        ours, l1=1e-3, l2=1e-2, group=1e-3, schedule=lambda t: min(1.0, (t + 1) / 10)
    )
    base = strengths(penalty)
    for step, x in enumerate(data):
        penalty.l1 = 1e-3 if step < 15 else 3e-3
        step_ours.zero_grad()
        loss = ours(x).square().mean()
        if after_backward:
            loss.backward()
            penalty.add_grad_()
        else:
            (loss + penalty.penalty()).backward()
        step_ours.step()
        penalty.step()

        factor = min(1.0, (step + 1) / 10)
        l1 = 1e-3 if step < 15 else 3e-3
        wanted = {n: (l1 * factor, l2 * factor, g * factor) for n, (_, l2, g) in base.items()}
        step_theirs.zero_grad()
        (theirs(x).square().mean() + obvious(theirs, wanted)).backward()
        step_theirs.step()
    assert_same(list(ours.parameters()), list(theirs.parameters()))


def test_training_tied_weights_with_adam() -> None:
    torch.manual_seed(4)
    ours = Tied().double()
    theirs = copy.deepcopy(ours)
    step_ours = torch.optim.Adam(ours.parameters(), lr=0.01)
    step_theirs = torch.optim.Adam(theirs.parameters(), lr=0.01)
    penalty = WeightPenalty(ours, l1=1e-3, l2=1e-2)
    x = torch.randint(10, (6,))
    for _ in range(20):
        step_ours.zero_grad()
        ours(x).square().mean().backward()
        penalty.add_grad_()
        step_ours.step()
        step_theirs.zero_grad()
        w = theirs.embedding.weight
        wanted = 1e-3 * w.abs().sum() + 1e-2 / 2 * w.square().sum()
        (theirs(x).square().mean() + wanted).backward()
        step_theirs.step()
    assert_same(list(ours.parameters()), list(theirs.parameters()))


def test_a_closure_of_lbfgs() -> None:
    torch.manual_seed(6)
    ours = nn.Linear(4, 3).double()
    theirs = copy.deepcopy(ours)
    x = torch.randn(9, 4, dtype=torch.float64)
    penalty = WeightPenalty(ours, l2=0.1)
    step_ours = torch.optim.LBFGS(ours.parameters(), max_iter=5)
    step_theirs = torch.optim.LBFGS(theirs.parameters(), max_iter=5)

    def our_loss() -> float:
        step_ours.zero_grad()
        loss = (ours(x) - 1).square().mean()
        loss.backward()
        return loss.item() + penalty.add_grad_().item()

    def their_loss() -> Tensor:
        step_theirs.zero_grad()
        loss = (theirs(x) - 1).square().mean() + 0.05 * theirs.weight.square().sum()
        loss.backward()
        return loss

    step_ours.step(our_loss)
    step_theirs.step(their_loss)
    assert_same(list(ours.parameters()), list(theirs.parameters()), 1e-10)


# --- refresh ------------------------------------------------------------------------------------


def test_refresh_after_replacing_a_layer() -> None:
    model = mlp().double()
    penalty = WeightPenalty(model, l1=0.1, rules={"4.*": {"l2": 0.5}})
    penalty.l1 = 0.3
    head = penalty.groups[1]
    head.l2 = 0.7
    penalty.step()
    old = model[4].weight
    model[4] = nn.Linear(9, 7).double()
    model[0] = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9)).double()
    penalty.refresh()
    assert strengths(penalty) == {
        "0.0.weight": (0.3, 0.0, 0.0),
        "0.1.weight": (0.3, 0.0, 0.0),
        "2.weight": (0.3, 0.0, 0.0),
        "4.weight": (0.1, 0.7, 0.0),
    }
    assert penalty.groups[1] is head
    assert penalty.excluded == ["0.0.bias", "0.1.bias", "2.bias", "4.bias"]
    assert penalty.steps == 1
    assert_same(penalty.penalty(), obvious(model, strengths(penalty)))
    penalty.add_grad_()
    assert old.grad is None
    assert model[4].weight.grad is not None


def test_refresh_that_fails_changes_nothing() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=0.1, rules={"4.*": {"l2": 0.5}})
    before, value = penalty.state_dict(), penalty.penalty()
    kept = model[4]
    del model[4]
    with pytest.raises(ValueError, match=r"matches 4\.\*"):
        penalty.refresh()
    assert penalty.state_dict() == before
    model.append(kept)
    assert torch.equal(penalty.penalty(), value)
    assert any(p is kept.weight for g in penalty.groups for p in g.params)


def test_refresh_after_meta_and_to_empty() -> None:
    with torch.device("meta"):
        model = mlp()
    penalty = WeightPenalty(model, l1=0.1, l2=0.2)
    assert "0.weight" in repr(penalty)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    penalty.refresh()
    assert_same(
        penalty.penalty().double(), obvious(copy.deepcopy(model).double(), strengths(penalty)), 1e-6
    )


def test_moving_a_model_in_place_needs_no_refresh() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=0.1, l2=0.2)
    model.double()
    value = penalty.penalty()
    assert value.dtype is torch.float64
    assert_same(value, obvious(model, strengths(penalty)))
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert_same(penalty.penalty(), obvious(model, strengths(penalty)))


# --- state --------------------------------------------------------------------------------------


def penalty_for_state(**arguments: Any) -> WeightPenalty:
    rules: dict[Any, Any] = {"2.*": {"l1": 0.5}, nn.Embedding: {"l2": 2.0}}
    model = nn.Sequential(nn.Embedding(3, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    return WeightPenalty(model, rules=rules, **arguments)


@pytest.mark.parametrize("through", ["nothing", "file", "pickle"])
def test_state_round_trip(through: str) -> None:
    saved = penalty_for_state(l1=0.1, l2=0.2, half=False, schedule=lambda t: 1 / (t + 1))
    saved.group = 0.25
    saved.groups[1].l2 = 0.75
    saved.step()
    saved.step()
    state = saved.state_dict()
    if through == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif through == "pickle":
        state = pickle.loads(pickle.dumps(state))
    loaded = penalty_for_state(schedule=lambda t: 1 / (t + 1))
    loaded.load_state_dict(state)
    assert loaded.state_dict() == saved.state_dict()
    assert strengths(loaded) == strengths(saved)
    assert loaded.steps == 2
    assert loaded.half is False
    assert loaded.factor == saved.factor == 1 / 3
    loaded.step()  # the saved state is no part of either penalty
    loaded.l1 = 9.0
    assert saved.steps == state["steps"] == 2
    assert saved.l1 == state["groups"]["default"]["l1"] == 0.1


def edited(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(state: dict[str, Any]) -> Any:
        part = state
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        return state

    return edit


def without(*path: str) -> Callable[[dict[str, Any]], Any]:
    def edit(state: dict[str, Any]) -> Any:
        part = state
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        return state

    return edit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: None, "no state of a WeightPenalty"),
        (lambda state: {}, "no state of a WeightPenalty"),
        (lambda state: [state], "no state of a WeightPenalty"),
        (lambda state: mlp().state_dict(), "no state of a WeightPenalty"),
        (edited(("version",), 2), "no state of a WeightPenalty"),
        (without("steps"), "no state of a WeightPenalty"),
        (without("half"), "no state of a WeightPenalty"),
        (without("groups"), "no state of a WeightPenalty"),
        (edited(("groups",), None), "no state of a WeightPenalty"),
        (edited(("steps",), "many"), "no state of a WeightPenalty"),
        (without("groups", "2.*", "l2"), "no state of a WeightPenalty"),
        (without("groups", "2.*", "names"), "no state of a WeightPenalty"),
        (without("groups", "2.*"), "the state has groups"),
        (edited(("groups", "3.*"), {"l1": 0, "l2": 0, "group": 0, "names": []}), "has groups"),
        (edited(("groups", "2.*", "names"), ["1.weight"]), "'2.*' of the state names other"),
        (edited(("groups", "default", "names"), []), "'default' of the state names other"),
        (edited(("groups", "Embedding", "l2"), -1.0), "l2 must be finite and not negative"),
        (edited(("groups", "Embedding", "l2"), math.nan), "l2 must be finite and not negative"),
    ],
)
def test_refused_states_change_nothing(change: Callable[[Any], Any], said: str) -> None:
    wrong = change(penalty_for_state(l1=7.0, half=False).state_dict())
    penalty = penalty_for_state(l1=0.1, l2=0.2)
    penalty.step()
    before = penalty.state_dict()
    with pytest.raises(ValueError, match=re.escape(said)):
        penalty.load_state_dict(wrong)
    assert penalty.state_dict() == before


def test_a_strength_of_another_type_in_a_state() -> None:
    penalty = penalty_for_state(l1=0.1)
    state = edited(("groups", "default", "l1"), "0.1")(penalty.state_dict())
    with pytest.raises(TypeError, match="l1 must be a number, got str"):
        penalty.load_state_dict(state)


def test_training_resumes_where_it_was_saved() -> None:
    def pieces(model: nn.Module) -> tuple[torch.optim.Optimizer, WeightPenalty]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer, WeightPenalty(model, l1=0.01, schedule=lambda t: t / 10)

    def train(model: nn.Module, parts: tuple[torch.optim.Optimizer, WeightPenalty]) -> None:
        optimizer, penalty = parts
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            penalty.add_grad_()
            optimizer.step()
            penalty.step()

    x = torch.randn(5, 6)
    model = mlp()
    parts = pieces(model)
    train(model, parts)
    saved = copy.deepcopy([model.state_dict(), *(p.state_dict() for p in parts)])
    train(model, parts)

    again = mlp()
    resumed = pieces(again)
    again.load_state_dict(saved[0])
    for part, state in zip(resumed, saved[1:], strict=True):
        part.load_state_dict(state)
    train(again, resumed)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


# --- copies, text -------------------------------------------------------------------------------


def test_a_deep_copy_is_about_the_copied_model() -> None:
    model = mlp()
    penalty = WeightPenalty(model, l1=0.5)
    copied, copied_penalty = copy.deepcopy((model, penalty))
    copied_penalty.l1 = 0.25
    assert penalty.l1 == 0.5
    copied_penalty.add_grad_()
    assert copied[0].weight.grad is not None
    assert torch.equal(copied[0].weight.grad, 0.25 * copied[0].weight.sign())
    assert all(p.grad is None for p in model.parameters())


def halved(step: int) -> float:
    return 0.5**step


def test_pickle_keeps_model_and_penalty_together() -> None:
    penalty = WeightPenalty(
        Tied(), l1=0.5, exclude=(), rules={nn.Linear: {"l2": 0.1}}, schedule=halved
    )
    penalty.step()
    model, loaded = pickle.loads(pickle.dumps((penalty._model, penalty)))
    assert loaded.state_dict() == penalty.state_dict()
    assert repr(loaded) == repr(penalty)
    assert loaded.groups[0].params[0] is model.embedding.weight
    assert_same(loaded.penalty(), penalty.penalty(), 0.0)
    loaded.refresh()
    assert loaded.state_dict() == penalty.state_dict()


def test_repr_shows_what_is_penalized_with_how_much() -> None:
    penalty = WeightPenalty(
        conv_bn(), l1=1e-5, l2=0.25, half=False, rules={nn.Linear: {"l1": 0.0, "group": 1.5}}
    )
    assert repr(penalty) == (
        "WeightPenalty(half=False\n"
        "  default: l1=1e-05, l2=0.25, group=0 on 1 tensors, 90 elements: 0.weight\n"
        "  Linear: l1=0, l2=0.25, group=1.5 on 1 tensors, 320 elements: 4.weight\n"
        "  not penalized: 0.bias, 1.weight, 1.bias, 4.bias\n"
        ")"
    )
    penalty.groups[1].group = 2.5
    assert "group=2.5 on" in repr(penalty)


def test_repr_shows_the_schedule_and_shortens_long_lists() -> None:
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(9)))
    penalty = WeightPenalty(model, l1=0.5, schedule=lambda t: t / 8)
    penalty.step()
    text = repr(penalty)
    assert "step 1, factor 0.125" in text
    assert "l1=0.5, l2=0, group=0 on 9 tensors, 90,000 elements: 0.weight, 1.weight" in text
    assert "5.weight, ... (3 more)" in text
    assert "not penalized: 0.bias, 1.bias, 2.bias, 3.bias, 4.bias, 5.bias, ... (3 more)" in text


# --- torch.compile ------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_loss_with_its_penalty() -> None:
    """fullgraph, with strengths, schedule and frozen parameters that change between the calls."""
    model = mlp()
    x = torch.randn(5, 6)
    penalty = WeightPenalty(
        model,
        l1=0.1,
        l2=0.2,
        group=0.05,
        rules={"2.*": {"l1": 0.0}},
        schedule=lambda t: 1 / (t + 1),
    )

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean() + penalty.penalty()  # type: ignore[no-any-return]

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        clear(model)
        wanted = loss_of(x)
        wanted.backward()
        wanted_grads = gradients(model)
        clear(model)
        loss = compiled(x)
        loss.backward()
        assert_same(loss, wanted, 1e-6)
        assert_same(gradients(model), wanted_grads, 1e-6)
        penalty.step()
        penalty.groups[1].l2 = 0.4
        model[0].weight.requires_grad_(False)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_with_the_penalty_outside() -> None:
    model = mlp()
    x = torch.randn(5, 6)
    penalty = WeightPenalty(torch.compile(model, backend="eager"), l1=0.1)
    assert list(strengths(penalty)) == [f"{i}.weight" for i in (0, 2, 4)]
    (model(x).square().mean() + penalty.penalty()).backward()
    wanted = gradients(model)
    clear(model)
    model(x).square().mean().backward()
    penalty.add_grad_()
    assert_same(gradients(model), wanted, 1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_step_with_add_grad() -> None:
    model = mlp()
    x = torch.randn(5, 6)
    penalty = WeightPenalty(model, l1=0.1, l2=0.2)

    def step(x: Tensor) -> Tensor:
        model(x).square().mean().backward()
        return penalty.add_grad_()

    wanted = step(x)
    wanted_grads = gradients(model)
    clear(model)
    value = torch.compile(step, backend="aot_eager")(x)
    assert_same(value, wanted, 1e-6)
    assert_same(gradients(model), wanted_grads, 1e-6)


# --- properties ---------------------------------------------------------------------------------

_strength = st.floats(0.0, 10.0)


@given(_strength, _strength, _strength, st.floats(0.0, 8.0), st.booleans())
def test_value_is_linear_in_the_strengths(
    l1: float, l2: float, group: float, factor: float, half: bool
) -> None:
    torch.manual_seed(0)
    model = mlp().double()

    def value(l1: float, l2: float, group: float) -> Tensor:
        with torch.no_grad():
            return WeightPenalty(model, l1=l1, l2=l2, group=group, half=half).penalty()

    whole = value(l1, l2, group)
    assert_same(whole, value(l1, 0, 0) + value(0, l2, 0) + value(0, 0, group), 1e-11)
    assert_same(value(factor * l1, factor * l2, factor * group), factor * whole, 1e-11)
    scheduled = WeightPenalty(
        model, l1=l1, l2=l2, group=group, half=half, schedule=lambda t: factor
    )
    assert_same(scheduled.penalty().detach(), factor * whole, 1e-11)


@given(_strength, _strength, _strength, st.floats(-100.0, 100.0))
def test_adding_the_gradient_twice_is_twice_the_gradient(
    l1: float, l2: float, group: float, scale: float
) -> None:
    torch.manual_seed(0)
    model = mlp().double()
    penalty = WeightPenalty(model, l1=l1, l2=l2, group=group)
    value = penalty.add_grad_(grad_scale=scale)
    once = gradients(model)
    assert torch.equal(penalty.add_grad_(grad_scale=scale), value)
    assert_same(gradients(model), {n: None if g is None else 2 * g for n, g in once.items()}, 1e-11)
    penalty.add_grad_(grad_scale=-2 * scale)
    zeros = {n: None if g is None else torch.zeros_like(g) for n, g in once.items()}
    assert_same(gradients(model), zeros, 1e-9)


@given(st.data())
def test_rules_and_exclusions_partition_the_parameters(data: st.DataObject) -> None:
    """Every parameter is in one group or excluded, and the last matching rule is the one it got."""
    names = [n for n, _ in Net().named_parameters()]
    patterns = st.sampled_from([*names, "body.*", "*.weight", "*.bias", "head.*", "*"])
    rules = data.draw(
        st.dictionaries(patterns, st.one_of(st.none(), st.floats(0.0, 1.0)), max_size=4)
    )
    exclude = data.draw(st.sets(patterns.filter(lambda p: p != "*"), max_size=2))
    exclude -= set(rules)
    wanted: dict[str, float | None] = {}
    used: set[str] = set()
    for name in names:
        if any(matches(e, name) for e in exclude):
            wanted[name] = None
            continue
        found = [r for r in rules if matches(r, name)]
        used.update(found)
        wanted[name] = rules[found[-1]] if found else 2.0
    arguments: dict[str, Any] = {
        "exclude": exclude,
        "rules": {k: None if v is None else {"l1": v} for k, v in rules.items()},
    }
    if used != set(rules):
        with pytest.raises(ValueError, match="no parameter"):
            WeightPenalty(Net(), l1=2.0, **arguments)
        return
    penalty = WeightPenalty(Net(), l1=2.0, **arguments)
    assert penalty.excluded == [n for n, v in wanted.items() if v is None]
    found_l1 = {n: s[0] for n, s in strengths(penalty).items()}
    assert found_l1 == {n: v for n, v in wanted.items() if v is not None}


def matches(pattern: str, name: str) -> bool:
    """Match the few patterns of the test above: a name, or one star at an end."""
    if pattern == "*":
        return True
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern


def test_the_penalty_is_one_call_of_the_functions() -> None:
    """The class adds bookkeeping, no arithmetic of its own."""
    model = mlp()
    params = [model[i].weight for i in (0, 2, 4)]
    penalty = WeightPenalty(model, l1=0.5, l2=0.25)
    wanted = fusereg.functional.elastic_net_penalty(params, 0.5, 0.25)
    assert torch.equal(penalty.penalty(), wanted)
    wanted = fusereg.add_penalty_grad_(params, l1=0.5, l2=0.25)
    assert torch.equal(penalty.add_grad_(), wanted)
