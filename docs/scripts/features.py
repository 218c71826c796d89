"""Selects input features of scikit-learn's data sets, beside its lasso and the lassonet package.

    python docs/scripts/features.py      # some minutes; rewrites the table and the pictures

Needs scikit-learn, matplotlib and lassonet. Of each data set 60 % train, 20 % validate (they choose
the strength, by the one-standard-error rule for every method), 20 % test. Inputs are standardized
with the training split's means and standard deviations.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn import datasets
from sklearn.linear_model import LogisticRegression, lasso_path
from torch import Tensor, nn

import fusereg
from fusereg.core.pictures import COLORS, new_figure, tidy

PAGE = Path(__file__).resolve().parents[1] / "feature-selection.md"
IMAGES = Path(__file__).resolve().parents[1] / "images"
_BLOCK = re.compile(r"(<!-- features -->).*?(<!-- end features -->)", re.DOTALL)
HIDDEN, STEPS, LR, MOMENTUM, M = 32, 150, 0.02, 0.9, 10.0


class Data(NamedTuple):
    """A data set, in three splits."""

    name: str
    x: list[Tensor]
    y: list[Tensor]
    features: list[str]
    outputs: int  # 1: regression


def load(name: str) -> Data:
    """Return a standardized data set."""
    options = {"scaled": False} if name == "diabetes" else {}
    data = getattr(datasets, f"load_{name}")(**options)
    order = np.random.default_rng(0).permutation(len(data.data))
    parts = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
    mean, std = data.data[parts[0]].mean(0), data.data[parts[0]].std(0)
    std[std == 0] = 1  # pixels that are always blank
    x = [torch.from_numpy((data.data[i] - mean) / std).float() for i in parts]
    target = data.target.astype(np.float64)
    if name == "diabetes":
        target = (target - target[parts[0]].mean()) / target[parts[0]].std()
        y = [torch.from_numpy(target[i]).float() for i in parts]
        return Data("diabetes", x, y, list(data.feature_names), 1)
    y = [torch.from_numpy(data.target[i]).long() for i in parts]
    return Data(name, x, y, [str(n) for n in data.feature_names], int(data.target.max()) + 1)


def score(data: Data, out: Tensor, split: int) -> dict[str, float]:
    """Return accuracy, or mean squared error, with its standard error."""
    y = data.y[split]
    if data.outputs == 1:
        errors = (out[:, 0] - y).square()
        own = {"squared error": float(errors.mean())}
        return {**own, "standard_error": float(errors.std()) / len(y) ** 0.5}
    p = float((out.argmax(1) == y).float().mean())
    return {"accuracy": p, "standard_error": (p * (1 - p) / len(y)) ** 0.5}


class Residual(nn.Module):
    """A perceptron with a linear skip from its inputs."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Linear(features, outputs, bias=False)
        self.first = nn.Linear(features, HIDDEN)
        self.last = nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip(x) + self.last(torch.relu(self.first(x)))
        return out


