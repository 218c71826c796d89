"""The same training written twice: with fusereg, and in plain torch.

Both take one network of :mod:`.models` and train it on handwritten digits with every technique:

- every image is rotated, scaled, shifted and sheared anew in every epoch, and normalized;
- batch normalization and dropout, inside the network;
- a group lasso on the rows of each weight (a filter, a neuron), whose gradient joins the loss's;
- AdamW, and after its step the proximal step of an L1 penalty, which gives exact zeros;
- early stopping on validation images, which restores the weights of the best epoch.

:class:`Plain` writes each of these as a careful user of torch would: ``affine_grid`` and
``grid_sample``, the penalty as a term of the loss, ``AdamW(fused=True)``, the proximal step by
``torch._foreach_*``, and early stopping by hand. :class:`Fused` converts the network and calls
fusereg. They begin with the same weights and see the same batches; dropout and augmentation use
different random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.demo.data import DataSet
from fusereg.demo.techniques import SHEAR, SHIFT, TURN, ZOOM, PlainEarlyStopping, warped

from . import models

#: Mean and standard deviation of the digits' pixels.
MEAN, STD = 0.13, 0.31

NETWORKS: dict[str, Callable[[int, float], models.ResNet | models.ViT]] = {
    "resnet": lambda side, dropout: models.ResNet(dropout=dropout),
    "vit": lambda side, dropout: models.ViT(side, dropout=dropout),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    Attributes:
        network: One of :data:`NETWORKS`.
        side: Height and width of an image.
        dtype: float32, or the dtype of autocast.
        dropout: Probability of every dropout layer.
        augmented: Whether images are augmented; they are normalized anyway.
        l1: Strength of the proximal step.
        group: Strength of the group lasso.
        epochs: The largest number of epochs.
        patience: Epochs without a lower validation loss after which training ends.
    """

    network: str
    side: int = 28
    dtype: torch.dtype = torch.float32
    dropout: float = 0.1
    augmented: bool = True
    lr: float = 3e-3
    weight_decay: float = 0.01
    l1: float = 3e-3
    group: float = 1e-4
    batch: int = 64
    epochs: int = 12
    patience: int = 3

    def make(self) -> models.ResNet | models.ViT:
        """Return the network of torch's layers, with the same weights at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return NETWORKS[self.network](self.side, self.dropout)


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, side, side) in [0, 1] and labels, for training, validation and testing."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, data: DataSet, side: int) -> Digits:
        """Return the data, every eighth training image for validation."""

        def images(rows: Tensor) -> Tensor:
            found = rows.view(-1, 1, data.height, data.width)
            return found if side == data.height else F.adaptive_avg_pool2d(found, side)

        held_out = torch.arange(len(data.train_images)) % 8 == 0
        x, y = images(data.train_images), data.train_labels
        return cls(
            (x[~held_out], y[~held_out]),
            (x[held_out], y[held_out]),
            (images(data.test_images), data.test_labels),
        )

    def to(self, device: torch.device) -> Digits:
        """Return the data on another device."""

        def moved(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return part[0].to(device), part[1].to(device)

        return Digits(moved(self.train), moved(self.validation), moved(self.test))


@dataclass(frozen=True)
class Outcome:
    """Result of a training with the restored weights, and the validation loss of each epoch."""

    accuracy: float
    zeros: float
    best_epoch: int
    losses: tuple[float, ...]


class Twin:
    """Base of both twins: the training loop and the evaluation."""

    model: models.ResNet | models.ViT
    optimizer: torch.optim.Optimizer

    def __init__(self, recipe: Recipe, device: torch.device, capturable: bool = False) -> None:
        self.recipe = recipe
        self.device = device
        self.compiled = False
        self._setup(capturable)
        self.network: Callable[[Tensor], Tensor] = self.model

    def _setup(self, capturable: bool) -> None:
        """Make model, optimizer and all else; ``capturable``: for CUDA graphs."""
        raise NotImplementedError

    def compile(self, **options: Any) -> None:
        """Train the network through torch.compile from now on."""
        self.network = torch.compile(self.model, fullgraph=True, **options)
        self.compiled = True

    def weights(self) -> list[Tensor]:
        """Return what is penalized: matrices and filters, not biases, norms and positions."""
        kinds = (nn.Linear, nn.Conv2d)
        return [m.weight for m in self.model.modules() if isinstance(m, kinds)]

    def others(self) -> list[nn.Parameter]:
        """Return the parameters that are not penalized."""
        penalized = {id(w) for w in self.weights()}
        return [p for p in self.model.parameters() if id(p) not in penalized]

    def images(self, x: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Augment and normalize the batch."""
        raise NotImplementedError

    def prepare(self, x: Tensor, ids: Tensor, epoch: int) -> None:
        """Do on the host what must be done before a CUDA graph is replayed."""

    def prepared(self, x: Tensor) -> Tensor:
        """Augment and normalize the batch within a CUDA graph."""
        raise NotImplementedError

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run forward, backward and the optimizer's step on augmented images.

        Returns:
            The cross-entropy.
        """
        raise NotImplementedError

    def check(self, loss: float, epoch: int) -> bool:
        """Return whether training ends here."""
        raise NotImplementedError

    def restore(self) -> int:
        """Restore the weights of the best epoch and return it."""
        raise NotImplementedError

    def cross_entropy(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the network's output."""
        dtype = self.recipe.dtype
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = self.network(x)
        return F.cross_entropy(out.float() if out.dtype is torch.bfloat16 else out, labels)

    def train_step(self, images: Tensor, labels: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Augment a batch and train on it."""
        return self.step(self.images(images, ids, epoch), labels)

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Return mean cross-entropy and accuracy."""
        self.model.eval()
        loss, right = 0.0, 0
        for x, wanted in zip(images.split(500), labels.split(500), strict=True):
            found = self.model((x - MEAN) / STD)
            loss += float(F.cross_entropy(found, wanted, reduction="sum"))
            right += int((found.argmax(1) == wanted).sum())
        self.model.train()
        return loss / len(labels), right / len(labels)

    def train(self, data: Digits) -> Outcome:
        """Train to the end and evaluate on the test images."""
        images, labels = data.train
        losses = []
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.recipe.epochs)
        for epoch in range(self.recipe.epochs):
            for ids in batches(len(labels), self.recipe.batch, epoch):
                at = ids.to(self.device)
                self.train_step(images[at], labels[at], ids, epoch)
            losses.append(self.judge(*data.validation)[0])
            rates.step()
            if self.check(losses[-1], epoch):
                break
        best = self.restore()
        accuracy = self.judge(*data.test)[1]
        return Outcome(accuracy, fusereg.sparsity(self.weights()), best, tuple(losses))


