"""Which zeros the kinds of proximal steps find, and which weights they wipe without evidence.

The problems are those of docs/scripts/zeros.py, shortened.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusereg import optim

PATH = Path(__file__).parents[1] / "docs" / "scripts" / "zeros.py"


@pytest.fixture(scope="module")
def problems() -> Any:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("zeros", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("problem", ["lasso", "logistic"])
def test_full_batches_find_exactly_the_zeros_of_scikit_learn(problems: Any, problem: str) -> None:
    found = getattr(problems, problem)(True, steps=1000 if problem == "lasso" else 3000)
    assert found.wanted > 10
    assert (found.found, found.false) == (found.wanted, 0)


@pytest.mark.parametrize(
    ("problem", "batch", "share"),
    [("lasso", 32, 0.9), pytest.param("logistic", 64, 0.7, marks=pytest.mark.slow)],
)
def test_batches_find_most_zeros_and_no_false_one(
    problems: Any, problem: str, batch: int, share: float
) -> None:
    found = getattr(problems, problem)(True, batch, steps=1500)
    assert found.found >= share * found.wanted
    assert found.false == 0


def test_no_unused_row_is_wiped_where_the_plain_metric_wipes_most(problems: Any) -> None:
    assert problems.embedding(True, steps=300)[0] == 0
    wiped, waiting = problems.embedding("preconditioned", steps=300)
    assert wiped > 0.7 * waiting


def test_no_unit_is_wiped_by_the_first_step(problems: Any) -> None:
    assert problems.perceptron(True, steps=2).wiped == 0
    assert problems.perceptron("preconditioned", steps=2).wiped > 20


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Lion"])
def test_a_weight_without_gradients_waits_and_then_goes_by_two_steps_of_the_rate(name: str) -> None:
    options: dict[str, Any] = {"betas": (0.9, 0.99)}
    if name in ("RMSprop", "Adagrad"):
        options = {}
    wait = 999 if name == "Adagrad" else 99
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = getattr(optim, name)([p], lr=0.01, l1=1e-3, **options)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    p.grad = torch.tensor([0.0, 1e-3])
    for _ in range(wait):
        optimizer.step()
    assert p[0] == 1.0
    optimizer.step()
    # A step of Lion has one size.
    assert float(p.detach()[0]) == pytest.approx(0.99 if name == "Lion" else 0.98, rel=1e-6)
    for _ in range(100):
        optimizer.step()
    assert p[0] == 0.0


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
def test_no_proximal_step_is_longer_than_two_steps_of_the_rate(name: str) -> None:
    """Of any weight, and of a row by the mean square with its metric as the weights."""
    second = {"RMSprop": "square_avg", "Adagrad": "sum"}.get(name, "exp_avg_sq")
    for strengths in ({"l1": 0.3, "l2": 0.2}, {"group": 0.3}):
        for prox in (True, "preconditioned"):
            generator = torch.Generator().manual_seed(1)
            start, g = (
                torch.randn(50, 8, generator=generator, dtype=torch.float64)
                * 10.0 ** (6 * torch.rand(50, 8, generator=generator, dtype=torch.float64) - 4)
                for _ in range(2)
            )
            ours, plain = (nn.Parameter(start.clone()) for _ in range(2))
            make = getattr(optim, name)
            own, other = make([ours], lr=0.01, prox=prox, **strengths), make([plain], lr=0.01)
            for p, optimizer in ((ours, own), (plain, other)):
                p.grad = g.clone()
                optimizer.step()
            unbiased = 1.0 if name in ("RMSprop", "Adagrad") else 1 - 0.999
            metric = (other.state[plain][second] / unbiased).sqrt()
            metric += other.param_groups[0]["eps"]
            moved = (ours - plain).detach().abs()
            if "group" in strengths:
                moved = (metric * moved).norm(dim=1) / metric.norm(dim=1)
            assert (float(moved.max()) <= 0.02 * (1 + 1e-6)) == (prox is True)


@pytest.mark.all_cases
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("l1", [0.0, 0.05], ids=["group", "sparse group"])
def test_groups_of_inputs_find_exactly_the_zeros_of_the_problem(name: str, l1: float) -> None:
    """A multi-task lasso; with l1, where scikit-learn has none, the conditions of optimality."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 12, dtype=torch.float64, generator=generator)
    x[:, :2] *= 10.0  # metrics of very different sizes
    truth = torch.zeros(12, 3, dtype=torch.float64)
    truth[[0, 3, 5]] = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    y = x @ truth + 0.3 * torch.randn(100, 3, dtype=torch.float64, generator=generator)
    w = nn.Parameter(torch.randn(3, 12, dtype=torch.float64, generator=generator))
    strength = 0.3
    options: dict[str, Any] = {"group": strength / 3**0.5, "group_dim": 1, "l1": l1}
    steps = 3000 if name == "NAdam" else 1500  # its momentum grows with the steps
    rate = 1.0 if name == "Adagrad" else 0.02
    optimizer = getattr(optim, name)([w], lr=rate, **options)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        (0.5 * (x @ w.t() - y).square().sum(1).mean()).backward()
        optimizer.step()
    assert w.grad is not None
    found, g = w.detach().t(), w.grad.t()
    zero = (found == 0).all(1)
    assert 5 < int(zero.sum()) < 12
    if not l1:
        linear_model = pytest.importorskip("sklearn.linear_model")
        theirs = linear_model.MultiTaskLasso(alpha=strength, fit_intercept=False, tol=1e-12)
        wanted = torch.from_numpy(theirs.fit(x.numpy(), y.numpy()).coef_).t()
        assert torch.equal(zero, (wanted == 0).all(1))
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=3e-3)
    # The gradient of a group at zero is not longer than the strength, after l1; of the others it
    # is the penalty's.
    left = g.sign() * (g.abs() - l1).clamp_min(0)
    assert bool((left[zero].norm(dim=1) <= strength * (1 + 1e-6)).all())
    rest = found[~zero]
    wanted = -(strength * rest / rest.norm(dim=1, keepdim=True) + l1 * rest.sign())
    inside = rest != 0
    torch.testing.assert_close(g[~zero][inside], wanted[inside], rtol=0.0, atol=2e-2)


