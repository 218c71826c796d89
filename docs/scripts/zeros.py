"""Train problems with each kind of proximal step, and write the table of the zeros they find.

    python docs/scripts/zeros.py            # rewrites the table of docs/optimizers.md; some minutes

The lasso and the logistic regression have scikit-learn's solution to compare with. In the embedding
most rows wait long for their first gradient and some never get one; in the networks units are off
for the whole first batch. What is zero there after a few steps was wiped without evidence.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn import datasets, linear_model  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import fusereg

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "optimizers.md"
_BLOCK = re.compile(r"(<!-- zeros -->\n).*?(<!-- end zeros -->)", re.DOTALL)

#: Kinds of a penalty's step in Adam, and their names in the table.
KINDS: dict[bool | str, str] = {
    True: '`True`, `"capped"`',
    "preconditioned": '`"preconditioned"`',
    "decoupled": '`"decoupled"`',
    False: "`False`",
}


class Zeros(NamedTuple):
    """How many of scikit-learn's zeros were found, and how many zeros are none of its."""

    found: int
    wanted: int
    false: int


def _train(
    params: Any, loss: Callable[[Any], Tensor], batches: Iterator[Any], steps: int, lr: float,
    decays: bool = True, **options: Any,
) -> Iterator[int]:  # fmt: skip
    """Train by Adam with a rate that falls to zero, and yield after each step."""
    optimizer = fusereg.optim.Adam(params, lr=lr, **options)
    for step in range(steps):
        if decays:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(next(batches)).backward()
        optimizer.step()
        yield step + 1


