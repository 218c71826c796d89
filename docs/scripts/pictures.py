"""Make the pictures of the documentation: `python docs/scripts/pictures.py [NAME...]`.

They are computed by the package itself from fixed seeds, or from the results in bench/results/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tables
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

import fusereg
from fusereg import functional as F
from fusereg.bench import SUITES
from fusereg.core import pictures as style
from fusereg.core.pictures import COLORS, FUSED_COLOR, GRAY, PLAIN_COLOR, png, styles, tidy

new_figure = partial(style.new_figure, layout=None)

#: Names of techniques on the speed chart, where they are not those of the suites.
LABELS = {
    "dropout_norm": "dropout + add + norm",
    "end_to_end": "training ResNet and ViT",
    "steps": "steps of five networks",
    "backend": "converted networks",
    "cross_entropy": "cross-entropy",
    "compact": "compaction",
    "fused_dropout": "fused dropouts",
    "drop_block": "DropBlock",
    "gaussian_dropout": "Gaussian dropout",
    "augment": "augmentation",
    "optim": "optimizers",
    "penalty": "penalties",
    "batch_norm": "batch normalization",
}

IMAGES = Path(__file__).resolve().parents[1] / "images"


def _axes(figure: Figure, columns: int, bottom: float = 0.15, top: float = 0.76) -> list[Axes]:
    made = figure.subplots(1, columns, squeeze=False)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=bottom, top=top, wspace=0.25)
    return list(made[0])


# --- penalties and optimizers ---------------------------------------------------------------------


def _lasso(examples: int = 256) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 40, generator=generator)
    truth = torch.zeros(40)
    truth[:8] = torch.tensor([2.0, -2.0, 1.5, -1.5, 1.0, -1.0, 0.7, -0.7])
    return x, x @ truth + 0.1 * torch.randn(examples, generator=generator), 8


def _paths(
    axes: Axes, weights: Sequence[Tensor], relevant: int, title: str, scale: float = 0.1
) -> None:
    history = torch.stack(list(weights))
    axes.plot(history[:, relevant:], color=PLAIN_COLOR, linewidth=0.8)
    axes.plot(history[:, :relevant], color=FUSED_COLOR, linewidth=1.3)
    axes.plot([], [], color=FUSED_COLOR, label="8 relevant weights")
    axes.plot([], [], color=PLAIN_COLOR, label="32 other weights")
    axes.set_yscale("symlog", linthresh=scale, linscale=1.5)
    axes.set_yticks([-1, -0.1, 0, 0.1, 1], ["-1", "-0.1", "0", "0.1", "1"])
    axes.set_xlabel("step")
    axes.set_ylabel("weight")
    zeros = int((history[-1] == 0).sum())
    axes.set_title(f"{title}: {zeros} exact zeros", fontsize=10)
    tidy(axes)


def penalties() -> Figure:
    """Draw the paths of weights under an L1 penalty, by gradient and by proximal step."""
    x, y, relevant = _lasso()
    lr, strength = 0.05, 0.05

    def run(prox: bool) -> list[Tensor]:
        w = torch.full((40,), 0.5, requires_grad=True)
        kept = []
        for _ in range(200):
            kept.append(w.detach().clone())
            w.grad = None
            (0.5 * (x @ w - y).square().mean()).backward()
            if not prox:
                fusereg.add_penalty_grad_(w, l1=strength)
            with torch.no_grad():
                assert w.grad is not None
                w -= lr * w.grad
            if prox:
                fusereg.prox.l1_(w, lr * strength)
        return kept

    figure = new_figure(
        9.5, 3.9, "L1 by gradient and by proximal step", "gradient descent, lr 0.05, λ 0.05"
    )
    left, right = _axes(figure, 2)
    _paths(left, run(False), relevant, "add_penalty_grad_", 0.01)
    _paths(right, run(True), relevant, "prox.l1_", 0.01)
    right.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.85))
    return figure


def optimizers() -> Figure:
    """Draw the paths of weights under AdamW with an L1 penalty."""
    x, y, relevant = _lasso(512)

    def run(prox: bool | str) -> list[Tensor]:
        torch.manual_seed(0)
        w = nn.Parameter(0.1 * torch.randn(40))
        optimizer = fusereg.optim.AdamW([w], lr=0.02, weight_decay=0.0, l1=0.05, prox=prox)
        kept = []
        for _ in range(600):
            kept.append(w.detach().clone())
            optimizer.zero_grad()
            (0.5 * (x @ w - y).square().mean()).backward()
            optimizer.step()
        return kept

    figure = new_figure(
        9.5, 3.9, "AdamW with an L1 penalty in its step", "a lasso problem, lr 0.02, l1 0.05"
    )
    panels = _axes(figure, 3)
    for axes, prox in zip(panels, (False, "decoupled", True), strict=True):
        _paths(axes, run(prox), relevant, f"prox={prox!r}", 0.01)
    for axes in panels[1:]:
        axes.set_ylabel("")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.85))
    return figure


# --- dropout --------------------------------------------------------------------------------------


def dropouts() -> Figure:
    """Draw the masks of each kind of dropout."""
    size, p = 16, 0.3
    x = torch.ones(2, 3, size, size)
    sequences = torch.ones(6, 16, 3)
    kinds: list[tuple[str, Tensor]] = [
        ("Dropout", F.dropout(x, p, seed=5)),
        ("Dropout2d", F.dropout2d(x, p, seed=6)),
        ("DropPath", F.drop_path(x, p, seed=6)),
        ("DropBlock2d, 5 × 5", F.drop_block2d(x, p, 5, seed=5)),
        ("GaussianDropout", F.gaussian_dropout(x, p, seed=5)),
        ("AlphaDropout of noise", F.alpha_dropout(torch.randn(2, 3, size, size), p, True, seed=5)),
        ("ConsistentDropout", F.consistent_dropout(sequences, p, 1, seed=3)),
        ("DropConnect: weights", F.dropout(torch.ones(1, 1, size, 3 * size // 2), p, seed=9)),
    ]
    figure = new_figure(
        9.5,
        4.6,
        "Masks of each kind of dropout",
        f"p = {p}; darker is larger, white is dropped (AlphaDropout: a single shade)",
    )
    grid = figure.subplots(2, 4)
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.03, top=0.77, wspace=0.08, hspace=0.28)
    for axes, (name, y) in zip(grid.flat, kinds, strict=True):
        if name == "ConsistentDropout":
            tiles = y.permute(0, 2, 1).reshape(-1, y.shape[1])  # (sample, channel) by step
            title = f"{name}: 16 steps →"
        else:
            gap = torch.full((y.shape[0], y.shape[1], y.shape[2], 1), float("nan"))
            wide = torch.cat([y, gap], 3).permute(0, 2, 1, 3).flatten(2)
            line = torch.full((y.shape[0], 1, wide.shape[2]), float("nan"))
            tiles = torch.cat([wide, line], 1).flatten(0, 1)
            title = name
        low, high = (-3.0, 4.5) if "Alpha" in name else (0.0, 2.2)
        picture = axes.imshow(
            tiles, cmap="Blues", vmin=low, vmax=high, interpolation="nearest", aspect="auto"
        )
        picture.cmap.set_bad("#666666")
        axes.set_title(title, fontsize=9.5)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def shards() -> Figure:
    """Draw a mask beside the masks of its shards."""
    whole = F.dropout(torch.ones(8, 32), 0.4, seed=11)
    parts = [
        F.dropout(torch.ones(2, 32), 0.4, seed=11, index_offset=rank * 64) for rank in range(4)
    ]
    assert torch.equal(whole, torch.cat(parts))
    figure = new_figure(
        9.5, 4.0, "A mask and the masks of its shards", "dropout, p = 0.4, seed = 11 on every rank"
    )
    top = figure.add_axes((0.17, 0.47, 0.8, 0.32))
    top.imshow(whole != 0, cmap="Blues", vmin=0, vmax=1.4, aspect="auto", interpolation="nearest")
    top.set_ylabel("whole,\n8 × 32", rotation=0, ha="right", va="center")
    for rank, part in enumerate(parts):
        axes = figure.add_axes((0.17, 0.335 - 0.095 * rank, 0.8, 0.08))
        axes.imshow(part != 0, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
        text = f"rank {rank}\nindex_offset={64 * rank}"
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8.5)
        axes.set_xticks([])
        axes.set_yticks([])
    top.set_xticks([])
    top.set_yticks([])
    return figure


def fused_bytes() -> Figure:
    """Draw the bytes that fused and unfused steps move."""
    # Reads and writes of an element of a bfloat16 activation, in bytes; masks have 1.
    steps = [
        # name, forward by steps, fused, backward by steps, fused
        ("bias_dropout_add", 4 + 5 + 6, 6, 5 + 2, 4),
        ("dropout_add", 5 + 6, 6, 5, 4),
        ("activation_dropout", 4 + 5, 4, 5 + 6, 6),
        ("dropout_add_layer_norm", 5 + 6 + 4, 8, 6 + 5, 8),
    ]
    figure = new_figure(
        9.5, 3.9, "Bytes read and written", "per bfloat16 element; counted, not measured"
    )
    for axes, title, start in zip(_axes(figure, 2), ("forward", "backward"), (1, 3), strict=True):
        places = np.arange(len(steps))
        plain, fused = [s[start] for s in steps], [s[start + 1] for s in steps]
        axes.barh(places - 0.2, plain, 0.38, color=PLAIN_COLOR, label="separate operations")
        axes.barh(places + 0.2, fused, 0.38, color=FUSED_COLOR, label="fused")
        for at, (a, b) in enumerate(zip(plain, fused, strict=True)):
            axes.text(a + 0.2, at - 0.2, str(a), va="center", fontsize=8.5)
            axes.text(b + 0.2, at + 0.2, str(b), va="center", fontsize=8.5)
        axes.set_yticks(places, [s[0] for s in steps] if start == 1 else [""] * len(steps))
        axes.invert_yaxis()
        axes.set_xlim(0, 17)
        axes.set_xlabel("bytes")
        axes.set_title(title, fontsize=10)
        tidy(axes)
        axes.grid(False, axis="y")
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="upper right", ncols=2
    )
    figure.subplots_adjust(left=0.21, wspace=0.08)
    return figure


# --- normalization --------------------------------------------------------------------------------


def norm_error() -> Figure:
    """Draw the error of normalization over the mean of the input."""
    ratios = [10.0**k for k in (0, 1, 2, 3, 4, 5)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 32, 28, 28, dtype=torch.float64, generator=generator)
    rows = torch.randn(512, 1024, dtype=torch.float64, generator=generator)
    last = torch.channels_last

    def error(y: Tensor, wanted: Tensor) -> float:
        return float((y.double() - wanted).abs().max() / wanted.abs().max())

    def batch(call: Callable[[Tensor], Tensor], ratio: float, channels_last: bool) -> float:
        x = (noise + ratio).float()
        wanted = torch.nn.functional.batch_norm(x.double(), None, None, training=True, eps=1e-9)
        return error(call(x.contiguous(memory_format=last) if channels_last else x), wanted)

    def layer(call: Callable[[Tensor], Tensor], ratio: float) -> float:
        x = (rows + ratio).float()
        wanted = torch.nn.functional.layer_norm(x.double(), (1024,), eps=1e-9)
        return error(call(x), wanted)

    def theirs(x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-9)

    def ours(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True, eps=1e-9)

    figure = new_figure(
        9.5, 3.9, "Error of normalization", "float32 compared with float64 of the same input"
    )
    left, right = _axes(figure, 2)
    left.loglog(ratios, [batch(theirs, r, False) for r in ratios], "o-", color=PLAIN_COLOR,
                label="torch, NCHW")  # fmt: skip
    left.loglog(ratios, [batch(theirs, r, True) for r in ratios], "s--", color=COLORS[4],
                label="torch, channels_last")  # fmt: skip
    left.loglog(ratios, [batch(ours, r, False) for r in ratios], "o-", color=FUSED_COLOR,
                label="fusereg, NCHW")  # fmt: skip
    left.loglog(ratios, [batch(ours, r, True) for r in ratios], "s--", color=COLORS[2],
                label="fusereg, channels_last")  # fmt: skip
    left.set_title("batch normalization, 16 × 32 × 28 × 28", fontsize=10)

    def their_layer(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (1024,), eps=1e-9)

    def our_layer(x: Tensor) -> Tensor:
        return F.dropout_add_layer_norm(x, None, p=0.0, eps=1e-9)

    right.loglog(ratios, [layer(their_layer, r) for r in ratios], "o-", color=PLAIN_COLOR,
                 label="torch")  # fmt: skip
    right.loglog(ratios, [layer(our_layer, r) for r in ratios], "o-", color=FUSED_COLOR,
                 label="fusereg")  # fmt: skip
    right.set_title("layer normalization, rows of 1024", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("mean / standard deviation")
        axes.set_ylabel("largest error")
        axes.set_ylim(2e-8, 3)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
        tidy(axes)
    figure.subplots_adjust(wspace=0.3)
    return figure


# --- augmentation ---------------------------------------------------------------------------------


def _cards(n: int, size: int = 96) -> Tensor:
    """Return test images [n, 3, size, size] uint8: a grid, a disc, a triangle that points up."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    cards = []
    for i in range(n):
        hue = torch.tensor([0.0, 2.1, 4.2]) + 0.9 * i
        base = 0.55 + 0.4 * torch.cos(hue)
        shade = (0.45 + 0.55 * x / size)[None] * base[:, None, None]
        card = shade.clone()
        card[:, (x % 16 == 0) | (y % 16 == 0)] = 1.0
        disc = (x - size * 0.68).square() + (y - size * 0.66).square() < (size * 0.2) ** 2
        card[:, disc] = torch.tensor([0.95, 0.85, 0.2])[:, None]
        triangle = (y > size * 0.12) & (y < size * 0.5) & ((x - size * 0.35).abs() < (y - 11) * 0.5)
        card[:, triangle] = 0.12
        cards.append((card * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.stack(cards)


def augmentation() -> Figure:
    """Draw augmented test images."""
    from fusereg.augment import Augment, Erase, Mix

    cards = _cards(8)
    augment = Augment(
        80,
        degrees=25,
        scale=(0.8, 1.3),
        shear=8,
        hflip=0.5,
        brightness=0.25,
        erase=Erase(0.35, scale=(0.03, 0.12)),
        mix=Mix(cutmix=1.0, mixup=0.4, p=0.4),
        seed=5,
    )
    ids = torch.arange(8)
    rows = [augment(cards, ids, sample_ids=ids, epoch=epoch)[0] for epoch in range(3)]
    figure = new_figure(
        9.5, 5.5, "Augmentation in one kernel, different in every epoch", "8 samples, 3 epochs"
    )
    grid = figure.subplots(4, 8)
    figure.subplots_adjust(left=0.075, right=0.99, bottom=0.02, top=0.84, wspace=0.06, hspace=0.06)
    names = ["input", "epoch 0", "epoch 1", "epoch 2"]
    for line, name, images in zip(grid, names, [cards, *rows], strict=True):
        for axes, image in zip(line, images, strict=True):
            shown = image if image.dtype is torch.uint8 else (image.clamp(0, 1) * 255).byte()
            axes.imshow(shown.permute(1, 2, 0), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, fontsize=9.5)
    return figure


def antialiasing() -> Figure:
    """Draw a zone plate that is made smaller and turned."""
    from fusereg.augment import Augment

    at = torch.arange(160, dtype=torch.float64) - 79.5
    radius = at[:, None].square() + at[None].square()
    plate = (127.5 + 127.5 * torch.cos(torch.pi / 160 * radius)).round().to(torch.uint8)
    shown = {"input, 160 x 160": plate}
    for name, antialias in (("without antialiasing", False), ("with antialiasing", True)):
        how = Augment(40, degrees=(20, 20), crop="none", antialias=antialias, fill=128.0)
        shown[name] = (how(plate[None, None])[0, 0] * 255).round().to(torch.uint8)
    figure = new_figure(
        7.0, 3.1, "A zone plate, smaller and turned", "40 x 40 pixels, turned by 20 degrees"
    )
    for axes, (name, image) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.03, top=0.75, wspace=0.06)
    return figure


# --- early stopping, conversion, communication ----------------------------------------------------


def early_stopping() -> Figure:
    """Draw a metric with the reference and the best of early stopping."""
    generator = torch.Generator().manual_seed(4)
    epochs = torch.arange(40.0)
    curve = 0.4 + 0.6 * torch.exp(-epochs / 6) + 0.006 * (epochs - 14).clamp_min(0)
    metric = (curve + 0.02 * torch.randn(40, generator=generator)).tolist()
    stopper = fusereg.EarlyStopping(patience=8, min_delta=0.03)
    reference, best, seen = [], [], []
    improved, bests = [], []
    low = float("inf")
    for epoch in stopper.epochs(40):
        decision = stopper.step(metric[epoch], epoch=epoch)
        if decision.improved:
            improved.append(epoch)
            low = metric[epoch]
        if decision.new_best:
            bests.append(epoch)
        assert stopper.best is not None
        reference.append(low)
        best.append(stopper.best)
        seen.append(epoch)
    figure = new_figure(
        9.5, 4.0, "Reference and best value of a metric", "patience 8, min_delta 0.03, mode 'min'"
    )
    (axes,) = _axes(figure, 1)
    axes.plot(metric, color="#bbbbbb", linewidth=1, label="metric without stopping")
    axes.plot(seen, [metric[e] for e in seen], color="#000000", linewidth=1.4, label="metric")
    axes.step(seen, reference, where="post", color=PLAIN_COLOR, label="reference (for patience)")
    axes.step(seen, best, where="post", color=FUSED_COLOR, linestyle="--", label="best")
    axes.plot(improved, [metric[e] for e in improved], "o", color=PLAIN_COLOR, label="improved")
    axes.plot(bests, [metric[e] for e in bests], ".", color=FUSED_COLOR, label="new best")
    end, kept = seen[-1], stopper.best_epoch
    assert kept is not None
    axes.axvline(end, color=COLORS[4], linewidth=1)
    axes.text(end + 0.3, 0.9, f"stopped after epoch {end}", color=COLORS[4], fontsize=9)
    axes.annotate(
        f"restored: epoch {kept}",
        (kept, metric[kept]),
        (kept - 9, 0.36),
        fontsize=9,
        color=FUSED_COLOR,
        arrowprops={"arrowstyle": "->", "color": FUSED_COLOR},
    )
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation loss")
    axes.set_ylim(0.33, 1.05)
    axes.legend(frameon=False, fontsize=8.5, ncols=2)
    tidy(axes)
    return figure


def convert() -> Figure:
    """Draw a residual block before and after conversion."""
    figure = new_figure(
        9.5, 3.3, "A residual block before and after convert", "each box is at least one kernel"
    )
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.74))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 40)
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        axes.add_patch(
            FancyBboxPatch((x, y), width, 7, boxstyle="round,pad=0.3", fc=color, ec="#444444")
        )
        axes.text(x + width / 2, y + 3.5, text, ha="center", va="center", fontsize=9)

    def arrow(x0: float, y0: float, x1: float, y1: float, bend: float = 0.0) -> None:
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0),
                (x1, y1),
                arrowstyle="->",
                mutation_scale=11,
                color="#444444",
                connectionstyle=f"arc3,rad={bend}",
            )
        )

    torch_color, fused = "#fbe3b3", "#bcd9ee"
    chain = [("conv", 9), ("bn1", 8), ("ReLU", 8), ("conv", 9), ("bn2", 8), ("+", 5), ("ReLU", 8)]
    at = 12.0
    axes.text(1, 28.5, "torch", fontsize=10, va="center")
    for i, (name, width) in enumerate(chain):
        box(at, 25, width, name, "#eeeeee" if name == "conv" else torch_color)
        if i + 1 < len(chain):
            arrow(at + width + 0.4, 28.5, at + width + 3.6, 28.5)
        at += width + 4
    arrow(9, 28.5, 11.6, 28.5)
    arrow(10, 29.5, 76.5, 32.8, -0.13)
    axes.text(1, 8.5, "converted", fontsize=10, va="center")
    at = 12.0
    after = [("conv", 9), ("bn1 + ReLU", 20), ("conv", 9), ("bn2 + shortcut + ReLU", 29)]
    for i, (name, width) in enumerate(after):
        box(at, 5, width, name, "#eeeeee" if name == "conv" else fused)
        if i + 1 < len(after):
            arrow(at + width + 0.4, 8.5, at + width + 3.6, 8.5)
        at += width + 4
    arrow(9.2, 8.5, 11.6, 8.5)
    arrow(10, 9.5, 76.5, 12.8, -0.13)
    return figure


