"""The optimizers as torch's: state dicts, loops, scalers, schedulers; and what L1 is for."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg import optim
from fusereg.optim.optimizer import RegularizedOptimizer

PAIRS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "NAdam": {"lr": 0.01},
}
OWN: dict[str, dict[str, Any]] = {
    **PAIRS,
    "FTRL": {"lr": 0.1},
    "Lion": {"lr": 0.01},
    "LAMB": {"lr": 0.01},
}


def make(name: str, params: list[Tensor], **options: Any) -> RegularizedOptimizer:
    return getattr(optim, name)(params, **OWN[name], **options)  # type: ignore[no-any-return]


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]


def copies(params: list[Tensor]) -> list[Tensor]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_grads(params: list[Tensor], *others: list[Tensor]) -> None:
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape).to(p.dtype)
        for other in others:
            other[i].grad = p.grad.clone()


def assert_same(a: list[Tensor], b: list[Tensor], atol: float = 0.0) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=atol)


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.parametrize("to_torch", [True, False])
def test_a_state_dict_of_one_goes_on_in_the_other(name: str, to_torch: bool) -> None:
    ours = params_of((5, 7), (33,))
    theirs = copies(ours)
    own = make(name, ours)
    other = getattr(torch.optim, name)(theirs, **PAIRS[name])
    source, target = (own, other) if to_torch else (other, own)
    source_params, target_params = (ours, theirs) if to_torch else (theirs, ours)
    for _ in range(3):
        give_grads(source_params)
        source.step()
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for p, q in zip(source_params, target_params, strict=True):
            q.copy_(p)
    for _ in range(3):
        give_grads(ours, theirs)
        own.step()
        other.step()
    assert_same(ours, theirs, 1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert own.state[p].keys() == other.state[q].keys()


def test_torchs_state_dict_leaves_the_penalty_as_it_is() -> None:
    ours = params_of((5, 7))
    theirs = copies(ours)
    own = make("AdamW", ours, l1=0.1, prox="preconditioned")
    own.load_state_dict(torch.optim.AdamW(theirs, lr=0.5).state_dict())
    group = own.param_groups[0]
    assert (group["lr"], group["l1"], group["prox"]) == (0.5, 0.1, "preconditioned")


@pytest.mark.parametrize("name", list(OWN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_resumed_in_the_middle_the_bits_are_the_same(
    name: str, dtype: torch.dtype, how: str
) -> None:
    options = {"l1": 0.01, "master_weights": dtype is torch.bfloat16}
    params = params_of((5, 7), (600,), dtype=dtype)
    first = make(name, params, **options)
    grads = [[torch.randn(p.shape).to(dtype) for p in params] for _ in range(6)]

    def steps(optimizer: RegularizedOptimizer, some: list[list[Tensor]]) -> None:
        for turn in some:
            for p, g in zip(optimizer.param_groups[0]["params"], turn, strict=True):
                p.grad = g.clone()
            optimizer.step()

    steps(first, grads[:3])
    if how == "state_dict":
        buffer = io.BytesIO()
        torch.save({"o": first.state_dict(), "p": params}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        second = make(name, loaded["p"], **options)
        second.load_state_dict(loaded["o"])
    else:
        second = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    steps(first, grads[3:])
    steps(second, grads[3:])
    assert_same(params, second.param_groups[0]["params"])
    assert torch.equal(first.penalty_value, second.penalty_value)


def test_states_that_were_replaced_or_cleared_are_seen() -> None:
    for change in (
        lambda o, p: o.state.clear(),
        lambda o, p: o.state.pop(p),
        lambda o, p: o.state.__setitem__(p, {}),
        lambda o, p: o.state[p].clear(),
        lambda o, p: setattr(o, "state", type(torch.optim.SGD([p]).state)(dict)),
        lambda o, p: o.state[p].update(exp_avg=torch.zeros(4), step=torch.zeros(())),
    ):
        (p,) = params_of((4,))
        optimizer = make("AdamW", [p])
        for _ in range(2):
            give_grads([p])
            optimizer.step()
        change(optimizer, p)
        give_grads([p])
        optimizer.step()
        assert float(optimizer.state[p]["step"]) == 1.0
        assert p.grad is not None
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * p.grad)


# --- loops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 3.5])
def test_closures(result: float | None) -> None:
    (p,) = params_of((4,))
    optimizer = make("SGD", [p])

    def closure() -> float | None:
        assert torch.is_grad_enabled()
        p.grad = torch.ones_like(p)
        return result

    with torch.no_grad():
        assert optimizer.step(closure) == result


def test_parameters_without_a_gradient_stay() -> None:
    a, b = params_of((4,), (4,))
    before = b.detach().clone()
    optimizer = make("AdamW", [a, b], l1=0.1)
    give_grads([a])
    value = 0.1 * float(a.detach().abs().sum())
    optimizer.step()
    assert torch.equal(b, before)
    assert b not in optimizer.state
    assert float(optimizer.penalty_value) == pytest.approx(value, rel=1e-6)
    a.grad = None
    optimizer.step()
    give_grads([b])
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (a, b)] == [1.0, 1.0]


@pytest.mark.parametrize("name", list(OWN))
def test_an_optimizer_for_each_parameter_steps_within_backward(name: str) -> None:
    """``register_post_accumulate_grad_hook``: with the bits of one optimizer after backward."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    same = copy.deepcopy(model)
    whole = make(name, list(same.parameters()), l1=0.01)
    own = {p: make(name, [p], l1=0.01) for p in model.parameters()}

    def step(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        x = torch.randn(5, 3)
        model(x).square().mean().backward()
        whole.zero_grad()
        same(x).square().mean().backward()
        whole.step()
    assert_same(list(model.parameters()), list(same.parameters()))


def test_a_group_may_join_later_and_parameters_may_be_exchanged() -> None:
    a, b = params_of((4,), (5,))
    optimizer = make("AdamW", [a])
    give_grads([a])
    optimizer.step()
    optimizer.add_param_group({"params": [b], "l1": 1e3, "prox": "decoupled"})
    give_grads([a, b])
    optimizer.step()
    assert bool((b == 0).all())
    (c,) = params_of((4,))
    optimizer.param_groups[0]["params"][0] = c
    before = a.detach().clone()
    give_grads([a, c])
    optimizer.step()
    assert torch.equal(a, before)
    assert float(optimizer.state[c]["step"]) == 1.0


def test_a_step_is_seen_by_autograd() -> None:
    (p,) = params_of((4,))
    loss = p.square().sum()
    optimizer = make("SGD", [p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "FTRL"])
def test_sparse_gradients(name: str) -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    same = copies([embedding.weight])[0]
    embedding(torch.tensor([1, 4, 1])).square().sum().backward()
    assert embedding.weight.grad is not None
    dense = embedding.weight.grad.to_dense()
    options = {} if name == "FTRL" else {"lr": 0.1}
    getattr(optim, name)([embedding.weight], **options).step()
    if name == "FTRL":
        same.grad = dense
        optim.FTRL([same]).step()
    else:
        same.grad = dense.to_sparse()
        getattr(torch.optim, name)([same], lr=0.1).step()
    assert_same([embedding.weight], [same], 1e-6)


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("SGD", "Adagrad", "FTRL")])
def test_the_others_refuse_sparse_gradients_as_torchs_do(name: str) -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=rf"{name}: params\[0\].grad is sparse.*SparseAdam"):
        make(name, [embedding.weight]).step()
    if name in PAIRS:
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            getattr(torch.optim, name)([embedding.weight], **PAIRS[name]).step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(overflow: bool, unscale_first: bool) -> None:
    ours = params_of((5, 7))
    theirs = copies(ours)
    own, other = make("AdamW", ours), torch.optim.AdamW(theirs, lr=0.01)
    for params, optimizer in ((ours, own), (theirs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for turn in range(2):
            optimizer.zero_grad()
            loss = (params[0] - 2.0).square().sum()
            if overflow and turn == 0:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_same(ours, theirs, 1e-6)
    assert float(own.state[ours[0]]["step"]) == (1.0 if overflow else 2.0)


def test_a_scheduler_drives_the_rate_and_a_strength_may_follow() -> None:
    ours = params_of((5, 7))
    theirs = copies(ours)
    own, other = make("SGD", ours), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (own, other)]
    for _ in range(3):
        give_grads(ours, theirs)
        own.step()
        other.step()
        for schedule in schedules:
            schedule.step()
    assert_same(ours, theirs, 1e-6)
    own.param_groups[0]["l1"] = 1e4
    give_grads(ours)
    own.step()
    assert fusereg.sparsity(ours) == 1.0


def test_a_compiled_loop_steps_too() -> None:
    torch._dynamo.reset()
    (p,) = params_of((4,))
    (q,) = copies([p])
    own, other = make("AdamW", [p]), torch.optim.AdamW([q], lr=0.01)

    @torch.compile(backend="eager")
    def train() -> None:
        (p * p).sum().backward()
        own.step()

    train()
    (q * q).sum().backward()
    other.step()
    assert_same([p], [q], 1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
def test_clipping_is_an_operator_in_compiled_code(norm_type: float) -> None:
    """The same bits as without; of a parameter that is listed twice the gradient counts once."""
    torch._dynamo.reset()
    ours = params_of((5, 7), (40,), (3, 2, 4))
    theirs = copies(ours)
    give_grads(ours)
    ours[2].grad = torch.randn(4, 2, 3).permute(2, 1, 0)  # laid out unlike its parameter
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def clip(params: list[Tensor]) -> tuple[Tensor, Tensor]:
        norm = optim.clip_grad_norm_([*params, params[0]], 0.1, norm_type)
        return norm, optim.get_total_norm([p.grad for p in params], norm_type)

    found, after = clip(ours)
    assert torch.equal(found, optim.clip_grad_norm_(theirs, 0.1, norm_type))
    assert torch.equal(after, optim.get_total_norm([q.grad for q in theirs], norm_type))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad, q.grad)


def test_other_norms_and_checks_break_the_graph() -> None:
    torch._dynamo.reset()
    ours = params_of((5, 7))
    give_grads(ours)

    @torch.compile(backend="aot_eager")
    def clip() -> Tensor:
        return optim.clip_grad_norm_(ours, 0.1, 3.0) + optim.clip_grad_norm_(
            ours, 1.0, error_if_nonfinite=True
        )

    wanted = torch.nn.utils.get_total_norm([p.grad for p in ours], 3.0)
    assert float(clip()) > float(wanted)


def test_norms_in_the_step_are_those_of_clip_grad_norm() -> None:
    ours = params_of((5, 7), (40,), dtype=torch.float64)
    optimizer = make("SGD", ours, max_grad_norm=0.1)
    give_grads(ours)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in ours if p.grad is not None])
    optimizer.step()
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(optimizer.grad_norm, wanted)