class Perceptron(nn.Module):
    """The same without the skip."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, HIDDEN)
        self.last = nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(x)))
        return out


def ours(data: Data, kind: type[nn.Module]) -> fusereg.RegularizationPath:
    """Return the path of a network, on all rows at once."""
    step = LR / (1 - MOMENTUM)  # momentum amplifies gradients as much

    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind(len(data.features), data.outputs)

    def train(model: nn.Module, strength: float) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        for _ in range(STEPS):
            optimizer.zero_grad()
            out = model(data.x[0])
            if data.outputs == 1:
                (out[:, 0] - data.y[0]).square().mean().backward()
            else:
                nn.functional.cross_entropy(out, data.y[0]).backward()
            optimizer.step()
            if isinstance(model, Residual):
                fusereg.prox.hierarchical_(
                    model.skip.weight, model.first.weight, step * strength, M
                )
            elif isinstance(model, Perceptron):
                fusereg.prox.group_lasso_(model.first.weight, step * strength, dim=1)

    def penalized(model: nn.Module) -> Tensor:
        if isinstance(model, Residual):
            return model.skip.weight
        assert isinstance(model, Perceptron)
        return model.first.weight

    return fusereg.path(
        make,
        train,
        lambda model: score(data, model(data.x[1]), 1),
        strengths=STRENGTHS[kind],
        penalized=penalized,
        dim=1,
        names=data.features,
        mode="min" if data.outputs == 1 else "max",
        samples=len(data.x[1]) if data.outputs > 1 else None,
    )


#: The hierarchical step is without the root of the group's size, and features resist by M times
#: the weights of the network.
STRENGTHS = {
    Perceptron: [0.0, *np.geomspace(1e-3, 1, 11).tolist()],
    Residual: [0.0, *np.geomspace(0.3, 1e3, 12).tolist()],
}


class Theirs:
    """A path of another library, whose points know how to predict."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.points: list[fusereg.PathPoint] = []
        self.predict: list[Callable[[Tensor], Tensor]] = []

    def add(self, strength: float, used: Tensor, predict: Callable[[Tensor], Tensor]) -> None:
        """Add a point."""
        metrics = score(self.data, predict(self.data.x[1]), 1)
        error = metrics.pop("standard_error")
        zeros = float((~used).float().mean())
        self.points.append(fusereg.PathPoint(strength, metrics, error, zeros, used.tolist()))
        self.predict.append(predict)

    def path(self) -> fusereg.RegularizationPath:
        """Return it as a path of fusereg."""
        mode = "min" if self.data.outputs == 1 else "max"
        return fusereg.RegularizationPath(self.points, mode, self.data.features)  # type: ignore[arg-type]


