"""LassoNet's proximal step against its definition, and feature selection beside scikit-learn's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusereg

F64 = torch.float64


def objective(skip: Tensor, weight: Tensor, v: Tensor, u: Tensor, t: float, l1: float) -> Tensor:
    """What each feature's columns are to minimize."""
    near = 0.5 * ((skip - v).square().sum(0) + (weight - u).square().sum(0))
    return near + t * skip.norm(dim=0) + l1 * weight.abs().sum(0)


def by_bisection(v: Tensor, u: Tensor, t: float, m: float, l1: float) -> tuple[Tensor, Tensor]:
    """Minimize over the norm b of the skip: w = min(soft(|u|), M b) leaves a convex problem in b.

    Its derivative is b - |v| + t - M sum relu(a - M b), which grows with b.
    """
    a = (u.abs() - l1).clamp_min(0)
    norm = v.norm(dim=0)
    low, high = torch.zeros_like(norm), norm + m * a.sum(0) + 1
    for _ in range(70):
        b = (low + high) / 2
        slope = b - norm + t - m * (a - m * b).clamp_min(0).sum(0)
        low, high = torch.where(slope < 0, b, low), torch.where(slope < 0, high, b)
    b = torch.where(high < 1e-13, 0.0, high)
    direction = torch.where(norm == 0, v.shape[0] ** -0.5, v / norm)
    return b * direction, u.sign() * torch.minimum(a, m * b)