# --- param groups ---------------------------------------------------------------------------------


def test_param_groups_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    decay, rest = optim.param_groups_weight_decay(model, 0.01, l1=0.1, lr=0.5)
    assert [id(p) for p in decay["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert len(rest["params"]) == 4
    assert (decay["weight_decay"], decay["l1"], decay["lr"]) == (0.01, 0.1, 0.5)
    assert (rest["weight_decay"], rest["l1"], rest["lr"]) == (0.0, 0.0, 0.5)
    (everything,) = optim.param_groups_weight_decay(model, 0.01, exclude=())
    assert len(everything["params"]) == 6
    torch.optim.AdamW([decay, rest])
    optim.AdamW([decay, rest])
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert [len(g["params"]) for g in optim.param_groups_weight_decay(tied, 0.01)] == [1, 2]
    with pytest.raises(ValueError, match="matches head"):
        optim.param_groups_weight_decay(model, 0.01, exclude="head*")


# --- errors ---------------------------------------------------------------------------------------

BAD_ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("AdamW", {"l1": -1.0}, "fusereg.optim.AdamW: l1 must be finite and not negative, got -1.0"),
    ("AdamW", {"l2": float("nan")}, "l2 must be finite"),
    ("AdamW", {"l1": "1"}, "l1 must be a number or a tensor, got str"),
    ("SGD", {"l1": torch.ones(2)}, "l1 must be one number, got a tensor of 2"),
    ("SGD", {"l1": torch.tensor(-1.0)}, "l1 must be not negative, got -1.0"),
    ("AdamW", {"group": torch.tensor(math.nan)}, "group must be not negative, got nan"),
    ("SGD", {"prox": "sometimes"}, "prox must be True, False, 'capped', 'decoupled' or 'pre"),
    ("Lion", {"group": 0.1, "prox": "preconditioned"}, "group cannot go with"),
    ("Lion", {"group": 0.1, "prox": "capped"}, "group cannot go with prox='capped'"),
    ("SGD", {"momentum": 1.0, "l1": 0.1}, "prox=True needs momentum < 1, got 1.0"),
    ("Adam", {"lr": -0.1}, "fusereg.optim.Adam: lr must be not negative, got -0.1"),
    ("Adam", {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1.0\), got 1.0"),
    ("Adagrad", {"lr_decay": -1.0}, "lr_decay must be not negative"),
    ("FTRL", {"beta": 0.0}, "beta must be > 0"),
    ("SGD", {"max_grad_norm": 0.0}, "max_grad_norm must be > 0 or None"),
    ("SGD", {"differentiable": True}, "differentiable=True is not supported"),
    ("SGD", {"momentum": 1.0, "prox": "preconditioned"}, "needs momentum < 1, got 1.0"),
    ("SGD", {"nesterov": True}, "Nesterov momentum requires"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(optim, name)(params_of((3,)), **options)


@pytest.mark.parametrize("name", list(OWN))
def test_what_only_torchs_optimizer_does_names_it_if_there_is_one(name: str) -> None:
    says = rf"; use torch\.optim\.{name}$" if name in PAIRS else r"^(?!.*torch\.optim)"
    with pytest.raises(ValueError, match=says):
        make(name, params_of((3,)), differentiable=True)
    with pytest.raises(ValueError, match=says) as caught:
        make(name, complex_parameter()).step()
    assert "complex parameters" in str(caught.value)


@pytest.mark.parametrize("name", list(OWN))
def test_the_shared_arguments_are_in_the_signature(name: str) -> None:
    optimizer = getattr(optim, name)
    parameters = inspect.signature(optimizer).parameters
    assert "options" not in parameters
    assert ("prox" in parameters) == (name != "FTRL")
    made = optimizer(params_of((3,)))
    for argument in ("l1", "l2", "master_weights", "maximize", "foreach", "fused"):
        default = parameters[argument].default
        assert made.defaults[argument] == default, argument
        given = optimizer(params_of((3,)), **{argument: 1.0 if default == 0.0 else default})
        assert given.defaults[argument] in (default, 1.0)
    with pytest.raises(TypeError, match=f"optim.{name}: unknown argument 'lrate'"):
        optimizer(params_of((3,)), lrate=0.1)


def test_ftrl_has_no_group_and_no_prox() -> None:
    for options in ({"group": 0.0}, {"prox": True}):
        with pytest.raises(TypeError, match=r"optim.FTRL: unknown argument '(group|prox)'"):
            optim.FTRL(params_of((3,)), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("l1", -1.0, "l1 must be finite and not negative, got -1.0"),
        ("l2", "1", "l2 must be a number"),
        ("group", float("inf"), "group must be finite"),
        ("prox", "never", "prox must be True"),
        ("momentum", 1.0, "needs momentum < 1, got 1.0"),
    ],
)
def test_an_argument_that_is_changed_is_checked_at_the_next_step(
    key: str, value: Any, message: str
) -> None:
    first, second = params_of((3,), (2,))
    groups = [{"params": [first]}, {"params": [second], "l1": 0.1}]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.5, prox="preconditioned")
    for _ in range(2):
        give_grads([first, second])
        optimizer.step()
    before = [p.detach().clone() for p in (first, second)]
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = value
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.step()
    assert_same(before, [first.detach(), second.detach()])
    optimizer.param_groups[1][key] = good
    optimizer.step()


def complex_parameter() -> list[Tensor]:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    return [p]


def overlapping() -> list[Tensor]:
    memory = torch.ones(6)
    found = [memory[:4].requires_grad_(), memory[2:].requires_grad_()]
    for p in found:
        p.grad = torch.ones(4)
    return found


def expanded() -> list[Tensor]:
    p = torch.ones(1).expand(4).requires_grad_()
    p.grad = torch.ones(4)
    return [p]


@pytest.mark.parametrize(
    ("make_params", "message"),
    [
        (overlapping, r"params\[0\] and params\[1\] share memory"),
        (expanded, r"params\[0\] has several elements at one place in memory"),
    ],
)
def test_what_cannot_be_stepped_is_named(
    make_params: Callable[[], list[Tensor]], message: str
) -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        optim.AdamW(params).step()
    assert_same(before, [p.detach() for p in params])


def test_a_state_of_another_shape_is_named() -> None:
    (p,) = params_of((4,))
    optimizer = make("AdamW", [p])
    give_grads([p])
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"the state exp_avg must have its parameter's shape"):
        optimizer.step()


def test_clipping_refuses_what_torch_refuses() -> None:
    (p,) = params_of((3,))
    p.grad = torch.tensor([1.0, torch.inf, 0.0])
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert p.grad.tolist() == [1.0, torch.inf, 0.0]
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        optim.clip_grad_norm_([p], -1.0)
    with pytest.raises(TypeError, match="params must be a Tensor"):
        optim.clip_grad_norm_(3, 1.0)  # type: ignore[arg-type]


# --- what it is for -------------------------------------------------------------------------------


def lasso_problem() -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(200, 40, dtype=torch.float64, generator=generator)
    w = torch.zeros(40, dtype=torch.float64)
    w[[3, 11, 20, 38]] = torch.tensor([2.0, -1.5, 0.7, 3.0], dtype=torch.float64)
    noise = 0.3 * torch.randn(200, dtype=torch.float64, generator=generator)
    return x, x @ w + noise, 0.1


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("SGD", {"lr": 0.5}, 400),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "prox": "preconditioned"}, 600),
        ("Adam", {"lr": 0.05, "prox": "preconditioned", "betas": (0.9, 0.9999)}, 4000),
        ("Adagrad", {"lr": 0.5, "prox": "preconditioned"}, 3000),
    ],
)
def test_the_lasso_of_scikit_learn(name: str, options: dict[str, Any], steps: int) -> None:
    """The same objective, the same support, the same coefficients."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, alpha = lasso_problem()
    lasso = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=100_000)
    wanted = torch.from_numpy(lasso.fit(x.numpy(), y.numpy()).coef_)
    w = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = getattr(optim, name)([w], l1=alpha, **options)

    def smooth() -> Tensor:
        return (x @ w - y).square().sum() / (2 * len(y))

    for _ in range(steps):
        optimizer.zero_grad()
        smooth().backward()
        optimizer.step()

    support = torch.from_numpy(np.asarray(lasso.coef_ != 0.0))
    assert int(support.sum()) == 4
    assert torch.equal(w.detach() != 0.0, support)
    torch.testing.assert_close(w.detach(), wanted, rtol=0.0, atol=1e-6)
    best = (x @ wanted - y).square().sum() / (2 * len(y)) + alpha * wanted.abs().sum()
    objective = smooth().detach() + alpha * w.detach().abs().sum()
    assert float(objective - best) == pytest.approx(0.0, abs=1e-10)


def test_a_subgradient_never_gives_zeros() -> None:
    """Why there is prox."""
    x, y, alpha = lasso_problem()
    for prox, zeros in ((False, 0.0), (True, 0.9)):
        w = nn.Parameter(torch.full((40,), 0.1, dtype=torch.float64))
        optimizer = optim.SGD([w], lr=0.1, l1=alpha, prox=prox)
        for _ in range(300):
            optimizer.zero_grad()
            ((x @ w - y).square().sum() / (2 * len(y))).backward()
            optimizer.step()
        assert fusereg.sparsity(w) == zeros


def test_ftrl_learns_from_single_examples_and_keeps_most_weights_zero() -> None:
    x, y, _ = lasso_problem()
    w = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = optim.FTRL([w], lr=0.3, l1=100.0)
    for _ in range(3):
        for row, target in zip(x, y, strict=True):
            w.grad = (row @ w.detach() - target) * row
            optimizer.step()
    assert {3, 11, 20, 38} <= set(w.detach().nonzero().flatten().tolist())
    assert fusereg.sparsity(w) >= 0.6
    assert float((x @ w.detach() - y).square().mean()) < 0.2 * float(y.square().mean())


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_ftrl_rests_while_the_rate_is_zero(rate: Any) -> None:
    """A schedule's first step, and the one by which distributed checkpoints make states."""
    resting, other = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    start = resting.detach().clone()
    optimizer = optim.FTRL([{"params": [resting]}, {"params": [other], "lr": 0.1}], rate)
    first = optimizer.param_groups[0]
    first["lr"] = torch.zeros(()) if isinstance(rate, Tensor) else 0.0
    resting.grad, other.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    assert torch.equal(resting, start)
    assert torch.equal(resting.grad, torch.ones(4))
    assert (other - start).abs().max() > 0
    assert not optimizer.state[resting]["linear"].requires_grad
    first["lr"] = rate
    wanted = start.clone().requires_grad_()
    plain = optim.FTRL([wanted], rate)
    wanted.grad = torch.ones(4)
    optimizer.step()
    plain.step()
    assert_same([resting], [wanted], 1e-6)


def test_a_group_lasso_drops_whole_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(100, 12, generator=generator)
    true = torch.zeros(12, 6)
    true[[1, 7]] = torch.randn(2, 6, generator=generator) * 2
    w = nn.Parameter(0.1 * torch.randn(12, 6, generator=generator))
    optimizer = optim.SGD([w], lr=0.3, group=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        ((x @ w - x @ true).square().sum() / (2 * len(x))).backward()
        optimizer.step()
    rows = w.detach().norm(dim=1)
    assert rows.nonzero().flatten().tolist() == [1, 7]
