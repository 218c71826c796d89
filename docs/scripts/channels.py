"""Train small residual networks with penalties on channels, take the zeros out, and compare.

    python docs/scripts/channels.py      # half an hour; rewrites table, picture and figures

Two problems: scikit-learn's digits, and where a crop of a real photograph comes from
(scikit-learn's two photographs, in six horizontal bands; crops for training, validation and test
lie in different vertical strips, so that none overlaps another's). Every network is trained for
the same number of epochs, in bfloat16 (autocast), on images that are shifted and (the photographs)
flipped, at a rate that falls to zero along one cosine. For each of five seeds, from one network
after the first part of the epochs:

- dense: all goes on without a penalty.
- fusereg: the second part with ``groups=`` and each of the strengths, then ``compact``; the smaller
  network goes on with the optimizer's state and without a penalty.
- Torch-Pruning: the second part with the ``regularize`` of its group-norm pruner, then cut to a
  share of the operations, by global ranking; goes on with a new optimizer.

Strengths are chosen on the validation split, and accuracies are those of the test split.

The figures of a seed are stored when it is done; ``--resume`` leaves out seeds that are.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn import datasets  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fusereg
from fusereg.augment import Augment
from fusereg.bench.models import ResNet
from fusereg.core.pictures import COLORS, FUSED_COLOR, PLAIN_COLOR, new_figure, tidy

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compact.md"
RESULTS = ROOT / "bench" / "results" / "channels"
PICTURE = ROOT / "docs" / "images" / "channels.png"
_BLOCK = re.compile(r"(<!-- channels -->\n).*?(<!-- end channels -->)", re.DOTALL)
WIDTHS = (32, 64, 128)
LAYOUT = torch.channels_last
#: So many vertical strips of a photograph; of five, three train, one validates and one tests.
STRIPS = 30
BATCH, LR, DECAY = 64, 0.05, 5e-4
#: Epochs before the penalty, with it, and after the cut.
FIRST, SPARSE, LAST = 24, 24, 48
EPOCHS = FIRST + SPARSE + LAST
BUDGETS = (0.35, 0.17)
#: Strengths by problem, between the first channels that go and too few that stay.
DIGITS = (0.006, 0.009, 0.012, 0.016, 0.02)
PHOTOGRAPHS = (0.005, 0.0055, 0.006, 0.007, 0.009)


class Data(NamedTuple):
    """Images and labels for training, validation and test."""

    name: str
    augment: Augment
    strengths: tuple[float, ...]
    images: tuple[Tensor, Tensor, Tensor]
    labels: tuple[Tensor, Tensor, Tensor]


def digits() -> Data:
    """Return scikit-learn's digits of 8 x 8 pixels: 60 % train, 20 % validate, 20 % test."""
    augment = Augment(8, translate=1 / 8, crop="center", seed=0, memory_format=LAYOUT)
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    parts = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
    images = tuple(torch.from_numpy(data.images[i]).float()[:, None] / 16 for i in parts)
    labels = tuple(torch.from_numpy(data.target[i]) for i in parts)
    return Data("digits", augment, DIGITS, images, labels)  # type: ignore[arg-type]


def photographs(side: int = 16, bands: int = 3) -> Data:
    """Return crops of two photographs; which of the six bands is a crop's?"""
    augment = Augment(12, hflip=0.5, seed=0, memory_format=LAYOUT)  # windows of the crops
    draw = np.random.default_rng(0)
    images: list[list[Tensor]] = [[], [], []]
    labels: list[list[int]] = [[], [], []]
    for number, photograph in enumerate(datasets.load_sample_images().images):
        height, width, _ = photograph.shape
        strips = np.linspace(0, width, STRIPS + 1).astype(int)
        for band in range(bands):
            top, bottom = band * height // bands, (band + 1) * height // bands
            for part, (places, count) in enumerate((((0, 1, 3), 200), ((2,), 240), ((4,), 240))):
                own = [i for i in range(STRIPS) if i % 5 in places]
                for _ in range(count):
                    strip = own[draw.integers(len(own))]
                    y = draw.integers(top, bottom - side + 1)
                    x = draw.integers(strips[strip], strips[strip + 1] - side + 1)
                    crop = torch.from_numpy(photograph[y : y + side, x : x + side].copy())
                    images[part].append(crop.permute(2, 0, 1).float() / 255)
                    labels[part].append(number * bands + band)
    return Data(
        "photographs",
        augment,
        PHOTOGRAPHS,
        tuple(torch.stack(part) for part in images),  # type: ignore[arg-type]
        tuple(map(torch.tensor, labels)),  # type: ignore[arg-type]
    )