def _drawn(n: int, batch: int | None) -> Iterator[Tensor]:
    """Yield indices of batches; all of them each time if there is no size."""
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from [order] if batch is None else order.split(batch)[: n // batch]


def _zeros(weight: Tensor, solution: Tensor) -> Zeros:
    ours, theirs = weight.detach().flatten() == 0, solution.flatten() == 0
    return Zeros(int((ours & theirs).sum()), int(theirs.sum()), int((ours & ~theirs).sum()))


def lasso(prox: bool | str, batch: int | None = None, steps: int = 3000) -> Zeros:
    """Solve a lasso of 40 features, begun away from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, dtype=torch.float64, generator=generator)
    truth = torch.zeros(40, dtype=torch.float64)
    truth[:6] = torch.tensor([2.0, -1.5, 1.0, -1.0, 0.7, 0.5], dtype=torch.float64)
    y = x @ truth + 0.3 * torch.randn(200, dtype=torch.float64, generator=generator)
    theirs = linear_model.Lasso(alpha=0.1, fit_intercept=False, tol=1e-12, max_iter=100_000)
    solution = torch.from_numpy(theirs.fit(x.numpy(), y.numpy()).coef_)
    w = nn.Parameter(torch.randn(40, dtype=torch.float64, generator=generator))

    def loss(i: Tensor) -> Tensor:
        return 0.5 * (x[i] @ w - y[i]).square().mean()

    for _ in _train(
        [w], loss, _drawn(200, batch), steps, 0.02, batch is not None, l1=0.1, prox=prox
    ):
        pass
    return _zeros(w, solution)


def logistic(prox: bool | str, batch: int | None = None, steps: int = 3000) -> Zeros:
    """Solve scikit-learn's logistic regression of breast cancer with L1."""
    data = datasets.load_breast_cancer()
    scaled = (data.data - data.data.mean(0)) / data.data.std(0)
    n, strength, lr = len(scaled), 0.1, 0.05 if batch is None else 0.02
    theirs = linear_model.LogisticRegression(
        l1_ratio=1.0, C=strength, solver="saga", tol=1e-10, max_iter=100_000
    ).fit(scaled, data.target)
    x, y = torch.from_numpy(scaled), torch.from_numpy(data.target).double()
    model = nn.Linear(30, 1).double()

    def loss(i: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(x[i])[:, 0], y[i])

    groups = [{"params": [model.weight], "l1": 1 / (strength * n)}, {"params": [model.bias]}]
    for _ in _train(groups, loss, _drawn(n, batch), steps, lr, batch is not None, prox=prox):
        pass
    return _zeros(model.weight, torch.from_numpy(np.asarray(theirs.coef_)))


def embedding(prox: bool | str, steps: int = 4000, rows: int = 2000) -> tuple[int, int]:
    """Return how many rows were zero before their first gradient, and how many were waiting.

    Words are drawn by Zipf's law; every tenth is never used.
    """
    generator = torch.Generator().manual_seed(0)
    table = nn.Embedding.from_pretrained(torch.randn(rows, 16, generator=generator), freeze=False)
    head = nn.Linear(16, 8)
    classes = torch.randint(8, (rows,), generator=generator)
    used = torch.arange(rows) % 10 != 9
    weights = used / (1.0 + torch.arange(rows))
    seen = torch.zeros(rows, dtype=torch.bool)
    wiped = torch.zeros(rows, dtype=torch.bool)

    def words() -> Iterator[Tensor]:
        while True:
            drawn = torch.multinomial(weights, 64, replacement=True, generator=generator)
            seen[drawn] = True
            yield drawn

    def loss(drawn: Tensor) -> Tensor:
        return cross_entropy(head(table(drawn)), classes[drawn])

    groups = [{"params": [table.weight], "l1": 1e-4}, {"params": list(head.parameters())}]
    for _ in _train(groups, loss, words(), steps, 2e-3, prox=prox):
        wiped |= ~seen & used & (table.weight.detach() == 0).all(dim=1)
    return int(wiped.sum()), int(used.sum())


class Net(NamedTuple):
    """A network that was trained."""

    wiped: int
    units: int
    zeros: float
    accuracy: float


def perceptron(prox: bool | str, steps: int = 1500) -> Net:
    """Train on digits, the first step with a batch of 4; count the units that this step removes."""
    digits = datasets.load_digits()
    x = torch.from_numpy(digits.data).float() / 16
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    layers = nn.Linear(64, 256), nn.Linear(256, 10)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    first = layers[0].weight
    net = _digits(model, x, y, [layer.weight for layer in layers], 1e-3,
                  steps, prox, lambda: (first.detach() == 0).all(dim=1))  # fmt: skip
    return net._replace(zeros=fusereg.sparsity(first))


def resnet18(prox: bool | str, steps: int = 60) -> Net:
    """Train torchvision's resnet18 on digits of 32 x 32 pixels; count its filters."""
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("other_libraries")  # repairs torchvision
    make = importlib.import_module("torchvision.models").resnet18

    digits = datasets.load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    x = interpolate(x, (32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    model = make(num_classes=10)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def dead() -> Tensor:
        return torch.cat([(w.detach().flatten(1) == 0).all(dim=1) for w in weights])

    net = _digits(model, x, y, weights, 1e-4, steps, prox, dead)
    return net._replace(zeros=fusereg.sparsity(weights))


def _digits(
    model: nn.Module, x: Tensor, y: Tensor, weights: list[Tensor], l1: float, steps: int,
    prox: bool | str, dead: Callable[[], Tensor],
) -> Net:  # fmt: skip
    train = torch.arange(len(x)) % 5 != 4
    inner, wiped = _drawn(int(train.sum()), 32), 0

    def batches() -> Iterator[Tensor]:
        yield next(inner)[:4]
        yield from inner

    def loss(i: Tensor) -> Tensor:
        return cross_entropy(model(x[train][i]), y[train][i])

    own = {id(w) for w in weights}
    rest = [p for p in model.parameters() if id(p) not in own]
    groups = [{"params": weights, "l1": l1}, {"params": rest}]
    for step in _train(groups, loss, batches(), steps, 2e-3, prox=prox):
        if step == 1:
            wiped = int(dead().sum())
    model.eval()
    with torch.no_grad():
        right = model(x[~train]).argmax(1) == y[~train]
    return Net(wiped, len(dead()), 0.0, float(right.float().mean()))


def row(prox: bool | str) -> str:
    """Return the table's row of a kind."""
    cells = [KINDS[prox]]
    for problem, batch in ((lasso, 32), (logistic, 64)):
        for found in (problem(prox), problem(prox, batch)):
            cells.append(
                f"{found.found} of {found.wanted}" + f", {found.false} false" * (found.false > 0)
            )
    wiped, waiting = embedding(prox)
    cells.append(f"{wiped} of {waiting}")
    for net in (perceptron(prox), resnet18(prox)):
        cells.append(f"{net.wiped} of {net.units}")
        cells.append(f"{net.zeros:.0%}, {net.accuracy:.1%}".replace("%", " %"))
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """Return the whole table."""
    head = (
        "`prox`", "lasso, all rows", "lasso, batches of 32", "logistic, all rows",
        "logistic, batches of 64", "embedding: rows wiped", "perceptron: units wiped",
        "zeros, accuracy", "resnet18: filters wiped", "zeros, accuracy",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for prox in KINDS:
        lines.append(row(prox))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> int:
    """Rewrite the table."""
    text = PAGE.read_text(encoding="utf-8")
    new = table()
    PAGE.write_text(_BLOCK.sub(lambda m: f"{m[1]}\n{new}\n\n{m[2]}", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