def columns(seed: int, outputs: int, hidden: int, features: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(outputs, features, generator=g, dtype=F64)
    u = torch.randn(hidden, features, generator=g, dtype=F64)
    v[:, 0] = 0  # no direction
    u[:, 1] = 0
    v[:, 2] *= 1e-3
    return v, u


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    outputs=st.integers(1, 3),
    hidden=st.integers(0, 7),
    t=st.sampled_from([0.0, 0.3, 2.0, 30.0]),
    m=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    l1=st.sampled_from([0.0, 0.2, 5.0]),
)
def test_the_hierarchical_step_is_the_minimum_that_defines_it(
    seed: int, outputs: int, hidden: int, t: float, m: float, l1: float
) -> None:
    v, u = columns(seed, outputs, hidden)
    skip, weight = v.clone(), u.clone()
    fusereg.prox.hierarchical_(skip, weight, t, m=m, l1=l1)
    wanted = by_bisection(v, u, t, m, l1)
    torch.testing.assert_close(skip, wanted[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weight, wanted[1], rtol=1e-9, atol=1e-12)
    assert not torch.signbit(torch.cat([skip, weight])[torch.cat([skip, weight]) == 0]).any()


def test_no_neighbor_that_keeps_the_hierarchy_is_better() -> None:
    """By brute force over both columns, which does not know of the formula."""
    t, m, l1 = 0.4, 2.0, 0.1
    v, u = columns(3, 2, 3)
    skip, weight = v.clone(), u.clone()
    fusereg.prox.hierarchical_(skip, weight, t, m=m, l1=l1)
    reached = objective(skip, weight, v, u, t, l1)
    g = torch.Generator().manual_seed(0)
    for scale in (1.0, 0.1, 0.01):
        for _ in range(1000):
            theta = skip + scale * torch.randn(skip.shape, generator=g, dtype=F64)
            limit = m * theta.norm(dim=0)
            w = weight + scale * torch.randn(weight.shape, generator=g, dtype=F64)
            w = torch.minimum(torch.maximum(w, -limit), limit)
            assert (objective(theta, w, v, u, t, l1) >= reached - 1e-12).all()


@pytest.mark.slow  # importing it takes long
def test_the_hierarchical_step_is_that_of_the_lassonet_package() -> None:
    lassonet = pytest.importorskip("lassonet.prox")
    for seed, outputs in ((0, 1), (1, 3)):
        v, u = columns(seed, outputs, 5)
        v[:, 0] = 0.1  # theirs leaves a column of zeros as it is
        skip, weight = v.clone(), u.clone()
        fusereg.prox.hierarchical_(skip, weight, 0.7, m=3.0, l1=0.05)
        wanted = lassonet.prox(v, u, lambda_=0.7, lambda_bar=0.05, M=3.0)
        torch.testing.assert_close((skip, weight), tuple(wanted))


def test_without_a_network_it_is_the_group_lasso_of_the_skip() -> None:
    v, u = columns(5, 4, 3)
    v[:, 0] = 0.5
    skip, weight, group = v.clone(), u.clone(), v.clone()
    fusereg.prox.hierarchical_(skip, weight, 1.0, m=0.0)
    fusereg.prox.group_lasso_(group, 1.0 / 2, dim=1)  # times the root of 4
    torch.testing.assert_close(skip, group)
    assert not weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_hierarchy_holds_in_every_dtype(dtype: torch.dtype) -> None:
    v, u = (x.to(dtype) for x in columns(2, 3, 8))
    skip, weight = v.clone(), u.clone()
    fusereg.prox.hierarchical_(skip, weight, 0.5)
    wanted = by_bisection(v.double(), u.double(), 0.5, 10.0, 0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(skip.double(), wanted[0], rtol=4 * eps, atol=eps)
    torch.testing.assert_close(weight.double(), wanted[1], rtol=4 * eps, atol=10 * eps)
    unused = (skip == 0).all(0)
    assert (weight[:, unused] == 0).all()


def test_nan_stays_nan_in_its_feature_alone() -> None:
    v, u = columns(1, 2, 3)
    v[0, 3] = torch.nan
    u[1, 4] = torch.nan
    fusereg.prox.hierarchical_(v, u, 0.1)
    assert v.isnan().any(0).tolist() == [False, False, False, True, True, False]
    assert u.isnan().any(0).tolist() == [False, False, False, True, True, False]


def test_the_hierarchical_step_writes_any_layout_and_takes_no_features() -> None:
    v, u = columns(4, 3, 5)
    skip, weight = v.T.contiguous().T, torch.zeros(10, 6, dtype=F64)[::2].copy_(u)
    assert not skip.is_contiguous()
    fusereg.prox.hierarchical_(skip, weight, 0.3)
    fusereg.prox.hierarchical_(v, u, 0.3)
    assert torch.equal(skip, v)
    assert torch.equal(weight, u)
    fusereg.prox.hierarchical_(torch.ones(2, 0), torch.ones(3, 0), 0.1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"threshold": -1.0}, ValueError, "threshold must be finite and not negative, got -1.0"),
        ({"threshold": torch.ones(())}, TypeError, "threshold must be a number, got Tensor"),
        ({"m": float("inf")}, ValueError, "m must be finite"),
        ({"l1": float("nan")}, ValueError, "l1 must be finite"),
        ({"skip": torch.ones(4)}, ValueError, "skip must have 2 dimensions"),
        ({"skip": torch.ones(2, 5)}, ValueError, "as many features as skip, 5, got 4"),
        ({"skip": torch.ones(2, 4, dtype=F64)}, ValueError, "skip's dtype"),
        ({"skip": torch.ones(2, 1).expand(2, 4)}, ValueError, "clone"),
        ({"skip": [1.0]}, TypeError, "skip must be a torch.Tensor"),
    ],
)
def test_bad_arguments_change_nothing(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    weight = torch.ones(3, 4)
    arguments = {"skip": torch.ones(2, 4), "weight": weight, "threshold": 0.1, **change}
    with pytest.raises(error, match=text):
        fusereg.prox.hierarchical_(**arguments)  # type: ignore[arg-type]
    assert torch.equal(weight, torch.ones(3, 4))


# --- selection ------------------------------------------------------------------------------------

needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)


