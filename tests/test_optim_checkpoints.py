"""Optimizers: state dicts and their hooks, keys of param groups, skipped steps, schedules."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusereg
from fusereg import optim
from fusereg.optim.options import OWN

dcp: Any = checkpoint

NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def options_of(name: str) -> dict[str, Any]:
    return {"lr": 0.05, **({"momentum": 0.9} if name == "SGD" else {})}


# --- torch.distributed.checkpoint -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("own", [{}, {"l1": 1e-4, "prox": "decoupled"}], ids=["plain", "l1"])
@pytest.mark.parametrize("name", NAMES)
def test_a_distributed_checkpoint_of_torchs_optimizer_goes_on_here(
    tmp_path: Path, name: str, own: dict[str, Any], flat: bool
) -> None:
    model = net()
    theirs = getattr(torch.optim, name)(model.parameters(), **options_of(name))
    trained(model, theirs)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.save(
        {"o": get_optimizer_state_dict(model, theirs, options=options)}, checkpoint_id=tmp_path
    )

    model.zero_grad()
    ours = getattr(optim, name)(model.parameters(), **{**options_of(name), "lr": 0.5}, **own)
    states = {"o": get_optimizer_state_dict(model, ours, options=options)}
    dcp.load(states, checkpoint_id=tmp_path, planner=optim.load_planner())
    set_optimizer_state_dict(model, ours, states["o"], options=options)
    group = ours.param_groups[0]
    assert group["lr"] == 0.05
    assert {key: group[key] for key in own} == own
    for p in model.parameters():
        for key, value in theirs.state[p].items():
            assert torch.equal(ours.state[p][key], value), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "FTRL", "Lion", "LAMB"])
def test_a_distributed_checkpoint_of_an_older_fusereg_goes_on_here(
    tmp_path: Path, name: str, flat: bool
) -> None:
    """Saved when some, or all, arguments of fusereg's own were not known yet."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = net()
    old = getattr(optim, name)(model.parameters(), lr=0.05, l1=1e-3)
    trained(model, old)
    whole = get_optimizer_state_dict(model, old, options=options)
    own = sorted(set(OWN) & set(old.param_groups[0]))
    assert "l1" in own
    for unknown in (own, ["l1"], own[::2]):
        state: Any = copy.deepcopy(whole)
        if flat:
            for key in [k for k in state if k.rpartition(".")[2] in unknown]:
                del state[key]
        else:
            for group in state["param_groups"]:
                for key in unknown:
                    del group[key]
        path = tmp_path / "-".join(unknown)
        dcp.save({"o": state}, checkpoint_id=path)
        model.zero_grad()
        new = getattr(optim, name)(model.parameters(), lr=0.5, l1=2e-3)
        states = {"o": get_optimizer_state_dict(model, new, options=options)}
        with pytest.raises(dcp.api.CheckpointException, match="Missing key"):
            dcp.load(copy.deepcopy(states), checkpoint_id=path)
        dcp.load(states, checkpoint_id=path, planner=optim.load_planner())
        set_optimizer_state_dict(model, new, states["o"], options=options)
        group = new.param_groups[0]
        assert (group["lr"], group["l1"]) == (0.05, 2e-3 if "l1" in unknown else 1e-3)
        for p in model.parameters():
            for key, value in old.state[p].items():
                assert torch.equal(new.state[p][key], value), key


def test_the_planner_lets_nothing_else_be_missing(tmp_path: Path) -> None:
    dcp.save({"o": {"param_groups": {"0": {"lr": 1.0}}}}, checkpoint_id=tmp_path)
    wanted: dict[str, Any] = {"o": {"param_groups": {"0": {"lr": 0.0, "l1": 2.0}}}}
    dcp.load(wanted, checkpoint_id=tmp_path, planner=optim.load_planner())
    assert wanted["o"]["param_groups"]["0"] == {"lr": 1.0, "l1": 2.0}
    for missing in ({"o": {"param_groups": {"0": {"eps": 0.0}}}}, {"o": {"l1": 0.0}}):
        with pytest.raises(
            dcp.api.CheckpointException, match="Missing key in checkpoint state_dict"
        ):
            dcp.load(missing, checkpoint_id=tmp_path, planner=optim.load_planner())