def train(
    model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, epochs: range, seed: int,
    before_step: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Train for some of the epochs of one cosine schedule."""
    x, y = data.images[0], data.labels[0]
    steps = len(x) // BATCH
    model.train()
    data.augment.train()
    for epoch in epochs:
        draw = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(x), generator=draw)
        for step, batch in enumerate(order.split(BATCH)[:steps]):
            for group in optimizer.param_groups:
                done = (epoch + step / steps) / EPOCHS
                group["lr"] = LR * (1 + math.cos(math.pi * done)) / 2
            images = data.augment(x[batch], sample_ids=batch, epoch=1000 * seed + epoch)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images).float()
            cross_entropy(logits, y[batch]).backward()
            before_step()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, part: int) -> float:
    """Return the accuracy on the validation (1) or the test split (2)."""
    model.eval()
    right = model(plain(data, data.images[part])).argmax(1) == data.labels[part]
    return float(right.float().mean())


def plain(data: Data, images: Tensor) -> Tensor:
    """Return images as they are for evaluation: their central windows."""
    data.augment.eval()
    made: Tensor = data.augment(images)
    return made


@torch.no_grad()
def operations(model: nn.Module, x: Tensor) -> float:
    """Return the multiply-adds of the convolutions and linear layers for one example."""
    total = 0.0

    def count(layer: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * layer.weight[0].numel() / len(x)

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return total


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer of all trainings."""
    return fusereg.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY, **options)


class Cut(NamedTuple):
    """A smaller network's figures."""

    method: str
    setting: float
    seed: int
    operations: float
    parameters: float
    validation: float
    test: float
    tuned_validation: float
    tuned_test: float


def finished(
    method: str, setting: float, seed: int, small: nn.Module, optimizer: torch.optim.Optimizer,
    dense: nn.Module, data: Data,
) -> Cut:  # fmt: skip
    """Train a smaller network to the end; return its figures, right after the cut and then."""
    x = plain(data, data.images[0][:1])
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, dense)]
    share = operations(small, x) / operations(dense, x)
    after = [accuracy(small, data, part) for part in (1, 2)]
    train(small, data, optimizer, range(FIRST + SPARSE, EPOCHS), seed)
    end = [accuracy(small, data, part) for part in (1, 2)]
    return Cut(method, setting, seed, share, counts[0] / counts[1], *after, *end)


def torch_pruning(dense: nn.Module, data: Data, seed: int) -> Iterator[Cut]:
    """Yield the networks that the group-norm pruner makes."""
    import torch_pruning as tp  # type: ignore[import-untyped]

    x = plain(data, data.images[0][:2])
    trained = copy.deepcopy(dense)
    whole = operations(trained, x)

    def pruner(model: Any, ratio: float = 0.5) -> Any:
        return tp.pruner.GroupNormPruner(
            model, x, tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"), reg=5e-4,
            global_pruning=True, pruning_ratio=ratio, max_pruning_ratio=0.95,
            ignored_layers=[model.head],
        )  # fmt: skip

    sparse = pruner(trained)

    def regularize() -> None:
        sparse.regularize(trained)

    train(trained, data, sgd(trained), range(FIRST, FIRST + SPARSE), seed, regularize)
    for budget in BUDGETS:
        low, high, best = 0.0, 1.0, trained
        for _ in range(6):  # the smallest ratio that meets the budget
            ratio = (low + high) / 2
            small = copy.deepcopy(trained)
            pruner(small, ratio).step()
            share = operations(small, x) / whole
            if share > budget:
                low = ratio
                continue
            high, best = ratio, small
            if share > budget - 0.01:
                break
        best = copy.deepcopy(best)
        yield finished("torch-pruning", budget, seed, best, sgd(best), dense, data)


