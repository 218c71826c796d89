"""WeightPenalty.attach: the penalty in loops that somebody else wrote."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg import WeightPenalty
from penalized_models import assert_same_parameters as assert_same
from ranks import Ranks, collect, fully_shard, on

STRENGTHS = {"l1": 0.02, "l2": 0.1, "group": 0.01}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def test_it_trains_as_the_penalty_in_the_loss_once_a_step() -> None:
    """Two micro-batches a step; the last step has one."""
    wanted = network()
    got = copy.deepcopy(wanted)
    batches = torch.randn(5, 2, 4, 6, dtype=torch.float64)
    for model, attached in ((wanted, False), (got, True)):
        optimizer, penalty = sgd(model), WeightPenalty(model, **STRENGTHS)
        if attached:
            held = penalty.attach(optimizer)
        for parts in batches:
            optimizer.zero_grad()
            for x in parts:
                (loss_of(model, x) / 2).backward()
            if not attached:
                value = penalty.penalty()
                value.backward()
            optimizer.step()
    assert_same(wanted, got)
    assert held.value is not None
    assert abs(float(held.value) - float(value.detach())) < 1e-12
    assert penalty.steps == 5
    held.remove()
    held.remove()
    optimizer.step()
    assert penalty.steps == 5


def test_a_step_without_gradients_stays_one() -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = sgd(model)
    held = WeightPenalty(model, l2=1.0).attach(optimizer)
    optimizer.step()
    assert_same(before, model, 0.0)
    assert held.value is None
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    with pytest.raises(AssertionError):
        assert_same(before, model, 0.0)


def test_each_optimizer_has_its_own_parameters_and_one_counts() -> None:
    model = network()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model)
    first, last = sgd(model[0]), sgd(model[3])
    penalty = WeightPenalty(model, l2=1.0)
    held = penalty.attach(first)
    penalty.attach(last, count_steps=False)
    first.step()
    assert torch.equal(model[3].weight, before[3].weight)
    assert float(held.value) == pytest.approx(float(before[0].weight.square().sum()) / 2)
    last.step()
    assert torch.allclose(model[0].weight, before[0].weight * 0.9)
    assert torch.allclose(model[3].weight, before[3].weight * 0.9)
    assert penalty.steps == 1
    with pytest.raises(ValueError, match="this one would count twice"):
        penalty.step()
    held.remove()
    penalty.step()
    assert penalty.steps == 2


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_answered_with_the_sum(by_name: bool) -> None:
    """LBFGS calls it several times in a step and compares the values."""
    wanted = network()
    got = copy.deepcopy(wanted)
    x = torch.randn(16, 6, dtype=torch.float64)
    for model, attached in ((wanted, False), (got, True)):
        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        penalty = WeightPenalty(model, l2=0.1)
        if attached:
            penalty.attach(optimizer)

        def closure(
            model: nn.Module = model,
            optimizer: Any = optimizer,
            term: Callable[[], Tensor] | None = None if attached else penalty.penalty,
        ) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss = loss if term is None else loss + term()
            loss.backward()
            return loss

        for _ in range(3):
            if by_name:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
    assert_same(wanted, got, 1e-9)


@pytest.mark.parametrize("answer", [None, 0.5])
def test_a_closure_may_answer_with_a_number_or_nothing(answer: float | None) -> None:
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    held = WeightPenalty(model, l2=1.0).attach(optimizer)

    def closure() -> float | None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return answer

    found = optimizer.step(closure)
    assert held.value is not None
    assert found == (None if answer is None else pytest.approx(0.5 + float(held.value)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, fusereg.optim.SGD], ids=["torch", "own"])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_grad_scaler(optimizer: Any, unscale_first: bool) -> None:
    """Torch's optimizers get unscaled gradients; fusereg's undo the scale in the step."""
    wanted = network().float()
    got = copy.deepcopy(wanted)
    x = torch.randn(8, 6)
    for model, attached in ((wanted, False), (got, True)):
        made = optimizer(model.parameters(), lr=0.1)
        penalty = WeightPenalty(model, **STRENGTHS)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        if attached:
            penalty.attach(made)
        for _ in range(3):
            made.zero_grad()
            loss = loss_of(model, x)
            scaler.scale(loss if attached else loss + penalty.penalty()).backward()
            if unscale_first:
                scaler.unscale_(made)
            scaler.step(made)
            scaler.update()
    assert_same(wanted, got, 1e-5)


class Wrapper(torch.optim.Optimizer):
    """Wrapper as Accelerate's: an optimizer by type only, which steps another one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_a_wrapper_is_looked_through_and_what_is_no_optimizer_is_refused() -> None:
    model = network()
    wrapped = Wrapper(sgd(model))
    held = WeightPenalty(model, l2=1.0).attach(wrapped)
    loss_of(model, torch.randn(4, 6, dtype=torch.float64)).backward()
    wrapped.step()
    assert held.value is not None
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Linear"):
        WeightPenalty(model, l1=1.0).attach(model[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapper], ids=["plain", "wrapped"])
def test_an_optimizer_without_a_penalized_parameter_is_refused(wrap: Callable[..., Any]) -> None:
    model = network()
    biases = torch.optim.SGD([p for n, p in model.named_parameters() if "bias" in n], lr=0.1)
    copied = sgd(copy.deepcopy(model))
    penalty = WeightPenalty(model, l1=5.0)
    for other in (copied, biases, sgd(network())):
        with pytest.raises(ValueError, match="optimizer holds no parameter that is penalized"):
            penalty.attach(wrap(other))
        assert not other._optimizer_step_pre_hooks
    penalty.attach(wrap(torch.optim.SGD([model[3].weight], lr=0.1)))
    nothing = WeightPenalty(nn.LayerNorm(3), l1=5.0)
    assert nothing.attach(wrap(copied)).value is None