# --- hooks of load_state_dict ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "replaced before", "after"])
def test_what_a_load_hook_changes_stays(dtype: torch.dtype, when: str) -> None:
    model = net().to(dtype)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, master_weights=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())

    def set_to_three(states: Any) -> None:
        for s in states:
            s["exp_avg"] = torch.full_like(s["exp_avg"], 3.0)

    def before(_: Any, given: dict[str, Any]) -> dict[str, Any] | None:
        if when == "before":
            set_to_three(given["state"].values())
            return None
        other = copy.deepcopy(given)
        set_to_three(other["state"].values())
        return other

    if when == "after":
        optimizer.register_load_state_dict_post_hook(lambda o: set_to_three(o.state.values()))
    else:
        optimizer.register_load_state_dict_pre_hook(before)
    optimizer.load_state_dict(state)
    for p in model.parameters():
        assert (optimizer.state[p]["exp_avg"] == 3.0).all()
        assert optimizer.state[p]["exp_avg_sq"].dtype is torch.float32
    optimizer.load_state_dict(state)  # the hooks of a call go with it
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == (when != "after")
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == (when == "after")


# --- keys of param groups -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "wanted"),
    [
        ("AdamW", "l1_strength", "l1"),
        ("AdamW", "L1", "l1"),
        ("AdamW", "l2_reg", "l2"),
        ("AdamW", "l1_lambda", "l1"),
        ("AdamW", "lambda_l1", "l1"),
        ("AdamW", "weightdecay", "weight_decay"),
        ("AdamW", "weigth_decay", "weight_decay"),
        ("AdamW", "weight-decay", "weight_decay"),
        ("SGD", "wd", "weight_decay"),
        ("SGD", "group_lasso", "group"),
        ("SGD", "learning_rate", "lr"),
        ("SGD", "lasso", "l1"),
        ("SGD", "regularization", "l1 or l2"),
        ("SGD", "momentun", "momentum"),
        ("Adagrad", "masterweights", "master_weights"),
        ("FTRL", "l1_strength", "l1"),
    ],
)
def test_a_key_that_looks_like_a_strength_is_an_error(name: str, key: str, wanted: str) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean {wanted}\\?"):
        getattr(optim, name)([{"params": [p], key: 0.1}], lr=0.1)
    optimizer = getattr(optim, name)([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="did you mean"):
        optimizer.add_param_group({"params": [p], key: 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "key",
    ["name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr",
     "lr_scale", "lr_mult", "layer_id", "group_name", "layer_names",
     "use_muon", "no_decay", "label", "id"],
)  # fmt: skip
@pytest.mark.parametrize("name", [*NAMES, "FTRL"])
def test_keys_of_users_and_schedulers_are_let_be(name: str, key: str) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = getattr(optim, name)([{"params": [p], key: 0.1}], lr=0.1)
    assert optimizer.param_groups[0][key] == 0.1


# --- steps that a GradScaler skips ----------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    ],
    ids=["fusereg", "torch", "torch fused"],
)
def test_an_attached_schedule_does_not_count_a_skipped_step(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())
    penalty = fusereg.WeightPenalty(model, l1=0.1, schedule=lambda step: float(step))
    penalty.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted = []
    for overflows in (False, True, True, False):
        optimizer.zero_grad()
        loss = model(torch.ones(5, 3)).square().mean() * (torch.inf if overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        counted.append(penalty.steps)
    assert counted == [1, 1, 1, 2]


# --- schedules of strengths -----------------------------------------------------------------------


def test_a_schedule_multiplies_the_strengths_of_each_group() -> None:
    model = net()
    number, tensor = (p for p in model.parameters() if p.dim() == 2)
    groups = [{"params": [number], "l1": 0.4}, {"params": [tensor], "l1": torch.tensor(0.8)}]
    optimizer = optim.AdamW(groups, lr=0.1, l2=0.2)
    live = optimizer.param_groups[1]["l1"]
    schedule = optim.StrengthScheduler(optimizer, lambda t: t / 4)
    seen = []
    for _ in range(3):
        seen.append([float(g[k]) for g in optimizer.param_groups for k in ("l1", "l2")])
        schedule.step()
    wanted = [[0.4 * f, 0.2 * f, 0.8 * f, 0.2 * f] for f in (0.0, 0.25, 0.5)]
    assert torch.allclose(torch.tensor(seen), torch.tensor(wanted))
    assert optimizer.param_groups[1]["l1"] is live
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "l1": 1.0})
    schedule.step()
    assert optimizer.param_groups[2]["l1"] == 1.0


