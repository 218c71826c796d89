"""The techniques that the demo compares: a row each, by fusereg and in plain PyTorch.

To add a technique: write two small `Method`s (what fusereg does in a training step, and the same in
plain PyTorch written the obvious way), and append a `Technique` to TECHNIQUES. Table, plots and
JSON take it up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.cli.errors import InputError

HIDDEN = 128


class Method:
    """What one way of training does at each point of a step. Hooks do nothing until overridden.

    A method lives for one training run: made before the network (`network` may build another one),
    told the network by `attach`.
    """

    model: nn.Module
    learning_rate: float
    image_size: tuple[int, int]  # (height, width), set before `attach`

    def network(self, base: nn.Module) -> nn.Module:
        """The network to train, from the common one (a layer more, a layer replaced)."""
        return base

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        """Called once, when model and device are settled."""
        self.model = model
        self.learning_rate = learning_rate

    def optimizer(self) -> torch.optim.Optimizer:
        """What takes the step."""
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate)

    def images(self, batch: Tensor) -> Tensor:
        """The training batch as the network sees it (augmentation)."""
        return batch

    def loss_term(self) -> Tensor | None:
        """What is added to the loss before backward."""
        return None

    def after_backward(self) -> Tensor | None:
        """Between backward and the optimizer's step; gives the penalty's value if there is one."""
        return None

    def after_step(self) -> None:
        """After the optimizer's step."""

    def stop(self, epoch: int, test_loss: float) -> bool:
        """After each epoch: whether training should end here."""
        return False

    def finish(self) -> int | None:
        """After the last epoch: the one (from 0) whose model was brought back, if any was."""
        return None


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    Attributes:
        name: for `--only`, the table and the JSON.
        label: for the plots.
        summary: what it does, in a line.
        settings: its strengths, for the JSON and the first column.
        fused: makes the method that uses fusereg.
        plain: makes the same in plain PyTorch; None where torch has no obvious way.
        same_steps: whether both take the same steps, so that their losses can be compared one by
            one (not so where each draws random numbers of its own).
    """

    name: str
    label: str
    summary: str
    fused: Callable[[], Method]
    plain: Callable[[], Method] | None
    settings: Mapping[str, float] = field(default_factory=dict)
    same_steps: bool = True


def make_network(pixels: int, classes: int, seed: int) -> nn.Sequential:
    """The common network, with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(pixels, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, classes),
        )


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weight matrices, first layer first: what is penalised. Biases are left alone."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [cast(nn.Parameter, layer.weight) for layer in layers]


# --- penalties whose gradient joins the loss's: fusereg adds it after backward ---


class FusedPenalty(Method):
    """fusereg.WeightPenalty: value and gradient of every weight in one pass."""

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1, self.l2 = l1, l2

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.penalty = fusereg.WeightPenalty(model, l1=self.l1, l2=self.l2)

    def after_backward(self) -> Tensor | None:
        return self.penalty.add_grad_()


class PlainPenalty(Method):
    """The obvious way: the sum over all weights is a term of the loss."""

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1, self.l2 = l1, l2

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.weights = linear_weights(model)

    def loss_term(self) -> Tensor | None:
        terms = []
        if self.l1:
            terms += [self.l1 * w.abs().sum() for w in self.weights]
        if self.l2:
            terms += [self.l2 / 2 * w.square().sum() for w in self.weights]
        return torch.stack(terms).sum()


# --- proximal steps after the optimizer's: they give real zeros ---


class FusedProxL1(Method):
    """fusereg.prox.l1_ on every weight matrix."""

    def __init__(self, l1: float) -> None:
        self.l1 = l1

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.weights = linear_weights(model)

    def after_step(self) -> None:
        fusereg.prox.l1_(self.weights, self.learning_rate * self.l1)


class PlainProxL1(Method):
    """torch's softshrink, a matrix at a time."""

    def __init__(self, l1: float) -> None:
        self.l1 = l1

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.weights = linear_weights(model)

    @torch.no_grad()
    def after_step(self) -> None:
        for w in self.weights:
            w.copy_(F.softshrink(w, self.learning_rate * self.l1))


class FusedProxPixels(Method):
    """fusereg.prox.group_lasso_ on the first layer, a group for each input pixel (a column)."""

    def __init__(self, group: float) -> None:
        self.group = group

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.first = linear_weights(model)[0]

    def after_step(self) -> None:
        fusereg.prox.group_lasso_(self.first, self.learning_rate * self.group, dim=1)