def batches(count: int, size: int, epoch: int) -> Iterator[Tensor]:
    """Yield the indices of each batch; a last one of few is left out for its poor statistics."""
    shuffle = torch.Generator().manual_seed(epoch)
    for ids in torch.randperm(count, generator=shuffle).split(size):
        if 2 * len(ids) > size or count < size:
            yield ids


class Fused(Twin):
    """The training with fusereg."""

    def _setup(self, capturable: bool) -> None:
        recipe = self.recipe
        self.model = fusereg.convert(recipe.make()).to(self.device).train()
        changes = {"degrees": TURN, "scale": ZOOM, "translate": SHIFT, "shear": SHEAR}
        self.augment = fusereg.augment.Augment(
            recipe.side,
            crop="center",
            mean=MEAN,
            std=STD,
            **(changes if recipe.augmented else {}),  # type: ignore[arg-type]
        )
        spared = ("bias", "norm", *self.model.no_decay)
        self.penalty = fusereg.WeightPenalty(self.model, group=recipe.group, exclude=spared)
        groups = fusereg.optim.param_groups_weight_decay(
            self.model, recipe.weight_decay, l1=recipe.l1, exclude=spared
        )
        self.optimizer = fusereg.optim.AdamW(
            groups, lr=recipe.lr, prox="decoupled", capturable=capturable
        )
        self.drawn: fusereg.augment.AugmentParams | None = None
        self.stopper = fusereg.EarlyStopping(self.model, patience=recipe.patience)

    def images(self, x: Tensor, ids: Tensor, epoch: int) -> Tensor:
        changed: Tensor = self.augment(x, sample_ids=ids, epoch=epoch)
        return changed

    def prepare(self, x: Tensor, ids: Tensor, epoch: int) -> None:
        drawn = self.augment.sample_params(
            len(x), input_size=x.shape[-1], sample_ids=ids, epoch=epoch
        )
        if self.drawn is None:
            self.drawn = drawn.to(self.device)
        else:  # the graph reads from this memory
            self.drawn.records.copy_(drawn.records)
            self.drawn.keys.copy_(drawn.keys)

    def prepared(self, x: Tensor) -> Tensor:
        changed: Tensor = self.augment(x, params=self.drawn)
        return changed

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.cross_entropy(images, labels)
        torch.autograd.backward(loss)
        self.penalty.add_grad_()
        self.optimizer.step()
        return loss.detach()

    def check(self, loss: float, epoch: int) -> bool:
        return self.stopper.step(loss, epoch=epoch).stop

    def restore(self) -> int:
        found = self.stopper.restore()
        assert found is not None
        return found


class Plain(Twin):
    """The training in plain torch."""

    def _setup(self, capturable: bool) -> None:
        recipe = self.recipe
        self.model = recipe.make().to(self.device).train()
        groups: list[dict[str, Any]] = [
            {"params": self.weights()},
            {"params": self.others(), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=True,
            capturable=capturable,
        )
        self.stopper = PlainEarlyStopping(patience=recipe.patience, min_delta=0.0)
        self.stopper.model = self.model

    def images(self, x: Tensor, ids: Tensor, epoch: int) -> Tensor:
        return ((warped(x) if self.recipe.augmented else x) - MEAN) / STD

    def prepared(self, x: Tensor) -> Tensor:
        return self.images(x, x, 0)  # random on the device, anew at each replay

    def group_lasso(self) -> Tensor:
        """Return the sum over all rows of all weights: square root of the length times the norm."""
        terms = []
        for w in self.weights():
            rows = w.flatten(1)
            terms.append(math.sqrt(rows.shape[1]) * torch.linalg.vector_norm(rows, dim=1).sum())
        return self.recipe.group * torch.stack(terms).sum()

    @torch.no_grad()
    def prox(self) -> None:
        """Apply soft thresholding: w - clamp(w, -t, t)."""
        weights = self.weights()
        threshold = self.optimizer.param_groups[0]["lr"] * self.recipe.l1
        clamped = list(torch._foreach_clamp_max(weights, threshold))
        torch._foreach_clamp_min_(clamped, -threshold)
        torch._foreach_sub_(weights, clamped)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.cross_entropy(images, labels)
        torch.autograd.backward(loss + self.group_lasso())
        self.optimizer.step()
        self.prox()
        return loss.detach()

    def check(self, loss: float, epoch: int) -> bool:
        return self.stopper.stop(epoch, loss)

    def restore(self) -> int:
        found = self.stopper.finish()
        assert found is not None
        return found


def without_chance(recipe: Recipe) -> Recipe:
    """Return the recipe without dropout and augmentation: the twins then take the same steps."""
    return replace(recipe, dropout=0.0, augmented=False)