def test_an_optimizer_that_was_made_before_the_weights_were_replaced_is_refused() -> None:
    model = network()
    old, penalty = sgd(model), WeightPenalty(model, l1=5.0)
    for layer in (model[0], model[3]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    penalty.refresh()
    with pytest.raises(ValueError, match="no parameter that is penalized"):
        penalty.attach(old)
    penalty.attach(sgd(model))


def test_only_some_parameters() -> None:
    model = network()
    penalty = WeightPenalty(model, l1=1.0)
    value = penalty.add_grad_(only=model[3].parameters())
    assert float(value) == pytest.approx(float(model[3].weight.abs().sum()))
    assert model[0].weight.grad is None
    assert torch.equal(model[3].weight.grad, model[3].weight.detach().sign())
    assert float(penalty.add_grad_(only=[])) == 0.0


# --- ranks ----------------------------------------------------------------------------------------


def parts(ranks: Ranks) -> tuple[Tensor, Tensor]:
    x = torch.randn(4 * ranks.world, 6, dtype=torch.float64)
    return x, x[4 * ranks.rank :][:4]


@on(2)
def ddp_averages_before_the_penalty_comes(ranks: Ranks) -> None:
    wanted = network()
    got = nn.parallel.DistributedDataParallel(copy.deepcopy(wanted))
    x, mine = parts(ranks)
    plain, other = sgd(wanted), sgd(got)
    penalty = WeightPenalty(wanted, **STRENGTHS)
    WeightPenalty(got, **STRENGTHS).attach(other)
    for _ in range(3):
        plain.zero_grad()
        other.zero_grad()
        (loss_of(wanted, x) + penalty.penalty()).backward()
        loss_of(got, mine).backward()
        plain.step()
        other.step()
    assert_same(wanted, got)


@on(2)
def fsdp_shards_take_it_too(ranks: Ranks) -> None:
    assert fully_shard is not None
    wanted = network()
    got = copy.deepcopy(wanted)
    for layer in (got[0], got[3], got):
        fully_shard(layer, mesh=ranks.mesh)
    x, mine = parts(ranks)
    plain, other = sgd(wanted), sgd(got)
    penalty = WeightPenalty(wanted, **STRENGTHS)
    held = WeightPenalty(got, **STRENGTHS).attach(other)
    for _ in range(3):
        plain.zero_grad()
        other.zero_grad()
        value = penalty.penalty()
        (loss_of(wanted, x) + value).backward()
        loss_of(got, mine).backward()
        plain.step()
        other.step()
    for p, q in zip(wanted.parameters(), got.parameters(), strict=True):
        assert torch.allclose(p, q.full_tensor(), rtol=0, atol=1e-12)
    assert (
        abs(float(held.value) - float(value.detach())) < 1e-12
    )  # the whole model's, on every rank


test_on_ranks = collect(__name__, slow=False)


def test_the_same_penalty_is_not_attached_twice_to_one_optimizer() -> None:
    model = network()
    optimizer, penalty = sgd(model), WeightPenalty(model, l2=0.1)
    attached = penalty.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        penalty.attach(optimizer)
    WeightPenalty(model, l1=0.1).attach(optimizer)  # another one
    attached.remove()
    penalty.attach(optimizer)


def test_a_second_optimizer_of_the_same_parameters_is_warned_of() -> None:
    model = network()
    first, second, penalty = sgd(model), sgd(model), WeightPenalty(model, l2=0.1)
    halves: list[torch.optim.Optimizer] = []
    attached = penalty.attach(first)
    with pytest.warns(UserWarning, match="another optimizer of some of these parameters") as seen:
        penalty.attach(second, count_steps=False).remove()
    assert seen[0].filename == __file__
    attached.remove()
    (one, *others) = model.parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty.attach(second).remove()
        for params in ([one], others):
            halves.append(torch.optim.SGD(params, lr=0.1))
            penalty.attach(halves[-1])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_optimizer_has_no_penalty_until_it_is_attached_to(how: Any) -> None:
    model = network()
    WeightPenalty(model, l2=1.0).attach(optimizer := sgd(model))
    other = how(optimizer)
    (weight, *_) = params = other.param_groups[0]["params"]
    before = weight.detach().clone()
    for p in params:
        p.grad = torch.zeros_like(p)
    other.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("only", ["all", "some", "others"])
def test_what_the_step_adds_is_not_added_by_hand_too(only: str) -> None:
    """Refused before anything is written; another optimizer's parameters may be."""
    model = network()
    first, last = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 3))
    penalty = WeightPenalty(model, l1=0.1)
    attached = penalty.attach(first)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    chosen = {"all": None, "some": model[0].parameters(), "others": model[3].parameters()}[only]
    if only == "others":
        penalty.add_grad_(only=chosen)
        last.step()
    else:
        with pytest.raises(ValueError, match=r"attached to an optimizer.*would count twice"):
            penalty.add_grad_(only=chosen)
    wanted = 0.1 * model[0].weight.detach().sign()
    first.step()
    torch.testing.assert_close(model[0].weight.grad, wanted, rtol=0.0, atol=1e-12)
    attached.remove()
    penalty.add_grad_()
    attached = penalty.attach(first)
    del first  # the optimizer is no more, though what attach() returned is
    gc.collect()
    penalty.add_grad_()
