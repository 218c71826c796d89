"""Trains a technique's two networks side by side: with fusereg and in plain PyTorch.

Both start from the same weights and see the same batches in the same order. Their epochs alternate,
and take turns in going first, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.demo.data import CLASSES, DataSet
from fusereg.demo.techniques import Method, Technique, linear_weights, make_network

BATCH = 32
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Epoch:
    """Figures after an epoch. Losses are the mean cross-entropy alone, without a penalty."""

    train_loss: float
    test_loss: float
    validation_loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Compacted:
    """Figures of a network before and after the removal of what is zero in it."""

    parameters: tuple[int, int]
    operations: tuple[int, int]  # multiply-adds of an image
    milliseconds: tuple[float, float]  # for a batch
    test_accuracy: tuple[float, float]
    batch: int


@dataclass
class Run:
    """One network's training."""

    provider: str  # "fusereg" or "PyTorch"
    model: nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    epochs: list[Epoch] = field(default_factory=list)
    step_losses: list[Tensor] = field(default_factory=list)
    stopped: bool = False  # by its method, before the last epoch or at it
    restored: int | None = None  # the epoch (from 0) whose model was restored at the end
    compacted: Compacted | None = None

    @property
    def last(self) -> Epoch:
        """The epoch whose model the run ended with."""
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
        """Median over the epochs, which an interruption does not move."""
        return statistics.median(epoch.seconds for epoch in self.epochs)

    @property
    def losses(self) -> Tensor:
        """Loss of every step, penalty included, in float64 on the CPU."""
        return torch.cat(self.step_losses).double().cpu()

    @property
    def diverged(self) -> bool:
        """Return whether a loss became infinite or NaN."""
        return not bool(torch.isfinite(self.losses).all()) or not math.isfinite(self.last.test_loss)


@dataclass(frozen=True)
class Result:
    """A technique's row: its run with fusereg, and the one in plain PyTorch if there is one."""

    technique: Technique
    fused: Run
    plain: Run | None

    def _difference(self, steps: int | None) -> float | None:
        if self.plain is None or not self.technique.same_steps:
            return None
        shared = min(len(self.fused.losses), len(self.plain.losses), steps or 1 << 62)
        return float((self.fused.losses[:shared] - self.plain.losses[:shared]).abs().max())

    @property
    def max_loss_difference(self) -> float | None:
        """Largest difference between both losses over all steps; None if not comparable."""
        return self._difference(None)

    @property
    def first_epoch_difference(self) -> float | None:
        """Largest difference over the first epoch, before training has amplified the rounding."""
        return self._difference(len(self.fused.step_losses[0]))


# (technique, provider, epochs done by this provider, cross-entropy on the training images)
OnEpoch = Callable[[Technique, str, int, float], None]


def _start(provider: str, method: Method, data: DataSet, seed: int) -> Run:
    base = make_network(data.pixels, CLASSES, seed)
    method.model = method.network(*copy.deepcopy(base)).to(data.train_images.device)
    method.weights = linear_weights(method.model)
    method.learning_rate, method.image_size = LEARNING_RATE, (data.height, data.width)
    method.prepare()
    return Run(provider, method.model, method, method.optimizer())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train_epoch(run: Run, data: DataSet, order: Tensor) -> float:
    """Make one pass over the training images in this order; return its wall time in seconds."""
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
    run.step_losses.append(losses)
    return time.perf_counter() - started


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy."""
    model.eval()
    loss, correct = 0.0, 0
    for some, wanted in zip(torch.split(images, 8192), torch.split(labels, 8192), strict=True):
        output = model(some)
        loss += float(F.cross_entropy(output, wanted, reduction="sum"))
        correct += int((output.argmax(dim=1) == wanted).sum())
    return loss / len(labels), correct / len(labels)


@torch.no_grad()
def _compacted(run: Run, data: DataSet) -> Compacted | None:
    """Compare a network with the one without its zeros, if the method makes one."""
    small = None if run.diverged else run.method.smaller()
    if small is None:
        return None
    images = data.test_images[:1024]
    models = (run.model.eval(), small.eval())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(20):  # in turn, so that other load on the machine affects both alike
        for model, own in zip(models, times, strict=True):
            _synchronize(images.device)
            started = time.perf_counter()
            model(images)
            _synchronize(images.device)
            own.append(1e3 * (time.perf_counter() - started))
    accuracies = [_evaluate(m, data.test_images, data.test_labels)[1] for m in models]
    counts = [sum(p.numel() for p in m.parameters()) for m in models]
    operations = [sum(w.numel() for w in linear_weights(m)) for m in models]
    return Compacted(
        (counts[0], counts[1]),
        (operations[0], operations[1]),
        (statistics.median(times[0]), statistics.median(times[1])),
        (accuracies[0], accuracies[1]),
        len(images),
    )


def _epoch(run: Run, number: int, data: DataSet, order: Tensor) -> None:
    """Train and evaluate one epoch, and ask the method whether to stop."""
    seconds = _train_epoch(run, data, order)
    train_loss, train_accuracy = _evaluate(run.model, data.train_images, data.train_labels)
    test_loss, test_accuracy = _evaluate(run.model, data.test_images, data.test_labels)
    watched, _ = _evaluate(run.model, data.validation_images, data.validation_labels)
    started = time.perf_counter()
    run.stopped = run.method.stop(number, watched)
    seconds += time.perf_counter() - started
    run.epochs.append(Epoch(train_loss, test_loss, watched, train_accuracy, test_accuracy, seconds))


def train_pair(
    technique: Technique,
    data: DataSet,
    *,
    epochs: int,
    seed: int,
    baseline: bool = True,
    on_epoch: OnEpoch | None = None,
) -> Result:
    """Train one technique with fusereg and, with `baseline`, in plain PyTorch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for methods that draw from torch's own generator
        fused, plain = _start("fusereg", technique.fused(**technique.settings), data, seed), None
        if baseline and technique.plain is not None:
            plain = _start("PyTorch", technique.plain(**technique.settings), data, seed)
        runs = [run for run in (fused, plain) if run is not None]
        shuffle = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            order = torch.randperm(len(data.train_images), generator=shuffle)
            order = order.to(data.train_images.device)
            for run in runs[:: 1 if epoch % 2 == 0 else -1]:
                if not run.stopped:
                    _epoch(run, epoch, data, order)
                    if on_epoch is not None:
                        on_epoch(technique, run.provider, epoch + 1, run.epochs[-1].train_loss)
        for run in runs:
            run.restored = run.method.finish()
            run.compacted = _compacted(run, data)
    return Result(technique, fused, plain)
