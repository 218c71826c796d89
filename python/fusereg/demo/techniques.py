"""The techniques that the demo compares: a row for each, with fusereg and in plain PyTorch.

To add a technique, write two small `Method`s (what fusereg does in a training step, and the same in
plain PyTorch written the obvious way), and append a `Technique` to TECHNIQUES. Table, plots and
JSON include it without further changes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.cli.errors import InputError
from fusereg.cli.errors import choose as choose_names

HIDDEN = 128


class Method:
    """Hooks at each point of a training step. They do nothing until overridden.

    An object serves one training run: it is made with the technique's settings, builds the network,
    and then gets the attributes below.
    """

    model: nn.Module
    weights: list[nn.Parameter]  # the weight matrices, first layer first
    learning_rate: float
    image_size: tuple[int, int]  # (height, width)

    def __init__(self, **settings: float) -> None:
        self.settings = settings

    def network(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> nn.Module:
        """Return the network to train, made of the common one's layers."""
        return nn.Sequential(first, activation, last)

    def prepare(self) -> None:
        """Set up what needs the model; called once, before the first step."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate)

    def images(self, batch: Tensor) -> Tensor:
        """Return the training batch as the network sees it (augmentation)."""
        return batch

    def loss_term(self) -> Tensor | None:
        """Return what is added to the loss before backward."""
        return None

    def after_backward(self) -> Tensor | None:
        """Act between backward and the optimizer's step; return the penalty's value, if any."""
        return None

    def after_step(self) -> None:
        """Act after the optimizer's step."""

    def stop(self, epoch: int, loss: float) -> bool:
        """Return whether training should end after this epoch, given the validation loss."""
        return False

    def finish(self) -> int | None:
        """Act after the last epoch; return the epoch (from 0) whose model was restored, if any."""
        return None

    def smaller(self) -> nn.Module | None:
        """Return the trained network without what is zero in it, where that is the technique."""
        return None


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    Attributes:
        name: for `--only`, the table and the JSON.
        label: the same in words, for the plots.
        summary: what it does, in a line.
        fused: makes the method that uses fusereg.
        plain: makes the same in plain PyTorch; None where torch has no obvious way.
        settings: its strengths: what both methods are made with.
        same_steps: whether both take the same steps, so that their losses can be compared one by
            one (not so where each draws random numbers of its own).
    """

    name: str
    label: str
    summary: str
    fused: Callable[..., Method]
    plain: Callable[..., Method] | None
    settings: Mapping[str, float] = field(default_factory=dict)
    same_steps: bool = True


def make_network(pixels: int, classes: int, seed: int) -> nn.Sequential:
    """Return the common network, with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices, first layer first: what is penalized. Biases are not."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [cast(nn.Parameter, layer.weight) for layer in layers]


# --- penalties whose gradient is added to the loss's; fusereg adds it after backward ---


class Penalty(Method):
    """fusereg.WeightPenalty: value and gradient of every weight in one pass."""

    def prepare(self) -> None:
        l1, l2 = self.settings.get("l1", 0.0), self.settings.get("l2", 0.0)
        self.penalty = fusereg.WeightPenalty(self.model, l1=l1, l2=l2)

    def after_backward(self) -> Tensor | None:
        return self.penalty.add_grad_()


class PlainPenalty(Method):
    """The obvious way: the sum over all weights is a term of the loss."""

    def loss_term(self) -> Tensor | None:
        terms = []
        if "l1" in self.settings:
            terms += [self.settings["l1"] * w.abs().sum() for w in self.weights]
        if "l2" in self.settings:
            terms += [self.settings["l2"] / 2 * w.square().sum() for w in self.weights]
        return torch.stack(terms).sum()


# --- proximal steps after the optimizer's: they give real zeros ---


class ProxL1(Method):
    """fusereg.prox.l1_ on every weight matrix."""

    def after_step(self) -> None:
        fusereg.prox.l1_(self.weights, self.learning_rate * self.settings["l1"])


