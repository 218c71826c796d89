"""``optimizer.step()`` in compiled code: one operator where the graph must not break."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusereg import optim
from fusereg.optim.optimizer import RegularizedOptimizer


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[[], Any], fullgraph: bool = True) -> Callable[[], Any]:
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)


def pair(
    make: Callable[[list[Tensor]], RegularizedOptimizer], dtype: torch.dtype = torch.float32
) -> tuple[RegularizedOptimizer, RegularizedOptimizer]:
    """Return the same optimizer twice, each over its own parameters."""
    params: list[Tensor] = [
        nn.Parameter(torch.randn(s, dtype=dtype)) for s in [(4,), (3, 2), (2, 3, 2, 2)]
    ]
    params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
    return make(params), make([nn.Parameter(p.detach().clone()) for p in params])


def params_of(optimizer: RegularizedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_grads(*optimizers: RegularizedOptimizer) -> None:
    for params in zip(*map(params_of, optimizers), strict=True):
        grad = torch.randn_like(params[0])
        for p in params:
            p.grad = grad.clone()


def assert_same(a: RegularizedOptimizer, b: RegularizedOptimizer) -> None:
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in b.state[q].items():
            assert value is None or torch.equal(a.state[p][key], value)
    assert torch.equal(a.penalty_value, b.penalty_value)
    assert (a.grad_norm is None) == (b.grad_norm is None)
    if a.grad_norm is not None and b.grad_norm is not None:
        assert torch.equal(a.grad_norm, b.grad_norm)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "l2": 0.1}),
    "AdamW": ("AdamW", {"l1": 0.05, "group": 0.1, "max_grad_norm": 1.0}),
    "amsgrad": ("Adam", {"lr": torch.tensor(0.1), "l1": torch.tensor(0.1), "amsgrad": True}),
    "Adagrad": ("Adagrad", {"lr": 0.1, "prox": "preconditioned", "l1": 0.1}),
    "FTRL": ("FTRL", {"lr": 0.1, "l1": 0.1}),
    "RMSprop": ("RMSprop", {"lr": 0.1, "l1": 0.1, "centered": True}),
    "NAdam": ("NAdam", {"lr": 0.1, "l1": 0.1}),
    "Lion": ("Lion", {"lr": 0.1, "l1": 0.1}),
    "LAMB": ("LAMB", {"lr": 0.1, "l1": 0.1, "max_grad_norm": 1.0}),
}


@pytest.mark.all_cases
@pytest.mark.parametrize("case", list(CASES))
def test_a_compiled_step_has_the_bits_of_the_other(case: str) -> None:
    """From the first on, without a break; numbers that change are seen."""
    name, options = CASES[case]
    ours, theirs = pair(lambda params: getattr(optim, name)(params, **options))
    step = compiled(ours.step)
    for turn in range(4):
        give_grads(ours, theirs)
        if turn >= 2:
            for optimizer in {id(o): o for o in (ours, theirs)}.values():
                optimizer.param_groups[0]["weight_decay"] += 0.1
        if turn == 3:
            step = ours.step  # eager steps go on from there
        step()
        theirs.step()
        assert_same(ours, theirs)
    assert ours.state[params_of(ours)[0]].get("step", torch.tensor(4.0)) == 4.0


def test_momentum_is_compiled_from_the_second_step_on() -> None:
    ours, theirs = pair(lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, l1=0.1))
    step = compiled(ours.step)
    give_grads(ours, theirs)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step()
    ours.step()
    theirs.step()
    for _ in range(2):
        give_grads(ours, theirs)
        step()
        theirs.step()
        assert_same(ours, theirs)


def test_groups_dtypes_and_master_weights() -> None:
    def make(params: list[Tensor]) -> RegularizedOptimizer:
        groups = [
            {"params": params[:1], "l1": 0.1},
            {"params": params[1:], "master_weights": True, "lr": 0.3, "l2": 0.5, "prox": False},
        ]
        return optim.Adam(groups, lr=0.1)

    ours, theirs = pair(make, torch.bfloat16)
    step = compiled(ours.step)
    for _ in range(3):
        give_grads(ours, theirs)
        step()
        theirs.step()
        assert_same(ours, theirs)
    assert set(ours.state[params_of(ours)[1]]) == {"step", "exp_avg", "exp_avg_sq", "master_param"}


def test_averages_are_compiled_from_the_second_step_on() -> None:
    """While each parameter has a gradient: the others are averaged outside of the graph."""
    ours, theirs = pair(lambda p: optim.AdamW(p, l1=0.1, ema_decay=torch.tensor(0.5)))
    step = compiled(ours.step)
    for turn in range(4):
        give_grads(ours, theirs)
        if turn == 3:
            for optimizer in (ours, theirs):
                params_of(optimizer)[1].grad = None
        if turn in (0, 3):
            with pytest.raises(torch._dynamo.exc.Unsupported):
                step()
            ours.step()
        else:
            step()
        theirs.step()
        assert_same(ours, theirs)


def step_scaled(optimizer: RegularizedOptimizer) -> None:
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale


CHANGES: dict[str, Callable[[RegularizedOptimizer], Any]] = {
    "loaded": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "cleared": lambda o: o.state.clear(),
    "replaced": lambda o: o.state[params_of(o)[0]].update(exp_avg=torch.ones(4)),
    "no gradient": lambda o: setattr(params_of(o)[1], "grad", None),
    "new value": lambda o: setattr(o, "penalty_value", torch.zeros(())),
    "eager": lambda o: o.step(),
    "scaled": step_scaled,
    "zeroed": lambda o: o.zero_grad(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_between_compiled_steps_are_seen(change: str) -> None:
    ours, theirs = pair(lambda params: optim.AdamW(params, lr=0.1, l1=0.05, max_grad_norm=1.0))
    step = compiled(ours.step, fullgraph=change != "scaled")
    for turn in range(4):
        give_grads(ours, theirs)
        if turn == 2:
            for optimizer in (ours, theirs):
                CHANGES[change](optimizer)
        step()
        theirs.step()
        assert_same(ours, theirs)


def sparse(optimizer: RegularizedOptimizer) -> None:
    p = params_of(optimizer)[1]
    p.grad = torch.ones_like(p).to_sparse()


def odd_layout(optimizer: RegularizedOptimizer) -> None:
    p = params_of(optimizer)[1]
    p.grad = torch.arange(6.0).view(2, 3).t()


def scaled(optimizer: RegularizedOptimizer) -> None:
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("prepare", [sparse, odd_layout, scaled])
def test_what_the_operator_cannot_take_breaks_the_graph(
    prepare: Callable[[RegularizedOptimizer], None],
) -> None:
    ours, theirs = pair(lambda params: optim.Adagrad(params, lr=0.1, l1=0.05))
    give_grads(ours, theirs)
    for optimizer in (ours, theirs):
        prepare(optimizer)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(ours.step)()
    compiled(ours.step, fullgraph=False)()
    theirs.step()
    assert_same(ours, theirs)


def test_where_it_may_the_graph_breaks() -> None:
    """So that the tensors and numbers of the optimizer are not checked before each step."""
    ours, theirs = pair(lambda params: optim.AdamW(params, lr=0.1, l1=0.05))
    graphs: list[str] = []
    first = params_of(ours)[0]

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph

    def train() -> Tensor:
        before = first + 1.0
        ours.step()
        return before * 2.0

    step = torch.compile(train, backend=backend)
    for _ in range(4):
        give_grads(ours, theirs)
        step()
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] *= 0.5
    assert_same(ours, theirs)
    assert len(graphs) == 2
    assert not any("optimizer_step_" in code for code in graphs)


def test_ftrl_rests_in_compiled_code_too() -> None:
    ours, theirs = pair(lambda params: optim.FTRL(params, lr=torch.tensor(0.1), l1=0.1))
    step = compiled(ours.step, fullgraph=False)
    for rate in (0.1, 0.0, 0.1):
        give_grads(ours, theirs)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = torch.tensor(rate)
        step()
        theirs.step()
        assert_same(ours, theirs)


def test_gradients_and_step_in_one_graph() -> None:
    ours, theirs = pair(lambda params: optim.AdamW(params, lr=0.1, l1=0.05))
    x = torch.randn(4)

    def train(optimizer: RegularizedOptimizer) -> None:
        (p, *rest) = params_of(optimizer)
        optimizer.zero_grad()
        loss = (p * x).square().sum() + sum(q.square().sum() for q in rest)
        loss.backward()
        optimizer.step()

    step = compiled(lambda: train(ours), fullgraph=False)
    for _ in range(3):
        step()
        train(theirs)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q)


def test_opcheck_of_the_step() -> None:
    params = [torch.randn(4), torch.randn(3, 2, dtype=torch.bfloat16)]
    wide = [torch.zeros(4), torch.zeros(3, 2)]
    args = (
        1,
        params,
        [torch.randn_like(p) for p in params],
        [wide[0].clone(), wide[0].clone(), wide[1].clone(), wide[1].clone()],
        [torch.zeros(()), torch.zeros(())],
        [params[1].float()],
        [torch.zeros(4)],
        [1, 1],
        [
            *(0.1, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.2, 0.0, 0.5, 0.0),
            *(0.0, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.0, 0.3, 0.0, 0.0),
        ],
        [torch.tensor(0.2)],
        [10],
        [*(1, 0, 0, 0, 1, 0, 0, 1, 0, 0), *(1, 0, 0, 0, 1, 0, 1, 0, 0, 0)],
        torch.zeros(()),
        torch.zeros(()),
        1.0,
    )
    torch.library.opcheck(torch.ops.fusereg.optimizer_step_.default, args)