def test_a_group_without_gradients_waits_and_then_goes_by_two_steps_of_the_rate() -> None:
    p = nn.Parameter(torch.ones(2, 40))
    optimizer = optim.Adam([p], lr=0.01, betas=(0.9, 0.99), group=1e-3)
    p.grad = torch.zeros_like(p)
    p.grad[1] = 1e-2
    for _ in range(99):
        optimizer.step()
    assert (p[0] == 1.0).all()
    optimizer.step()
    assert float(p.detach()[0, 0]) == pytest.approx(0.98, rel=1e-5)
    part = nn.Parameter(torch.ones(2, 40))
    part.grad = torch.full_like(part, 1e-2)
    part.grad[0, 7:] = 0.0
    optim.Adam([part], lr=0.01, betas=(0.9, 0.99), group=1e-3).step()
    assert (part[0, 7:] == 1.0).all()  # element by element
    assert (part[0, :7] < 0.99).all()
    wiped = nn.Parameter(torch.ones(2, 40))
    other = optim.Adam([wiped], lr=0.01, group=1e-3, prox="preconditioned")
    wiped.grad = p.grad.clone()
    other.step()
    assert (wiped[0] == 0.0).all()


def test_a_column_of_zeros_ends_as_zero_but_not_at_once(problems: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    x[:, 3] = 0.0
    y = x[:, 0] * 2
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = optim.Adam([w], lr=0.05, betas=(0.9, 0.99), l1=0.1, l2=0.1)
    for step in range(800):
        optimizer.zero_grad()
        (0.5 * (x @ w - y).square().mean()).backward()
        optimizer.step()
        if step == 0:
            assert w[3] == 1.0
    sklearn = pytest.importorskip("sklearn.linear_model")
    theirs = sklearn.ElasticNet(alpha=0.2, l1_ratio=0.5, fit_intercept=False, tol=1e-12)
    wanted = torch.from_numpy(theirs.fit(x.numpy(), y.numpy()).coef_)
    assert ((w == 0) == (wanted == 0)).all()
    torch.testing.assert_close(w.detach(), wanted, rtol=0.0, atol=1e-9)