class PlainProxPixels(Method):
    """The same: each column shrinks by a fixed length, or becomes zero."""

    def __init__(self, group: float) -> None:
        self.group = group

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.first = linear_weights(model)[0]

    @torch.no_grad()
    def after_step(self) -> None:
        threshold = self.learning_rate * self.group * math.sqrt(self.first.shape[0])
        norms = self.first.norm(dim=0, keepdim=True)
        self.first.mul_((1 - threshold / norms.clamp_min(1e-30)).clamp_min(0))


class FusedProxAdamW(Method):
    """fusereg.optim.AdamW: the proximal step of the weights is part of the optimizer's."""

    rate = 0.05  # of the learning rate, which is made for SGD

    def __init__(self, l1: float) -> None:
        self.l1 = l1

    def optimizer(self) -> torch.optim.Optimizer:
        groups = fusereg.optim.param_groups_weight_decay(self.model, 0.01, l1=self.l1)
        return fusereg.optim.AdamW(groups, lr=self.rate * self.learning_rate)


class PlainProxAdamW(Method):
    """torch's AdamW, then softshrink, a matrix at a time."""

    rate = FusedProxAdamW.rate

    def __init__(self, l1: float) -> None:
        self.l1 = l1

    def optimizer(self) -> torch.optim.Optimizer:
        self.weights = linear_weights(self.model)
        biases = [p for p in self.model.parameters() if p.dim() == 1]
        groups: list[dict[str, object]] = [
            {"params": self.weights},
            {"params": biases, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.rate * self.learning_rate, weight_decay=0.01)

    @torch.no_grad()
    def after_step(self) -> None:
        for w in self.weights:
            w.copy_(F.softshrink(w, self.rate * self.learning_rate * self.l1))


# --- layers ---


class WithDropout(Method):
    """A dropout layer after the hidden one."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        self.layer = layer

    def network(self, base: nn.Module) -> nn.Module:
        layers = list(base.children())
        return nn.Sequential(*layers[:-1], self.layer(), layers[-1])


class PlainDropConnect(nn.Linear):
    """The obvious way: dropout of the weight, which autograd then keeps."""

    p = 0.3

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.dropout(self.weight, self.p, self.training), self.bias)


class WithDropConnect(Method):
    """The last layer, under DropConnect."""

    def __init__(self, layer: Callable[[int, int], nn.Linear]) -> None:
        self.layer = layer

    def network(self, base: nn.Module) -> nn.Module:
        *layers, last = base.children()
        assert isinstance(last, nn.Linear)
        replacement = self.layer(last.in_features, last.out_features)
        replacement.load_state_dict(last.state_dict())
        return nn.Sequential(*layers, replacement)


def after_first_layer(base: nn.Module, *layers: nn.Module) -> nn.Module:
    """The network with these in place of the hidden layer's activation."""
    first, _, last = base.children()
    return nn.Sequential(first, *layers, last)


class WithBatchNorm(Method):
    """The hidden layer batch-normalized before its activation."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        self.layers = layers

    def network(self, base: nn.Module) -> nn.Module:
        return after_first_layer(base, *(layer() for layer in self.layers))


def fused_norm(dropout: float = 0.0) -> nn.Module:
    """Normalization, activation and dropout as one layer."""
    return fusereg.nn.BatchNorm1d(HIDDEN, activation="relu", dropout=dropout)


def plain_norm() -> nn.Module:
    """torch's normalization."""
    return nn.BatchNorm1d(HIDDEN)


class FusedTogether(FusedPenalty):
    """Batch norm, activation and dropout in one layer; the elastic net's gradient in one pass."""

    def __init__(self, l1: float, l2: float, dropout: float) -> None:
        super().__init__(l1, l2)
        self.dropout = dropout

    def network(self, base: nn.Module) -> nn.Module:
        return after_first_layer(base, fused_norm(self.dropout))


class PlainTogether(PlainPenalty):
    """The same, a layer for each and the penalty as a term of the loss."""

    def __init__(self, l1: float, l2: float, dropout: float) -> None:
        super().__init__(l1, l2)
        self.dropout = dropout

    def network(self, base: nn.Module) -> nn.Module:
        return after_first_layer(base, plain_norm(), nn.ReLU(), nn.Dropout(self.dropout))


# --- when to end, and which epoch's model to keep ---


class FusedEarlyStopping(Method):
    """fusereg.EarlyStopping on the test loss."""

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.stopper = fusereg.EarlyStopping(
            model, patience=self.patience, min_delta=self.min_delta
        )

    def stop(self, epoch: int, test_loss: float) -> bool:
        return self.stopper.step(test_loss, epoch=epoch).stop

    def finish(self) -> int | None:
        return self.stopper.restore()


class PlainEarlyStopping(Method):
    """The same by hand: a counter, and a copy of the weights of the best epoch."""

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.best = self.reference = math.inf
        self.misses = 0
        self.kept: tuple[int, dict[str, Tensor]] | None = None

    def stop(self, epoch: int, test_loss: float) -> bool:
        if test_loss < self.best:
            self.best = test_loss
            self.kept = epoch, copy.deepcopy(self.model.state_dict())
        if test_loss < self.reference - self.min_delta:
            self.reference, self.misses = test_loss, 0
        else:
            self.misses += 1
        return self.misses >= self.patience or not math.isfinite(test_loss)

    def finish(self) -> int | None:
        if self.kept is None:
            return None
        epoch, state = self.kept
        self.model.load_state_dict(state)
        return epoch


# Strengths: found by trying on the bundled digits. They narrow the gap and lower the test loss,
# while test accuracy stays within chance of the unregularized one.
# --- augmentation: the training images, changed anew in every epoch ---

#: Degrees, zoom, shift as a share of the side, degrees of shear: what leaves a digit readable.
_TURN, _ZOOM, _SHIFT, _SHEAR = 12.0, (0.9, 1.15), 0.07, 8.0


def make_augment(size: tuple[int, int]) -> fusereg.augment.Augment:
    """The row's augmentation of images of this size."""
    return fusereg.augment.Augment(
        size, degrees=_TURN, scale=_ZOOM, translate=_SHIFT, shear=_SHEAR, crop="center"
    )


class FusedAugment(Method):
    """fusereg.augment.Augment: one pass over the batch."""

    def attach(self, model: nn.Module, learning_rate: float) -> None:
        super().attach(model, learning_rate)
        self.augment = make_augment(self.image_size)

    def images(self, batch: Tensor) -> Tensor:
        changed: Tensor = self.augment(batch.view(-1, 1, *self.image_size))
        return changed.flatten(1)


class PlainAugment(Method):
    """A matrix for each image, affine_grid and grid_sample; it draws other numbers."""

    def images(self, batch: Tensor) -> Tensor:
        n, (height, width) = len(batch), self.image_size

        def draw(low: float, high: float) -> Tensor:
            return torch.empty(n, device=batch.device).uniform_(low, high)

        angle, zoom = torch.deg2rad(draw(-_TURN, _TURN)), draw(*_ZOOM)
        shear = torch.tan(torch.deg2rad(draw(-_SHEAR, _SHEAR)))
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        stretch = height / width  # the grid's units are half the sides
        moved = [2 * draw(-_SHIFT, _SHIFT) for _ in range(2)]
        rows = [
            [cos + shear * sin, (shear * cos - sin) * stretch, moved[0]],
            [sin / stretch, cos, moved[1]],
        ]
        matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        grid = F.affine_grid(matrix, [n, 1, height, width], align_corners=False)
        images = batch.view(n, 1, height, width)
        return F.grid_sample(images, grid, align_corners=False).flatten(1)


TECHNIQUES: list[Technique] = [
    Technique(
        name="none",
        label="no penalty",
        summary="no regularization: the control; both columns run the same code",
        fused=Method,
        plain=Method,
    ),
    Technique(
        name="l1",
        label="L1",
        summary="l1 * sum |w|, its gradient added to the loss's",
        fused=lambda: FusedPenalty(l1=4e-4),
        plain=lambda: PlainPenalty(l1=4e-4),
        settings={"l1": 4e-4},
    ),
    Technique(
        name="l2",
        label="L2",
        summary="l2/2 * sum w^2, its gradient added to the loss's",
        fused=lambda: FusedPenalty(l2=5e-3),
        plain=lambda: PlainPenalty(l2=5e-3),
        settings={"l2": 5e-3},
    ),
    Technique(
        name="elastic_net",
        label="elastic net",
        summary="l1 * sum |w| + l2/2 * sum w^2, the gradient of both added in one pass",
        fused=lambda: FusedPenalty(l1=1e-4, l2=3e-3),
        plain=lambda: PlainPenalty(l1=1e-4, l2=3e-3),
        settings={"l1": 1e-4, "l2": 3e-3},
    ),
    Technique(
        name="l1_prox",
        label="L1 by prox",
        summary="soft-thresholding of every weight after each step",
        fused=lambda: FusedProxL1(4e-4),
        plain=lambda: PlainProxL1(4e-4),
        settings={"l1": 4e-4},
    ),
    Technique(
        name="group_lasso",
        label="group lasso",
        summary="proximal step on the first layer, a group for each input pixel",
        fused=lambda: FusedProxPixels(1.5e-4),
        plain=lambda: PlainProxPixels(1.5e-4),
        settings={"group": 1.5e-4},
    ),
    Technique(
        name="prox_adamw",
        label="prox AdamW",
        summary="AdamW with soft-thresholding inside the optimizer's step",
        fused=lambda: FusedProxAdamW(1e-2),
        plain=lambda: PlainProxAdamW(1e-2),
        settings={"l1": 1e-2},
    ),
    Technique(
        name="dropout",
        label="dropout",
        summary="h / (1 - p) with probability 1 - p, else 0, after the hidden layer",
        fused=lambda: WithDropout(lambda: fusereg.nn.Dropout(0.3)),
        plain=lambda: WithDropout(lambda: nn.Dropout(0.3)),
        settings={"p": 0.3},
        same_steps=False,
    ),
    Technique(
        name="drop_connect",
        label="DropConnect",
        summary="dropout of the last layer's weight, a mask for each batch",
        fused=lambda: WithDropConnect(lambda m, n: fusereg.nn.DropConnectLinear(m, n, p=0.3)),
        plain=lambda: WithDropConnect(PlainDropConnect),
        settings={"p": 0.3},
        same_steps=False,
    ),
    Technique(
        name="batch_norm",
        label="batch norm",
        summary="the hidden layer normalized over the batch, then ReLU, in one pass",
        fused=lambda: WithBatchNorm(fused_norm),
        plain=lambda: WithBatchNorm(plain_norm, nn.ReLU),
    ),
    Technique(
        name="batch_norm_dropout",
        label="batch norm + dropout",
        summary="normalization, ReLU and dropout of the hidden layer in one pass",
        fused=lambda: WithBatchNorm(lambda: fused_norm(0.3)),
        plain=lambda: WithBatchNorm(plain_norm, nn.ReLU, lambda: nn.Dropout(0.3)),
        settings={"p": 0.3},
        same_steps=False,
    ),
    Technique(
        name="augmentation",
        label="augmentation",
        summary="every image turned, zoomed, shifted and sheared anew in every epoch",
        fused=FusedAugment,
        plain=PlainAugment,
        settings={"degrees": _TURN, "translate": _SHIFT, "shear": _SHEAR},
        same_steps=False,
    ),
    Technique(
        name="together",
        label="everything",
        summary="batch norm, dropout and the elastic net together",
        fused=lambda: FusedTogether(5e-5, 5e-4, 0.3),
        plain=lambda: PlainTogether(5e-5, 5e-4, 0.3),
        settings={"l1": 5e-5, "l2": 5e-4, "p": 0.3},
        same_steps=False,
    ),
    Technique(
        name="early_stopping",
        label="early stopping",
        summary="ends when the test loss has not fallen for some epochs, and goes back to the best "
        "(a real run watches images apart from the test)",
        fused=lambda: FusedEarlyStopping(patience=8, min_delta=1e-3),
        plain=lambda: PlainEarlyStopping(patience=8, min_delta=1e-3),
        settings={"patience": 8, "min_delta": 1e-3},
    ),
]


def choose(names: Sequence[str] | None) -> list[Technique]:
    """The techniques of these names, in the table's order (None: all).

    Raises:
        InputError: a name that is not in the table.
    """
    if names is None:
        return list(TECHNIQUES)
    known = [technique.name for technique in TECHNIQUES]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = ", ".join(unknown) or "no name"
        raise InputError(f"--only: found {found}, wanted one or more of {', '.join(known)}")
    return [technique for technique in TECHNIQUES if technique.name in names]