def test_a_schedule_goes_on_after_loading() -> None:
    def make() -> tuple[Any, Any]:
        optimizer = optim.SGD(net().parameters(), lr=0.1, l1=0.5)
        return optimizer, optim.StrengthScheduler(optimizer, [lambda t: 0.5**t], names="l1")

    optimizer, schedule = make()
    for _ in range(2):
        schedule.step()
    again, other = make()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    assert again.param_groups[0]["l1"] == 0.125
    other.step()
    assert (again.param_groups[0]["l1"], other.steps) == (0.0625, 3)


def test_a_state_of_other_groups_or_names_is_refused() -> None:
    optimizer = optim.SGD(net().parameters(), lr=0.1, l1=0.5)
    schedule = optim.StrengthScheduler(optimizer, lambda t: 0.5**t)
    own = copy.deepcopy(schedule.state_dict())
    fewer = optim.StrengthScheduler(optimizer, lambda t: 1.0, names="l1").state_dict()
    optimizer.param_groups[0]["l1"] = 0.5
    for other in (fewer, {**own, "strengths": own["strengths"] * 2}):
        with pytest.raises(ValueError, match=r"the state has \d param groups with"):
            schedule.load_state_dict(other)
    assert schedule.state_dict() == own
    assert optimizer.param_groups[0]["l1"] == 0.5


def test_a_schedule_looks_through_a_wrapper() -> None:
    pytest.importorskip("other_libraries")
    accelerate = pytest.importorskip("accelerate")
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, l1=0.5)
    _, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    optim.StrengthScheduler(wrapped, lambda t: 0.5)
    assert optimizer.param_groups[0]["l1"] == 0.25


def test_the_value_falls_to_zero_with_the_strengths() -> None:
    model = net()
    optimizer = optim.AdamW(model.parameters(), lr=0.1, l1=0.5)
    schedule = optim.StrengthScheduler(optimizer, lambda t: float(t < 1))
    trained(model, optimizer, 1)
    assert optimizer.penalty_value > 0
    schedule.step()
    trained(model, optimizer, 1)
    assert optimizer.penalty_value == 0


@pytest.mark.parametrize(
    ("optimizer", "arguments", "message"),
    [
        (torch.optim.AdamW, {"factor": float}, "AdamW of torch.optim.adamw has no l1"),
        (optim.AdamW, {"factor": 0.5}, "factor must be callable"),
        (optim.AdamW, {"factor": [float, float]}, r"one function or 1 of them .* got 2"),
        (optim.AdamW, {"factor": float, "names": ("lr",)}, "names must be among l1, l2, group"),
        (optim.AdamW, {"factor": lambda _: -1.0}, r"factor\(0\) must be finite and not negative"),
    ],
)
def test_a_schedule_says_what_is_wrong(optimizer: Any, arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optim.StrengthScheduler(optimizer(net().parameters(), lr=0.1), **arguments)


# --- other default dtypes -------------------------------------------------------------------------


@pytest.fixture
def double_by_default() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_as_the_default_dtype(
    double_by_default: None, name: str, dtype: torch.dtype
) -> None:
    model, other = net().to(dtype), net().to(dtype)
    ours = getattr(optim, name)(model.parameters(), **options_of(name), l1=0.0)
    theirs = getattr(torch.optim, name)(other.parameters(), **options_of(name))
    assert ours.penalty_value.dtype is torch.float32
    for turn in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.full_like(p, turn - 0.5)
            q.grad = torch.full_like(q, turn - 0.5)
        ours.step()
        theirs.step()
        if turn == 1:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        for key, value in theirs.state[q].items():
            assert isinstance(value, Tensor)
            assert ours.state[p][key].dtype is value.dtype, key
            torch.testing.assert_close(ours.state[p][key], value)