def diabetes() -> tuple[Tensor, Tensor, list[str]]:
    """Inputs with mean 0 and variance 1: a penalty depends on the scale."""
    from sklearn import datasets

    data = datasets.load_diabetes(scaled=False)
    x = torch.from_numpy(data.data)
    y = torch.from_numpy(data.target)
    standardized = (x - x.mean(0)) / x.std(0, unbiased=False)
    return standardized, (y - y.mean()) / y.std(unbiased=False), list(data.feature_names)


@needs_sklearn
@pytest.mark.parametrize("order", [1, -1], ids=["weak to strong", "strong to weak"])
def test_a_linear_path_is_scikit_learn_s_lasso(order: int) -> None:
    from sklearn.linear_model import Lasso

    x, y, names = diabetes()
    strengths = [0.02, 0.06, 0.15, 0.3, 0.55][::order]
    # Below 1 over the largest curvature, with the momentum that four collinear features need.
    lr = 0.5 / float(torch.linalg.eigvalsh(x.T @ x / len(x)).max())

    def train(model: nn.Module, strength: float) -> None:
        optimizer = fusereg.optim.SGD(model.parameters(), lr=lr, momentum=0.95, l1=strength)
        for _ in range(500):
            optimizer.zero_grad()
            (0.5 * (model(x)[:, 0] - y).square().mean()).backward()
            optimizer.step()

    path = fusereg.path(
        lambda: nn.Linear(10, 1, bias=False, dtype=F64),
        train,
        lambda model: float((model(x)[:, 0] - y).square().mean()),
        strengths=strengths,
        penalized=lambda model: model.weight,
        dim=1,
        names=names,
        mode="min",
    )
    wanted = dict.fromkeys(names, float("inf"))
    for alpha in sorted(strengths, reverse=True):
        theirs = torch.from_numpy(Lasso(alpha=alpha, tol=1e-10).fit(x, y).coef_)
        (point,) = [p for p in path.points if p.strength == alpha]
        (weight,) = path.model_at(point).parameters()
        torch.testing.assert_close(weight[0].detach(), theirs, rtol=1e-3, atol=1e-3)
        used = [name for name, c in zip(names, theirs, strict=True) if c != 0]
        assert path.used_at(point) == used
        for name in set(names) - set(used):  # none of these returns at a stronger one
            wanted[name] = alpha
    assert path.leaves_at() == wanted
    assert next(iter(path.leaves_at())) in ("bmi", "s5")  # known of these data


class Residual(nn.Module):
    """A network with a linear skip from its inputs."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.skip = nn.Linear(features, 1, bias=False)
        self.first = nn.Linear(features, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip(x) + self.last(torch.relu(self.first(x)))
        return out[:, 0]


@pytest.mark.parametrize("order", [1, -1], ids=["weak to strong", "strong to weak"])
def test_lassonet_keeps_the_features_that_matter_also_those_without_a_linear_effect(
    order: int,
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g)
    y = x[:, 0] + 1.5 * x[:, 1].abs() - 1.2  # the skip alone sees nothing of the second

    def make() -> Residual:
        torch.manual_seed(1)
        return Residual(8, 16)

    def train(model: nn.Module, strength: float) -> Iterator[None]:
        assert isinstance(model, Residual)
        lr = 0.02
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(150):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            fusereg.prox.hierarchical_(model.skip.weight, model.first.weight, lr * strength, m=1.0)
        yield

    path = fusereg.path(
        make,
        train,
        lambda model: float((model(x) - y).square().mean()),
        strengths=[0.3, 1.0, 30.0][::order],
        penalized=lambda model: model.skip.weight,
        dim=1,
        names=list("abcdefgh"),
        mode="min",
    )
    by_strength = {p.strength: p for p in path.points}
    assert path.used_at(by_strength[1.0]) == ["a", "b"]
    assert path.used_at(by_strength[30.0]) == []
    assert by_strength[1.0].value < 1.0  # the variance is 1.9
    for point in path.points:
        model = path.model_at(point)
        assert isinstance(model, Residual)
        limit = model.skip.weight.detach().norm(dim=0) * (1 + 1e-6)
        assert (model.first.weight.detach().abs() <= limit).all()