class PlainProxL1(Method):
    """torch's softshrink, a matrix at a time."""

    rate = 1.0  # of the learning rate, which is made for SGD

    @torch.no_grad()
    def after_step(self) -> None:
        for w in self.weights:
            w.copy_(F.softshrink(w, self.rate * self.learning_rate * self.settings["l1"]))


class ProxPixels(Method):
    """fusereg.prox.group_lasso_ on the first layer, a group for each input pixel (a column)."""

    def after_step(self) -> None:
        strength = self.learning_rate * self.settings["group"]
        fusereg.prox.group_lasso_(self.weights[0], strength, dim=1)


class PlainProxPixels(Method):
    """Proximal step on pixels in plain torch: each column shrinks by a fixed length, or is zero."""

    @torch.no_grad()
    def after_step(self) -> None:
        first = self.weights[0]
        threshold = self.learning_rate * self.settings["group"] * math.sqrt(first.shape[0])
        norms = first.norm(dim=0, keepdim=True)
        first.mul_((1 - threshold / norms.clamp_min(1e-30)).clamp_min(0))


class Compact(Method):
    """SGD with a proximal step on hidden units; fusereg.compact removes those that are zero."""

    def optimizer(self) -> torch.optim.Optimizer:
        groups = fusereg.groups_of(self.model, self.example())
        return fusereg.optim.SGD(
            self.model.parameters(),
            lr=self.learning_rate,
            groups=groups,
            group=self.settings["group"],
        )

    def example(self) -> Tensor:
        return torch.zeros(2, self.weights[0].shape[1], device=self.weights[0].device)

    def smaller(self) -> nn.Module | None:
        try:
            return fusereg.compact(self.model, self.example())
        except ValueError:  # the penalty was too strong: nothing is left
            return None


class PlainProxUnits(Method):
    """Proximal step in plain torch on units: a row of the first layer, and its bias."""

    @torch.no_grad()
    def after_step(self) -> None:
        first = next(layer for layer in self.model.modules() if isinstance(layer, nn.Linear))
        size = first.in_features + 1
        threshold = self.learning_rate * self.settings["group"] * math.sqrt(size)
        norms = (first.weight.square().sum(dim=1) + first.bias.square()).sqrt()
        scale = (1 - threshold / norms.clamp_min(1e-30)).clamp_min(0)
        first.weight.mul_(scale[:, None])
        first.bias.mul_(scale)


class ProxAdamW(Method):
    """fusereg.optim.AdamW: the proximal step of the weights is part of the optimizer's."""

    rate = 0.05

    def optimizer(self) -> torch.optim.Optimizer:
        l1 = self.settings["l1"]
        groups = fusereg.optim.param_groups_weight_decay(self.model, 0.01, l1=l1)
        return fusereg.optim.AdamW(groups, lr=self.rate * self.learning_rate, prox="decoupled")