def communication() -> Figure:
    """Draw the bytes that a process receives in a step."""
    processes = np.array([2**k for k in range(1, 14)], dtype=float)
    channels, parameters = 26_560, 25_557_032
    ring = 2 * (processes - 1) / processes
    gradients = ring * 4 * parameters
    over_all = 24 * channels * (processes - 1) + ring * 16 * channels
    within = np.minimum(processes, 64)
    grouped = 24 * channels * (within - 1) + 2 * (within - 1) / within * 16 * channels
    numbers = 3 * 8 * ring
    figure = new_figure(
        9.5,
        4.2,
        "Bytes that a process receives in one step of ResNet-50",
        "calculated; float32 gradients",
    )
    (axes,) = _axes(figure, 1)
    axes.loglog(processes, gradients, color="#000000", label="gradients (DDP, ring all-reduce)")
    axes.loglog(processes, over_all, color=COLORS[4], label="SyncBatchNorm over all processes")
    axes.loglog(processes, grouped, "--", color=FUSED_COLOR, label="SyncBatchNorm, groups of 64")
    axes.loglog(processes, numbers, ":", color=COLORS[3], label="penalty value, gradient norm")
    axes.set_xlabel("processes")
    axes.set_ylabel("bytes")
    axes.set_xticks([2, 8, 64, 512, 4096], ["2", "8", "64", "512", "4096"])
    axes.minorticks_off()
    names = {1e1: "10 B", 1e3: "1 kB", 1e5: "100 kB", 1e7: "10 MB", 1e9: "1 GB"}
    axes.set_yticks(list(names), list(names.values()))
    axes.set_ylim(5, 2e10)
    axes.legend(frameon=False, fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.38))
    tidy(axes)
    return figure


