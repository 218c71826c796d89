"""Handlers on ignite's own engines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import other_libraries  # noqa: F401  # before ignite

pytest.importorskip("ignite")

from ignite.engine import (
    Engine,
    Events,
    create_supervised_trainer,
    supervised_training_step_amp,
)
from ignite.handlers import Checkpoint, DiskSaver
from ignite.handlers import EarlyStopping as IgnitesEarlyStopping

import fusereg
from fusereg.integrations.ignite import EarlyStoppingHandler, PenaltyHandler
from penalized_models import assert_same_parameters as assert_same

STRENGTHS = {"l1": 0.02, "l2": 0.1, "group": 0.01}
LOSSES = [5.0, 3.0, 4.0, 2.0, 6.0, 6.0, 6.0, 1.0]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(6, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [(part, part.sum(1, keepdim=True).tanh()) for part in x]


# --- penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_handler_trains_as_the_penalty_in_the_loss(accumulate: int) -> None:
    def run(handler: bool) -> tuple[nn.Module, fusereg.WeightPenalty, Engine]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        penalty = fusereg.WeightPenalty(model, **STRENGTHS)

        def loss(out: Tensor, y: Tensor) -> Tensor:
            value = (out - y).square().mean()
            return value if handler else value + penalty.penalty()

        trainer = create_supervised_trainer(
            model, optimizer, loss, gradient_accumulation_steps=accumulate
        )
        if handler:
            PenaltyHandler(penalty, optimizer).attach(trainer)
        trainer.run(batches(), max_epochs=2)
        return model, penalty, trainer

    wanted, _, _ = run(False)
    got, penalty, trainer = run(True)
    assert_same(wanted, got)
    assert penalty.steps == 12 // accumulate
    assert float(trainer.state.metrics["penalty"]) > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, fusereg.optim.SGD], ids=["torch", "own"])
def test_a_grad_scaler_is_respected(optimizer: Any) -> None:
    def run(handler: bool) -> nn.Module:
        model = network().float()
        made = optimizer(model.parameters(), lr=0.1)
        penalty = fusereg.WeightPenalty(model, **STRENGTHS)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

        def loss(out: Tensor, y: Tensor) -> Tensor:
            value = (out - y).square().mean()
            return value if handler else value + penalty.penalty()

        trainer = Engine(supervised_training_step_amp(model, made, loss, "cpu", scaler=scaler))
        if handler:
            PenaltyHandler(penalty, made).attach(trainer)
        with torch.autocast("cpu", enabled=False):
            trainer.run([(x.float(), y.float()) for x, y in batches()], max_epochs=1)
        return model

    assert_same(run(False), run(True), 2e-2)


def test_it_leaves_the_optimizer_when_the_run_is_over_or_broken() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = 0

    def update(engine: Engine, batch: Any) -> None:
        nonlocal steps
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        steps += 1
        if steps == 1:
            raise RuntimeError("in the midst")

    handler = PenaltyHandler(fusereg.WeightPenalty(model, l2=0.5), optimizer)
    trainer, another = Engine(update), Engine(update)
    handler.attach(trainer)
    handler.attach(another)
    weight = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="in the midst"):
        trainer.run([0], max_epochs=1)
    assert torch.allclose(model[0].weight, weight * 0.5)
    another.run([0], max_epochs=1)  # attached once, not twice
    assert torch.allclose(model[0].weight, weight * 0.25)
    update(trainer, None)
    assert torch.allclose(model[0].weight, weight * 0.25)


def test_each_optimizer_has_a_handler_and_clipping_comes_before() -> None:
    model = network()
    layers = (model[0], model[3])
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]

    def update(engine: Engine, batch: Any) -> None:
        model(batch[0]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-14)
        for optimizer in optimizers:
            optimizer.step()

    trainer = Engine(update)
    for i, optimizer in enumerate(optimizers):
        penalty = fusereg.WeightPenalty(model, l2=1.0)
        PenaltyHandler(penalty, optimizer, name=f"penalty{i}").attach(trainer)
    before = [layer.weight.detach().clone() for layer in layers]
    trainer.run(batches()[:1], max_epochs=1)
    for i, (layer, weight) in enumerate(zip(layers, before, strict=True)):
        torch.testing.assert_close(layer.weight.detach(), 0.9 * weight)
        value = float(trainer.state.metrics[f"penalty{i}"])
        assert value == pytest.approx(float(weight.square().sum()) / 2)


# --- early stopping -------------------------------------------------------------------------------


class Run:
    """Training whose one weight is the epoch, and an evaluator that reports given numbers."""

    def __init__(self, fails_in: int | None = None, **options: Any) -> None:
        self.model = nn.Linear(1, 1)

        def update(engine: Engine, batch: Any) -> None:
            if engine.state.epoch == fails_in:
                raise RuntimeError("in the midst")
            with torch.no_grad():
                self.model.weight.fill_(float(engine.state.epoch))

        self.trainer = Engine(update)
        self.evaluator = Engine(lambda *_: None)
        self.evaluator.add_event_handler(Events.COMPLETED, self.measure)
        arguments: dict[str, Any] = {"monitor": "loss", "patience": 3, **options}
        self.handler = EarlyStoppingHandler(self.model, self.trainer, **arguments)
        self.handler.attach(self.evaluator)
        self.trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: self.evaluator.run([0], max_epochs=1)
        )

    def measure(self) -> None:
        value = LOSSES[self.trainer.state.epoch - 1]
        self.evaluator.state.metrics = {"loss": value, "score": -value}

    def run(self, epochs: int = 8) -> int:
        return int(self.trainer.run([0], max_epochs=epochs).epoch)

    @property
    def weight(self) -> float:
        return float(self.model.weight)


def test_it_stops_and_the_best_weights_are_back() -> None:
    run = Run()
    assert run.run() == 7
    assert run.weight == 4.0
    assert (run.handler.stopper.best, run.handler.stopper.best_epoch) == (2.0, 4)
    run.evaluator.run([0], max_epochs=1)  # after training: no check any more
    assert run.handler.stopper.misses == 3


def test_a_second_run_begins_with_new_records() -> None:
    run = Run(patience=9)
    for _ in range(2):
        assert run.run(6) == 6
        assert run.weight == 4.0
        stopper = run.handler.stopper
        assert (stopper.epoch, stopper.best_epoch, stopper.misses) == (6, 4, 2)
        assert stopper.explain() == (
            "ended after epoch 6 without a reason to stop; best metric 2 at epoch 4, restored"
        )


def test_it_restores_where_training_simply_ends() -> None:
    run = Run(monitor="score", mode="max", patience=9)
    assert run.run(6) == 6
    assert run.weight == 4.0


def test_restoring_can_be_left_out() -> None:
    run = Run(restore_best=False)
    run.run()
    assert run.weight == 7.0


def test_a_with_block_restores_after_an_exception() -> None:
    run = Run(fails_in=6)
    with pytest.raises(RuntimeError, match="in the midst"), run.handler:
        run.run()
    assert run.weight == 4.0
    with run.handler:  # and does nothing where nothing is left to do
        pass


def test_several_metrics_and_a_missing_one() -> None:
    run = Run(monitor=None, metrics={"loss": "min", "score": "max"})
    assert run.run() == 7
    with pytest.raises(ValueError, match="no metric f1; there are loss, score"):
        Run(monitor="f1").run()
    with pytest.raises(ValueError, match="the name of one metric"):
        Run(monitor=None)


def test_checkpoints_of_ignite_hold_both(tmp_path: Path) -> None:
    """The run goes on from the file with the same decisions; the best from before is back."""
    whole = Run()
    whole.run()
    first, second = Run(), Run()
    penalties = [fusereg.WeightPenalty(nn.Linear(2, 2), l1=s) for s in (0.25, 0.5)]
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.1)

    def parts(run: Run, penalty: fusereg.WeightPenalty) -> dict[str, Any]:
        return {
            "trainer": run.trainer,
            "model": run.model,
            "stopping": run.handler,
            "penalty": PenaltyHandler(penalty, optimizer),
        }

    saver = Checkpoint(parts(first, penalties[0]), DiskSaver(str(tmp_path)), n_saved=None)
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    first.run(5)
    file = next(path for path in tmp_path.iterdir() if "_5" in path.name)
    Checkpoint.load_objects(parts(second, penalties[1]), checkpoint=str(file))
    assert second.run() == 7
    assert second.weight == whole.weight == 4.0
    assert second.handler.stopper.explain() == whole.handler.stopper.explain()
    assert penalties[1].l1 == 0.25


# --- what the migration page says of ignite's own handler -----------------------------------------


@pytest.mark.parametrize(
    ("cumulative", "delta", "same"), [(True, 0.4, True), (False, 0.0, True), (False, 0.4, False)]
)
def test_early_stopping_counts_as_ignites_does_where_the_page_says_so(
    cumulative: bool, delta: float, same: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    stops: list[tuple[int, int]] = []
    for _ in range(40):
        scores = torch.rand(12, generator=generator).cumsum(0).mul(0.3).tolist()
        trainer = Engine(lambda engine, batch: None)
        arguments: dict[str, Any] = {"cumulative": cumulative, "threshold": delta}
        if "cumulative" not in inspect.signature(IgnitesEarlyStopping).parameters:
            arguments = {"cumulative_delta": cumulative, "min_delta": delta}
        theirs = IgnitesEarlyStopping(2, lambda engine: engine.state.metrics, trainer, **arguments)
        ours = fusereg.EarlyStopping(None, patience=2, mode="max", min_delta=delta)
        found = [12, 12]
        for epoch, score in enumerate(scores):
            trainer.state.metrics = score
            theirs(trainer)
            if trainer.should_terminate:
                found[0] = min(found[0], epoch)
            if not ours.stopped:
                ours.step(score, epoch=epoch)
            if ours.stopped:
                found[1] = min(found[1], epoch)
        stops.append((found[0], found[1]))
    assert all(a == b for a, b in stops) == same