class PlainProxAdamW(PlainProxL1):
    """torch's AdamW, then softshrink, a matrix at a time."""

    rate = ProxAdamW.rate

    def optimizer(self) -> torch.optim.Optimizer:
        biases = [p for p in self.model.parameters() if p.dim() == 1]
        groups: list[dict[str, object]] = [
            {"params": self.weights},
            {"params": biases, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.rate * self.learning_rate, weight_decay=0.01)


# --- layers ---


class Dropout(Method):
    """A dropout layer after the hidden one."""

    layer: type[nn.Module] = fusereg.nn.Dropout

    def network(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> nn.Module:
        return nn.Sequential(first, activation, self.layer(self.settings["p"]), last)


class PlainDropout(Dropout):
    """torch's layer."""

    layer = nn.Dropout


class DropConnectLinear(nn.Linear):
    """The obvious way: dropout of the weight, which autograd then keeps."""

    def __init__(self, in_features: int, out_features: int, p: float) -> None:
        super().__init__(in_features, out_features)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.dropout(self.weight, self.p, self.training), self.bias)


class DropConnect(Method):
    """The last layer with DropConnect."""

    layer: Callable[..., nn.Module] = fusereg.nn.DropConnectLinear

    def network(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> nn.Module:
        assert isinstance(last, nn.Linear)
        replacement = self.layer(last.in_features, last.out_features, p=self.settings["p"])
        replacement.load_state_dict(last.state_dict())
        return nn.Sequential(first, activation, replacement)


class PlainDropConnect(DropConnect):
    """DropConnect with the layer above, in plain torch."""

    layer = DropConnectLinear


class BatchNorm(Method):
    """Batch normalization, activation and, with a setting `p`, dropout as one layer."""

    def network(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> nn.Module:
        p = self.settings.get("p", 0.0)
        norm = fusereg.nn.BatchNorm1d(HIDDEN, activation="relu", dropout=p)
        return nn.Sequential(first, norm, last)


class PlainBatchNorm(Method):
    """Batch norm and activation in plain torch, a layer for each."""

    def network(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> nn.Module:
        dropout = [nn.Dropout(self.settings["p"])] if "p" in self.settings else []
        return nn.Sequential(first, nn.BatchNorm1d(HIDDEN), activation, *dropout, last)


# --- augmentation: the training images, changed anew in every epoch ---

# Degrees, zoom, shift as a share of the side, degrees of shear: what leaves a digit readable.
TURN, ZOOM, SHIFT, SHEAR = 12.0, (0.9, 1.15), 0.07, 8.0


def make_augment(size: tuple[int, int]) -> fusereg.augment.Augment:
    """Return the row's augmentation of images of this size."""
    return fusereg.augment.Augment(
        size, degrees=TURN, scale=ZOOM, translate=SHIFT, shear=SHEAR, crop="center"
    )


class Augmentation(Method):
    """fusereg.augment.Augment: one pass over the batch."""

    def prepare(self) -> None:
        self.augment = make_augment(self.image_size)

    def images(self, batch: Tensor) -> Tensor:
        changed: Tensor = self.augment(batch.view(-1, 1, *self.image_size))
        return changed.flatten(1)


class PlainAugmentation(Method):
    """A matrix for each image, affine_grid and grid_sample; it draws other numbers."""

    def images(self, batch: Tensor) -> Tensor:
        return warped(batch.view(-1, 1, *self.image_size)).flatten(1)


def warped(images: Tensor) -> Tensor:
    """Return images (N, 1, H, W), each turned, zoomed, shifted and sheared, in plain torch."""
    n, _, height, width = images.shape

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(n, device=images.device).uniform_(low, high)

    angle, zoom = torch.deg2rad(draw(-TURN, TURN)), draw(*ZOOM)
    shear = torch.tan(torch.deg2rad(draw(-SHEAR, SHEAR)))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    stretch = height / width  # the grid's units are half the sides
    moved = [2 * draw(-SHIFT, SHIFT) for _ in range(2)]
    rows = [
        [cos + shear * sin, (shear * cos - sin) * stretch, moved[0]],
        [sin / stretch, cos, moved[1]],
    ]
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# --- when to end, and which epoch's model to keep ---


class EarlyStopping(Method):
    """fusereg.EarlyStopping on the loss of images apart from the training and the test."""

    def prepare(self) -> None:
        patience, min_delta = int(self.settings["patience"]), self.settings["min_delta"]
        self.stopper = fusereg.EarlyStopping(self.model, patience=patience, min_delta=min_delta)

    def stop(self, epoch: int, loss: float) -> bool:
        return self.stopper.step(loss, epoch=epoch).stop

    def finish(self) -> int | None:
        return self.stopper.restore()


class PlainEarlyStopping(Method):
    """Early stopping by hand: a counter, and a copy of the weights of the best epoch."""

    best = reference = math.inf
    misses = 0
    kept: tuple[int, dict[str, Tensor]] | None = None

    def stop(self, epoch: int, loss: float) -> bool:
        if loss < self.best:
            self.best = loss
            self.kept = epoch, copy.deepcopy(self.model.state_dict())
        if loss < self.reference - self.settings["min_delta"]:
            self.reference, self.misses = loss, 0
        else:
            self.misses += 1
        return self.misses >= self.settings["patience"] or not math.isfinite(loss)

    def finish(self) -> int | None:
        if self.kept is None:
            return None
        epoch, state = self.kept
        self.model.load_state_dict(state)
        return epoch


# --- all of it ---


class Everything(BatchNorm, Penalty, Augmentation, EarlyStopping):
    """Batch norm with activation and dropout, elastic net, augmentation and early stopping."""

    def prepare(self) -> None:
        for part in (Penalty, Augmentation, EarlyStopping):
            part.prepare(self)


class PlainEverything(PlainBatchNorm, PlainPenalty, PlainAugmentation, PlainEarlyStopping):
    """Everything in plain torch, with the penalty as a term of the loss."""


# Strengths: found by trying on the bundled digits. Labels and names use the same words.
TECHNIQUES: list[Technique] = [
    Technique("none", "none", "no regularization: the control; both columns run the same code",
              Method, Method),
    Technique("l1", "L1", "l1 * sum |w|, its gradient added to the loss's",
              Penalty, PlainPenalty, {"l1": 3e-4}),
    Technique("l2", "L2", "l2/2 * sum w^2, its gradient added to the loss's",
              Penalty, PlainPenalty, {"l2": 5e-3}),
    Technique("elastic_net", "elastic net",
              "l1 * sum |w| + l2/2 * sum w^2, the gradient of both added in one pass",
              Penalty, PlainPenalty, {"l1": 1e-4, "l2": 3e-3}),
    Technique("l1_prox", "L1 prox", "soft-thresholding of every weight after each step",
              ProxL1, PlainProxL1, {"l1": 3e-4}),
    Technique("group_lasso", "group lasso",
              "proximal step on the first layer, a group for each input pixel",
              ProxPixels, PlainProxPixels, {"group": 2e-4}),
    Technique("compact", "compact",
              "proximal step on whole hidden units; those that are zero are removed at the end",
              Compact, PlainProxUnits, {"group": 6e-4}),
    Technique("prox_adamw", "prox AdamW",
              "AdamW with soft-thresholding inside the optimizer's step",
              ProxAdamW, PlainProxAdamW, {"l1": 2e-2}),
    Technique("dropout", "dropout",
              "h / (1 - p) with probability 1 - p, else 0, after the hidden layer",
              Dropout, PlainDropout, {"p": 0.5}, same_steps=False),
    Technique("drop_connect", "DropConnect",
              "dropout of the last layer's weight, a mask for each batch",
              DropConnect, PlainDropConnect, {"p": 0.5}, same_steps=False),
    Technique("batch_norm", "batch norm",
              "the hidden layer normalized over the batch, then ReLU, in one pass",
              BatchNorm, PlainBatchNorm),
    Technique("batch_norm_dropout", "batch norm + dropout",
              "normalization, ReLU and dropout of the hidden layer in one pass",
              BatchNorm, PlainBatchNorm, {"p": 0.3}, same_steps=False),
    Technique("augmentation", "augmentation",
              "every image turned, zoomed, shifted and sheared anew in every epoch",
              Augmentation, PlainAugmentation,
              {"degrees": TURN, "translate": SHIFT, "shear": SHEAR}, same_steps=False),
    Technique("early_stopping", "early stopping",
              "ends when the loss on validation images has not fallen for some epochs, and "
              "restores the best epoch",
              EarlyStopping, PlainEarlyStopping, {"patience": 5, "min_delta": 1e-3}),
    Technique("everything", "everything",
              "batch norm, dropout, elastic net, augmentation and early stopping in one training",
              Everything, PlainEverything,
              {"p": 0.1, "l1": 1e-5, "l2": 1e-4, "patience": 10, "min_delta": 0.0},
              same_steps=False),
]  # fmt: skip


def choose(names: Sequence[str] | None) -> list[Technique]:
    """Return the techniques of these names, in the table's order (None: all).

    Raises:
        InputError: a name that is not in the table, or a package is missing.
    """
    if (names is None or "compact" in names) and find_spec("torch_pruning") is None:
        raise InputError(
            "the row compact needs Torch-Pruning: pip install 'fusereg[compact]', or name other "
            "rows with --only"
        )
    chosen = choose_names(names, [each.name for each in TECHNIQUES], "--only: no technique")
    return [technique for technique in TECHNIQUES if technique.name in chosen]