def linear(coef: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a linear model."""
    return lambda x: x @ coef.T + bias


def lasso(data: Data) -> Theirs:
    """Return scikit-learn's lasso, for classes its L1 logistic regression."""
    found, x, y = Theirs(data), data.x[0].numpy(), data.y[0].numpy()
    if data.outputs == 1:
        alphas, coefs, _ = lasso_path(x, y, alphas=20)
        for alpha, coef in zip(alphas, coefs.T, strict=True):
            own = torch.from_numpy(coef).float()[None]
            found.add(float(alpha), own[0] != 0, linear(own, torch.zeros(1)))
        return found
    for alpha in np.geomspace(2e-4, 0.3, 10):
        model = LogisticRegression(
            l1_ratio=1.0, C=1 / (alpha * len(x)), solver="saga", tol=1e-3, max_iter=200
        ).fit(x, y)
        coef, bias = (torch.from_numpy(a).float() for a in (model.coef_, model.intercept_))
        used = (coef != 0).any(0)
        if len(coef) == 1:  # two classes
            coef, bias = torch.cat([-coef, coef]) / 2, torch.cat([-bias, bias]) / 2
        found.add(float(alpha), used, linear(coef, bias))
    return found


def lassonet(data: Data) -> Theirs:
    """Return the path of the lassonet package, with its defaults but for a coarser path."""
    from lassonet import LassoNetClassifier, LassoNetRegressor

    kind = LassoNetRegressor if data.outputs == 1 else LassoNetClassifier
    model = kind(
        hidden_dims=(HIDDEN,), path_multiplier=1.3, n_iters=(200, 30), M=M, random_state=0,
        torch_seed=0, verbose=0, val_size=0.1,
    )  # fmt: skip
    y = data.y[0].numpy()
    checkpoints = model.path(
        data.x[0].numpy(), y[:, None] if data.outputs == 1 else y, return_state_dicts=True
    )
    found = Theirs(data)
    for i, point in enumerate(checkpoints):
        state = point.state_dict

        def predict(x: Tensor, state: dict[str, Tensor] = state) -> Tensor:
            model.load(state)
            with torch.no_grad():
                out: Tensor = model.model(x)
            return out

        # Its first training, at strength 0, and equal strengths would be one point of ours.
        found.add(float(point.lambda_) + 1e-12 * i, point.selected.bool(), predict)
    return found


def evaluated(path: fusereg.RegularizationPath, data: Data, theirs: Theirs | None) -> str:
    """Return the cells of a method's row."""
    chosen = path.chosen
    if theirs is not None:
        out = theirs.predict[theirs.points.index(chosen)](data.x[2])
    else:
        with torch.no_grad():
            out = path.model_at(chosen).eval()(data.x[2])
    metrics = score(data, out, 2)
    value, error = metrics.values()
    shown = f"{value:.3f} ± {error:.3f}"
    if data.outputs > 1:
        shown = f"{100 * value:.1f} ± {100 * error:.1f} %"
    first = [name for name, _ in list(path.leaves_at().items())[:3]]
    return f"{sum(chosen.used)} of {len(data.features)} | {shown} | {', '.join(first)}"


def methods(data: Data) -> Iterator[tuple[str, fusereg.RegularizationPath, Theirs | None]]:
    """Yield the paths of all methods."""
    yield "fusereg, group lasso on inputs", ours(data, Perceptron), None
    yield "fusereg, hierarchical (LassoNet)", ours(data, Residual), None
    for name, method in (("lassonet package", lassonet), ("scikit-learn, lasso", lasso)):
        theirs = method(data)
        yield name, theirs.path(), theirs


def main() -> int:
    """Rewrite the table and the pictures."""
    lines = [
        "| data set | method | features used | on the test split | the last to leave |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    curves = new_figure(
        10.0,
        4.6,
        "Fewer input features, and what they cost",
        "Best of each number of features on the validation splits. Large markers: the strongest "
        "penalty within one standard error of the method's best.",
    )
    axes = curves.subplots(1, 3)
    kept: dict[str, fusereg.RegularizationPath] = {}
    for panel, name in zip(axes, ("diabetes", "breast_cancer", "digits"), strict=True):
        data = load(name)
        figure = "squared error" if data.outputs == 1 else "accuracy"
        for i, (method, path, theirs) in enumerate(methods(data)):
            lines.append(f"| {name}, {figure} | {method} | {evaluated(path, data, theirs)} |")
            print(lines[-1], flush=True)
            best: dict[int, float] = {}  # of all strengths that leave as many
            for p in path.points:
                value, better = best.get(sum(p.used), p.value), max if path.mode == "max" else min
                best[sum(p.used)] = better(value, p.value)
            counts, color = sorted(best), COLORS[(6, 3, 1, 0)[i]]
            panel.plot(
                counts, [best[c] for c in counts], color=color, marker="osD^"[i], markersize=3.5,
                linewidth=1.2, label=method,
            )  # fmt: skip
            panel.plot(
                sum(path.chosen.used), path.chosen.value, color=color, marker="osD^"[i],
                markersize=9, markeredgecolor="white", zorder=5,
            )  # fmt: skip
            if name == "digits":
                kept[method] = path
        panel.set_title(name.replace("_", " "), size=10, loc="left")
        panel.set_xlabel("features used")
        panel.set_ylabel(figure)
        tidy(panel)
    handles, labels = axes[0].get_legend_handles_labels()
    curves.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    curves.savefig(IMAGES / "features.png", dpi=110, facecolor="white")
    grouped = kept["fusereg, group lasso on inputs"]
    grouped.plot().savefig(IMAGES / "path.png", dpi=110, facecolor="white")
    pixels(kept)
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(lines)
    PAGE.write_text(_BLOCK.sub(lambda m: f"{m[1]}\n\n{table}\n\n{m[2]}", text), encoding="utf-8")
    return 0


def pixels(paths: dict[str, fusereg.RegularizationPath]) -> None:
    """Draw in which order the pixels of the digits leave."""
    figure = new_figure(
        10.0, 3.6, "Which pixels of the digits matter",
        "Pixels by the order in which they leave, bright ones last.", layout="compressed",
    )  # fmt: skip
    for axes, (method, path) in zip(figure.subplots(1, len(paths)), paths.items(), strict=True):
        left = path.leaves_at()
        strengths = sorted(set(left.values()))
        rank = np.array([strengths.index(left[name]) for name in path.names], dtype=float)
        axes.imshow(rank.reshape(8, 8) / max(len(strengths) - 1, 1), cmap="viridis")
        axes.set_title(method, size=9)
        axes.set_axis_off()
    figure.savefig(IMAGES / "feature_pixels.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    sys.exit(main())
