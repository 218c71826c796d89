"""Trains a technique's two networks side by side: by fusereg and in plain PyTorch.

Both start from the same weights and see the same batches in the same order. Their epochs alternate,
and swap who goes first, so that whatever else the machine does meanwhile hits both alike.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.demo.data import CLASSES, DataSet
from fusereg.demo.techniques import Method, Technique, linear_weights, make_network

BATCH = 32
LEARNING_RATE = 0.1

FUSED = "fusereg"
PLAIN = "pytorch"


@dataclass(frozen=True)
class Epoch:
    """State after an epoch. Losses are the mean cross-entropy alone, without a penalty."""

    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float


@dataclass
class Run:
    """One network's training: by fusereg or in plain PyTorch."""

    provider: str
    model: nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    epochs: list[Epoch] = field(default_factory=list)
    step_losses: list[Tensor] = field(default_factory=list)
    stopped: bool = False  # by its method, before the last epoch or at it
    restored: int | None = None  # the epoch (from 0) whose model was brought back at the end

    @property
    def last(self) -> Epoch:
        """The epoch that the model is of now."""
        return self.epochs[-1 if self.restored is None else self.restored]

    @property
    def gap(self) -> float:
        """Training accuracy minus test accuracy."""
        return self.last.train_accuracy - self.last.test_accuracy

    @property
    def zeros(self) -> float:
        """Share of exact zeros among the weights (not the biases)."""
        return float(fusereg.sparsity(linear_weights(self.model)))

    @property
    def seconds_per_epoch(self) -> float:
        """Median over the epochs: an interruption of the machine does not move it."""
        return statistics.median(epoch.seconds for epoch in self.epochs)

    @property
    def losses(self) -> Tensor:
        """Loss of every step, penalty included, in double on the CPU."""
        return torch.cat(self.step_losses).double().cpu()

    @property
    def diverged(self) -> bool:
        return not bool(torch.isfinite(self.losses).all()) or not math.isfinite(self.last.test_loss)


@dataclass(frozen=True)
class Result:
    """A technique's row: its run by fusereg, and the one in plain PyTorch if there is one."""

    technique: Technique
    fused: Run
    plain: Run | None

    def _differences(self) -> Tensor | None:
        if self.plain is None or not self.technique.same_steps:
            return None
        steps = min(len(self.fused.losses), len(self.plain.losses))
        return (self.fused.losses[:steps] - self.plain.losses[:steps]).abs()

    @property
    def max_loss_difference(self) -> float | None:
        """Greatest difference between both losses over all steps; None if not comparable."""
        differences = self._differences()
        return None if differences is None else float(differences.max())

    @property
    def first_epoch_difference(self) -> float | None:
        """The same over the first epoch, before training has amplified the rounding."""
        differences = self._differences()
        if differences is None:
            return None
        return float(differences[: len(self.fused.step_losses[0])].max())


# (technique, provider, epochs done of this provider, cross-entropy on the training images)
OnEpoch = Callable[[Technique, str, int, float], None]


def _start(method: Method, provider: str, data: DataSet, seed: int) -> Run:
    base = make_network(data.pixels, CLASSES, seed)
    model = method.network(copy.deepcopy(base)).to(data.train_images.device)
    method.image_size = (data.height, data.width)
    method.attach(model, LEARNING_RATE)
    return Run(provider, model, method, method.optimizer())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train_epoch(run: Run, data: DataSet, order: Tensor) -> float:
    """One pass over the training images in this order; gives its wall time in seconds."""
    device = data.train_images.device
    batches = torch.split(order, BATCH)
    losses = torch.zeros(len(batches), device=device)
    run.model.train()
    method, optimizer, model = run.method, run.optimizer, run.model
    _synchronize(device)
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        output = model(method.images(data.train_images[batch]))
        loss = F.cross_entropy(output, data.train_labels[batch])
        term = method.loss_term()
        if term is not None:
            loss = loss + term
        torch.autograd.backward(loss)
        value = method.after_backward()
        optimizer.step()
        method.after_step()
        # Kept on the device: reading a number here would make every step wait for it.
        losses[step] = loss.detach() if value is None else loss.detach() + value
    _synchronize(device)
    seconds = time.perf_counter() - started
    run.step_losses.append(losses)
    return seconds


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    model.eval()
    loss, right = 0.0, 0
    for some, wanted in zip(torch.split(images, 8192), torch.split(labels, 8192), strict=True):
        output = model(some)
        loss += float(F.cross_entropy(output, wanted, reduction="sum"))
        right += int((output.argmax(dim=1) == wanted).sum())
    return loss / len(labels), right / len(labels)


def _epoch(run: Run, data: DataSet, order: Tensor) -> Epoch:
    seconds = _train_epoch(run, data, order)
    train_loss, train_accuracy = _evaluate(run.model, data.train_images, data.train_labels)
    test_loss, test_accuracy = _evaluate(run.model, data.test_images, data.test_labels)
    return Epoch(train_loss, test_loss, train_accuracy, test_accuracy, seconds)


def train_pair(
    technique: Technique,
    data: DataSet,
    *,
    epochs: int,
    seed: int,
    baseline: bool = True,
    on_epoch: OnEpoch | None = None,
) -> Result:
    """Trains one technique by fusereg and, with `baseline`, in plain PyTorch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for methods that draw from torch's own generator
        runs = [_start(technique.fused(), FUSED, data, seed)]
        if baseline and technique.plain is not None:
            runs.append(_start(technique.plain(), PLAIN, data, seed))
        shuffle = torch.Generator().manual_seed(seed)
        active = list(runs)
        for epoch in range(epochs):
            order = torch.randperm(len(data.train_images), generator=shuffle)
            order = order.to(data.train_images.device)
            for run in list(active if epoch % 2 == 0 else reversed(active)):
                run.epochs.append(_epoch(run, data, order))
                if on_epoch is not None:
                    on_epoch(technique, run.provider, epoch + 1, run.last.train_loss)
                started = time.perf_counter()
                ended = run.method.stop(epoch, run.last.test_loss)
                passed = run.last.seconds + time.perf_counter() - started
                run.epochs[-1] = replace(run.last, seconds=passed)
                if ended:
                    run.stopped = True
                    active.remove(run)
        for run in runs:
            run.restored = run.method.finish()
    return Result(technique, runs[0], runs[1] if len(runs) > 1 else None)