def roofline() -> Figure:
    """Draw the stored results as percentages of a copy."""
    rows = [
        r
        for r in tables.load()
        if r["provider"] == "fusereg" and r["dtype"] == "float32" and r["percent_of_copy"]
    ]
    figure = new_figure(
        9.5,
        4.4,
        "Percent of a copy",
        "float32, all measured cases, compared with a copy of as many bytes",
    )
    (axes,) = _axes(figure, 1)
    suites = list(dict.fromkeys(r["suite"] for r in rows))
    style = styles([*SUITES, *suites])
    for suite in suites:
        own = [r for r in rows if r["suite"] == suite]
        color, marker = style[suite]
        axes.scatter(
            [r["bytes"] for r in own],
            [r["percent_of_copy"] for r in own],
            s=22,
            color=color,
            marker=marker,
            label=suite.replace("_", " "),
            alpha=0.85,
        )
    axes.axhline(100, color=GRAY, linewidth=1)
    axes.text(3.3e6, 106, "copy", color=GRAY, fontsize=8.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("bytes that must move")
    axes.set_ylabel("of a copy")
    axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5)
    tidy(axes)
    return figure


def speed() -> Figure:
    """Draw the times of eager PyTorch over those of fusereg, by technique."""
    rows = [
        r
        for r in tables.load()
        if r["provider"] == "fusereg"
        and (r["device"], r["dtype"]) == ("cpu", "float32")
        and r["vs_eager"] is not None
    ]
    ratios: dict[str, list[float]] = {}
    for r in rows:
        ratios.setdefault(LABELS.get(r["suite"], r["suite"].replace("_", " ")), []).append(
            r["vs_eager"]
        )
    medians = {name: float(np.median(found)) for name, found in ratios.items()}
    names = sorted(medians, key=lambda name: medians[name])
    machines = sorted({tables.hardware_text(r["machine"], "cpu") for r in rows})
    versions = sorted({r["machine"]["torch"] for r in rows})
    dates = sorted({r["machine"]["date"][:10] for r in rows})
    figure = new_figure(
        9.5,
        4.6,
        "Times faster than eager PyTorch, by technique",
        "CPU, float32. Bar: median of all measured cases; line: smallest to largest ratio, tensors "
        f"of 64 elements included. {'; '.join(machines)}; torch {', '.join(versions)}; "
        f"{', '.join(dates)}",
    )
    axes = figure.add_axes((0.19, 0.12, 0.79, 0.68))
    places = np.arange(len(names))
    middle = [medians[name] for name in names]
    axes.barh(places, [m - 1 for m in middle], 0.62, left=1.0, color=COLORS[2])
    for at, name in enumerate(names):
        low, high = min(ratios[name]), max(ratios[name])
        axes.plot([low, high], [at, at], color="#222222", linewidth=1.1)
        axes.plot([low, high], [at, at], "|", color="#222222", markersize=7)
        if low < 1:
            axes.plot([low, 1], [at, at], color=COLORS[4], linewidth=2.4)
            axes.text(low * 0.965, at, f"{low:.2f}x", color=COLORS[4], fontsize=8.5, ha="right",
                      va="center")  # fmt: skip
        text = f"{medians[name]:.1f}x"
        axes.text(115, at, text, fontsize=9.5, ha="right", va="center", weight="bold")
    axes.text(115, len(names) - 0.35, "median", fontsize=8.5, color=GRAY, ha="right")
    axes.axvline(1, color="#000000", linewidth=1)
    axes.set_xscale("log")
    # Room for the text of the lowest.
    axes.set_xlim(0.72 * min(1.0, *(low for found in ratios.values() for low in found)), 120)
    axes.minorticks_off()
    ticks = [1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times faster (left of 1x: slower)")
    tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    f.__name__: f
    for f in (
        penalties,
        optimizers,
        dropouts,
        shards,
        fused_bytes,
        norm_error,
        augmentation,
        antialiasing,
        early_stopping,
        convert,
        communication,
        roofline,
        speed,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pictures that are named; return the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all if none is named")
    for name in parser.parse_args(argv).names or PICTURES:
        torch.manual_seed(0)
        (IMAGES / f"{name}.png").write_bytes(png(PICTURES[name]()))
        print(f"docs/images/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