def run(data: Data, seeds: Iterable[int]) -> Iterator[list[Cut]]:
    """Yield the figures of all networks of each seed."""
    channels, classes = data.images[0].shape[1], int(data.labels[0].max()) + 1
    for seed in seeds:
        start = time.process_time()
        found: list[Cut] = []

        def note(cut: Cut, found: list[Cut] = found) -> None:
            found.append(cut)
            print(data.name, *(f"{v:.4g}" if isinstance(v, float) else v for v in cut), flush=True)

        torch.manual_seed(seed)
        dense = ResNet(WIDTHS, 1, dropout=0.0, classes=classes, channels=channels)
        dense = dense.to(memory_format=LAYOUT)
        train(dense, data, sgd(dense), range(FIRST), seed)
        second = range(FIRST, FIRST + SPARSE)
        model = copy.deepcopy(dense)
        optimizer = sgd(model)
        train(model, data, optimizer, second, seed)
        note(finished("dense", 0.0, seed, model, optimizer, model, data))
        x = plain(data, data.images[0][:2])
        for strength in data.strengths:
            model = copy.deepcopy(dense)
            groups = fusereg.groups_of(model, x, scales=True)
            optimizer = sgd(model, groups=groups, group=strength)
            train(model, data, optimizer, second, seed)
            try:
                small = fusereg.compact(model, x, optimizer=optimizer)
            except ValueError as error:  # too strong: nothing is left
                print(data.name, seed, strength, error)
                continue
            off = accuracy(small, data, 2) - accuracy(model, data, 2)
            assert abs(off) <= 1 / len(data.labels[2]), off  # a rounding may move one image
            optimizer.param_groups[0]["group"] = 0.0
            note(finished("fusereg", strength, seed, small, optimizer, dense, data))
        for cut in torch_pruning(dense, data, seed):
            note(cut)
        print(f"{data.name}, seed {seed}: {time.process_time() - start:.0f} s", flush=True)
        yield found


# --- table and picture ----------------------------------------------------------------------------


def select(cuts: list[Cut], method: str, setting: float | None = None) -> list[Cut]:
    """Return the networks of a method."""
    return [c for c in cuts if c.method == method and setting in (None, c.setting)]


def chosen(cuts: list[Cut], images: int) -> float | None:
    """Return a strength, by the validation split alone; None if none fits.

    The strongest whose mean accuracy, fine-tuned, is within one standard error of the dense
    networks'.
    """
    dense = average(select(cuts, "dense"), "tuned_validation")
    error = math.sqrt(dense * (1 - dense) / images)
    fits = [
        s
        for s in {c.setting for c in select(cuts, "fusereg")}
        if average(select(cuts, "fusereg", s), "tuned_validation") >= dense - error
    ]
    return max(fits, default=None)


def average(cuts: list[Cut], figure: str) -> float:
    """Return a figure's mean over the seeds."""
    return mean(getattr(c, figure) for c in cuts)


def line(problem: str, what: str, cuts: list[Cut]) -> str:
    """Return a row of the table."""

    def spread(figure: str) -> str:
        values = [100 * getattr(c, figure) for c in cuts]
        return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0.0:.1f} %"

    shares = [c.operations for c in cuts]
    return (
        f"| {problem} | {what} | {mean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) | "
        f"{average(cuts, 'parameters'):.2f} | {spread('test')} | {spread('tuned_test')} |"
    )


def table(results: dict[str, list[Cut]], sizes: dict[str, int]) -> str:
    """Return the table of all problems."""
    lines = [
        "| problem | network | operations | parameters | test, right after the cut | at the end |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, cuts in results.items():
        dense = select(cuts, "dense")
        problem = f"{name}, {len(dense)} seeds"
        lines.append(line(problem, "dense", dense))
        own = chosen(cuts, sizes[name])
        for strength in sorted({c.setting for c in select(cuts, "fusereg")}):
            what = f"fusereg, {strength:g}" + ", by validation" * (strength == own)
            lines.append(line(problem, what, select(cuts, "fusereg", strength)))
        for budget in BUDGETS:
            theirs = select(cuts, "torch-pruning", budget)
            lines.append(line(problem, f"Torch-Pruning, {budget:g}", theirs))
    return "\n".join(lines)


def draw(results: dict[str, list[Cut]]) -> None:
    """Draw accuracy over operations."""
    figure = new_figure(
        9.5, 4.4, "Fewer operations, and what they cost",
        "Test accuracy of small residual networks at the end of training, mean of the seeds, "
        "smallest to largest.",
    )  # fmt: skip
    for axes, (problem, cuts) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        for method, color, marker, label in (
            ("fusereg", FUSED_COLOR, "o", "fusereg: penalty, then compact"),
            ("torch-pruning", PLAIN_COLOR, "s", "Torch-Pruning's group-norm pruner"),
            ("dense", COLORS[0], "D", "dense"),
        ):
            settings = sorted({c.setting for c in select(cuts, method)})
            own = [select(cuts, method, s) for s in settings]
            y = [[100 * c.tuned_test for c in cs] for cs in own]
            middle = [mean(v) for v in y]
            spread = [[m - min(v), max(v) - m] for m, v in zip(middle, y, strict=True)]
            axes.errorbar(
                [average(c, "operations") for c in own], middle, yerr=np.transpose(spread),
                color=color, marker=marker, markersize=6, linewidth=1.2, elinewidth=0.7,
                label=label,
            )  # fmt: skip
        axes.set_title(problem, size=10, loc="left")
        axes.set_xlabel("share of the dense network's operations")
        axes.set_ylabel("test accuracy, %")
        tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=110, facecolor="white")


def store(data: Data, cuts: list[Cut]) -> None:
    """Store the figures of a seed."""
    content = {
        "problem": data.name,
        "images": [len(part) for part in data.labels],
        "epochs": [FIRST, SPARSE, LAST],
        "networks": [c._asdict() for c in cuts],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    where(data.name, cuts[0].seed).write_text(text, encoding="utf-8")


def where(problem: str, seed: int) -> Path:
    """Return the file for the figures of a seed."""
    return RESULTS / f"{problem}-{seed}.json"


def report() -> None:
    """Rewrite table and picture from the stored figures."""
    results: dict[str, list[Cut]] = {}
    sizes: dict[str, int] = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes[content["problem"]] = content["images"][1]
        results.setdefault(content["problem"], []).extend(Cut(**c) for c in content["networks"])
    text = PAGE.read_text(encoding="utf-8")
    new = table(results, sizes)
    PAGE.write_text(_BLOCK.sub(lambda m: f"{m[1]}\n{new}\n\n{m[2]}", text), encoding="utf-8")
    draw(results)


def main() -> int:
    """Train all, or only report what is stored."""
    parser = argparse.ArgumentParser(description="Trains, cuts and compares small networks.")
    parser.add_argument("--report", action="store_true", help="only rewrite table and picture")
    parser.add_argument("--problem", choices=("digits", "photographs"), help="this one alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--resume", action="store_true", help="leave out seeds that are stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for data in () if options.report else (digits(), photographs()):
        if options.problem in (None, data.name):
            stored = [s for s in options.seeds if options.resume and where(data.name, s).exists()]
            for cuts in run(data, [s for s in options.seeds if s not in stored]):
                store(data, cuts)
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
