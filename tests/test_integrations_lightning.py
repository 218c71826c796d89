"""Callbacks in Lightning's own Trainer: penalty, early stopping, and fusereg's optimizers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import other_libraries  # noqa: F401  # before Lightning

pytest.importorskip("lightning")

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping as LightningsOwn
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

import fusereg
from fusereg.integrations.lightning import EarlyStoppingCallback, PenaltyCallback
from penalized_models import assert_same_parameters as assert_same

# Lightning warns by classes of its own, which the process that collects the results would have to
# import; what it warns of here (few workers, no validation loop) is meant.
pytestmark = pytest.mark.filterwarnings("ignore")

STRENGTHS = {"l1": 0.02, "l2": 0.1, "group": 0.01}
Make = Callable[[Any], Any]


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def data(rows: int = 24) -> TensorDataset:
    x = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True).tanh())


class Regression(L.LightningModule):
    """Two layers; the penalty is in the loss if there is one."""

    def __init__(self, make: Make = sgd, in_loss: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self.net.double()
        self._make = make
        self._in_loss = in_loss
        self.skipped: tuple[int, ...] = ()
        self.values: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x.to(self.net[0].weight.dtype)) - y).square().mean()

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        if index in self.skipped:
            return None
        loss = self.loss(batch)
        if self._in_loss:
            loss = loss + fusereg.WeightPenalty(self, **STRENGTHS).penalty()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self._make(self.parameters())


def trainer(*callbacks: Any, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 2,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(model: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    made = trainer(*callbacks, **options)
    made.fit(model, DataLoader(data(), 4))
    return made


# --- penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}],
    ids=["plain", "accumulated", "clipped"],
)
def test_the_callback_trains_as_the_penalty_in_the_loss(options: dict[str, Any]) -> None:
    """Clipping tells whether the penalty is there before it, accumulation whether it is once."""
    wanted, got = Regression(in_loss=True), Regression()
    fit(wanted, **options)
    callback = PenaltyCallback(**STRENGTHS)
    made = fit(got, callback, **options)
    assert_same(wanted, got)
    assert callback.penalty is not None
    assert callback.penalty.steps == made.global_step > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, fusereg.optim.SGD], ids=["torch", "own"])
def test_a_grad_scaler_is_respected(optimizer: Any) -> None:
    """Torch's SGD gets unscaled gradients; fusereg's unscales them itself, inside the step."""

    def run(in_loss: bool, *callbacks: Any) -> Regression:
        model = Regression(lambda params: optimizer(params, lr=0.1), in_loss)
        model.net.float()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fit(model, *callbacks, plugins=[plugin], max_epochs=1)
        return model

    wanted = run(True)
    assert_same(wanted, run(False, PenaltyCallback(**STRENGTHS)), 2e-3)  # float16 activations
    with pytest.raises(AssertionError):
        assert_same(wanted, run(False), 2e-3)


def test_a_skipped_step_stays_skipped() -> None:
    """The penalty alone must not move the weights where there was no loss."""
    model = Regression()
    model.skipped = tuple(range(100))
    before = copy.deepcopy(model)
    fit(model, PenaltyCallback(**STRENGTHS))
    assert_same(before, model, 0.0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_scaler_skips_is_not_counted(fused: bool) -> None:
    """A scaler leaves the call out, or a fused step finds its flag."""
    model = nn.Linear(2, 2)
    optimizer = fusereg.optim.SGD(model.parameters(), lr=0.1)
    callback = PenaltyCallback(l1=0.1, name=None)
    penalty = callback.penalty = fusereg.WeightPenalty(model, l1=0.1)
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=None))
    counted = []
    for overflows in (False, True, True, False):
        model(torch.ones(1, 2)).sum().backward()
        callback.on_before_optimizer_step(trainer, None, optimizer)
        if fused:
            optimizer.found_inf = torch.tensor(float(overflows))  # type: ignore[attr-defined]
        if fused or not overflows:
            optimizer.step()
        counted.append(penalty.steps)
    assert counted == [1, 1, 1, 2]


class Alternating(Regression):
    """Manual optimization: each layer has an optimizer of its own, and they take turns."""

    def __init__(self, in_loss: bool = False) -> None:
        super().__init__(in_loss=in_loss)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.net[0].parameters()), sgd(self.net[3].parameters())]

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer, layer in zip(self.optimizers(), (0, 3), strict=True):
            optimizer.zero_grad()
            loss = self.loss(batch)
            if self._in_loss:
                loss = loss + fusereg.WeightPenalty(self.net[layer], **STRENGTHS).penalty()
            self.manual_backward(loss)
            optimizer.step()


def test_several_optimizers_each_get_their_parameters_penalty_once() -> None:
    wanted, got = Alternating(in_loss=True), Alternating()
    fit(wanted)
    fit(got, PenaltyCallback(**STRENGTHS))
    assert_same(wanted, got)


def test_the_value_is_logged_and_the_schedule_counts_steps() -> None:
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.0 if step < 3 else 1.0

    model = Regression()
    made = fit(model, PenaltyCallback(l1=0.5, schedule=schedule, name="r"), max_epochs=1)
    assert seen == list(range(6))
    assert made.callback_metrics["r"] > 0


def test_strengths_and_count_are_in_the_checkpoint(tmp_path: Path) -> None:
    first = PenaltyCallback(l1=0.5)
    made = fit(Regression(), first)
    assert first.penalty is not None
    first.penalty.l1 = 0.25
    made.save_checkpoint(tmp_path / "a.ckpt")
    second = PenaltyCallback(l1=0.5)
    other = trainer(second, max_epochs=3)
    other.fit(Regression(), DataLoader(data(), 4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert second.penalty is not None
    assert second.penalty.l1 == 0.25
    assert second.penalty.steps == other.global_step == 18


def test_what_does_not_work_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="l1 must be finite and not negative"):
        PenaltyCallback(l1=-1.0)

    class DeepSpeedStrategy:
        pass

    class Stub:
        strategy = DeepSpeedStrategy()

    with pytest.raises(RuntimeError, match="DeepSpeed strategy keeps the gradients"):
        PenaltyCallback(l1=1.0).on_fit_start(Stub(), Regression())


def test_the_optimizers_of_fusereg_train_in_lightning(tmp_path: Path) -> None:
    """With a scheduler, clipping inside the step, and a checkpoint in the middle."""

    def make(params: Any) -> Any:
        optimizer = fusereg.optim.AdamW(params, lr=0.05, l1=0.5, max_grad_norm=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    whole = Regression(make)
    fit(whole, max_epochs=4)
    half = fit(Regression(make), max_epochs=2)
    half.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Regression(make)
    trainer(max_epochs=4).fit(resumed, DataLoader(data(), 4), ckpt_path=tmp_path / "a.ckpt")
    assert_same(whole, resumed, 0.0)
    assert fusereg.sparsity(whole) > 0


def test_lightning_refuses_to_clip_what_the_step_unscales() -> None:
    """As the page says; ``max_grad_norm`` of the optimizer takes its place."""

    def run(largest: float | None, **options: Any) -> None:
        model = Regression(lambda p: fusereg.optim.SGD(p, lr=0.1, max_grad_norm=largest))
        model.net.float()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fit(model, plugins=[plugin], max_epochs=1, **options)

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        run(None, gradient_clip_val=0.05)
    run(0.05)


# --- early stopping -------------------------------------------------------------------------------


class Scripted(L.LightningModule):
    """Validation reports given numbers; the one weight tells in which epoch it was."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self._losses = losses
        self.validated = 0
        self.fails_in: int | None = None

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.current_epoch == self.fails_in:
            raise RuntimeError("in the midst")
        return self.weight * 0.0

    def on_train_epoch_end(self) -> None:
        self.log("train_score", -self._losses[self.current_epoch])

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.weight.fill_(float(self.current_epoch))

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self._losses[self.current_epoch])
        self.log("twice", 2.0 * self._losses[self.current_epoch])
        self.validated += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


LOSSES = [5.0, 3.0, 4.0, 2.0, 6.0, 6.0, 6.0, 1.0]
ONE = TensorDataset(torch.zeros(1, 1))


def fit_scripted(
    model: Scripted, *callbacks: Any, ckpt_path: Path | None = None, **options: Any
) -> L.Trainer:
    made = trainer(*callbacks, **{"max_epochs": len(LOSSES), **options})
    made.fit(model, DataLoader(ONE), DataLoader(ONE), ckpt_path=ckpt_path)
    return made


def test_it_stops_and_the_best_weights_are_back() -> None:
    model, stopping = Scripted(LOSSES), EarlyStoppingCallback("val_loss", patience=3)
    made = fit_scripted(model, stopping)
    assert made.current_epoch == 7  # as many epochs as were run
    assert model.validated == 7
    assert float(model.weight) == 3.0
    assert stopping.stopper is not None
    assert (stopping.stopper.best, stopping.stopper.best_epoch) == (2.0, 3)
    assert stopping.stopper.decision is not None
    assert stopping.stopper.decision.reason == "patience"
    assert made.early_stopping_callback is stopping
    assert (stopping.stopped_epoch, stopping.wait_count) == (6, 3)
    assert float(stopping.best_score) == 2.0


@pytest.mark.parametrize(("least", "ran"), [(4, 4), (5, 8), (7, 8)])
def test_a_stop_before_min_epochs_is_forgotten_if_the_metric_improves_until_then(
    least: int, ran: int
) -> None:
    """Lightning goes on up to min_epochs; by then the reason to stop may hold no more."""
    model = Scripted([1.0, 1.1, 1.2, 1.2, 0.9, 0.8, 0.8, 0.7])
    stopping = EarlyStoppingCallback("val_loss", patience=2)
    made = fit_scripted(model, stopping, min_epochs=least)
    assert made.current_epoch == ran
    assert stopping.stopper is not None
    said = "stops after epoch 3" if ran == 4 else "ended after epoch 7 without a reason to stop"
    assert stopping.stopper.explain().startswith(said)
    assert float(model.weight) == (0.0 if ran == 4 else 7.0)


@pytest.mark.parametrize("at_training_end", [True, False])
def test_it_restores_where_training_simply_ends(at_training_end: bool) -> None:
    model = Scripted(LOSSES)
    stopping = EarlyStoppingCallback(
        "val_loss", patience=9, check_on_train_epoch_end=at_training_end
    )
    fit_scripted(model, stopping, max_epochs=5)
    assert float(model.weight) == 3.0


def test_it_restores_after_an_exception() -> None:
    model = Scripted(LOSSES)
    model.fails_in = 5
    with pytest.raises(RuntimeError, match="in the midst"):
        fit_scripted(model, EarlyStoppingCallback("val_loss", patience=9))
    assert float(model.weight) == 3.0


def test_restoring_can_be_left_out() -> None:
    model = Scripted(LOSSES)
    fit_scripted(model, EarlyStoppingCallback("val_loss", patience=3, restore_best=False))
    assert float(model.weight) == 6.0


class Averaged(Scripted):
    """Its optimizer averages the weight, and it notes what it was validated with."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(losses)
        self.seen: list[float] = []
        self.fails_in_validation = False

    def validation_step(self, batch: Any, index: int) -> None:
        if not self.trainer.sanity_checking:
            self.seen.append(float(self.weight))
            if self.fails_in_validation and len(self.seen) == 6:
                raise RuntimeError("in the midst")

    def on_train_start(self) -> None:
        with torch.no_grad():
            self.weight.fill_(-8.0)

    def on_train_batch_start(self, *_: Any) -> None:
        assert float(self.weight) == (self.current_epoch - 1 if self.current_epoch else -8.0)

    def configure_optimizers(self) -> Any:
        return fusereg.optim.SGD(self.parameters(), lr=0.1, ema_decay=0.5)


@pytest.mark.parametrize("how", ["stops", "ends", "at training's end", "fails"])
def test_averages_are_validated_kept_and_restored(how: str) -> None:
    model = Averaged(LOSSES)
    model.fails_in_validation = how == "fails"
    stopping = EarlyStoppingCallback(
        "val_loss",
        patience=3 if how == "stops" else 9,
        averaged=True,
        check_on_train_epoch_end=how == "at training's end",
    )
    if how == "fails":
        with pytest.raises(RuntimeError, match="in the midst"):
            fit_scripted(model, stopping)
    else:
        fit_scripted(model, stopping, max_epochs=7)
    assert model.seen[:3] == [-8.0, -4.0, -1.5]
    assert float(model.weight) == model.seen[3]


def test_averages_that_would_not_be_kept_are_refused() -> None:
    from lightning.pytorch.callbacks import WeightAveraging

    with pytest.raises(RuntimeError, match="use averaged=True and an optimizer of fusereg"):
        fit_scripted(
            Scripted(LOSSES), EarlyStoppingCallback("val_loss", patience=3), WeightAveraging()
        )
    with pytest.raises(RuntimeError, match="averaged=True needs an optimizer of fusereg"):
        fit_scripted(Scripted(LOSSES), EarlyStoppingCallback("val_loss", patience=3, averaged=True))


def test_a_metric_logged_at_the_end_of_the_training_epoch_is_there() -> None:
    """Lightning calls callbacks that monitor something after the module's own hook."""
    model = Scripted(LOSSES)
    fit_scripted(model, EarlyStoppingCallback("train_score", mode="max", patience=3))
    assert float(model.weight) == 3.0


@pytest.mark.parametrize("kind", ["parts of an epoch", "every second epoch", "two loaders"])
def test_checks_are_those_of_the_validations(kind: str) -> None:
    """However often Lightning validates, and on however many loaders."""
    seen: list[float] = []

    class Model(Scripted):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            pass

        def on_validation_epoch_end(self) -> None:
            seen.append(LOSSES[len(seen)])
            self.log("val_loss", seen[-1])

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.weight.add_(1.0)  # as many as there were batches

    options = {
        "parts of an epoch": {"val_check_interval": 0.5},
        "every second epoch": {"check_val_every_n_epoch": 2},
        "two loaders": {},
    }[kind]
    one = DataLoader(TensorDataset(torch.zeros(2, 1)))
    model, stopping = Model([0.0] * 20), EarlyStoppingCallback("val_loss", patience=3)
    validation = [one, one] if kind == "two loaders" else one
    trainer(stopping, max_epochs=20, **options).fit(model, one, validation)
    assert seen == LOSSES[:7]  # the best is the fourth
    assert stopping.stopper is not None
    assert stopping.stopper.best == 2.0
    batches = {"parts of an epoch": 1, "every second epoch": 4, "two loaders": 2}[kind]
    assert float(model.weight) == 4.0 * batches


def test_a_trial_run_makes_no_checks() -> None:
    stopping = EarlyStoppingCallback("val_loss", patience=1)
    fit_scripted(Scripted(LOSSES), stopping, fast_dev_run=True)
    assert stopping.stopper is not None
    assert stopping.stopper.explain() == "no check yet"


def test_a_search_for_a_rate_leaves_no_trace() -> None:
    """Lightning trains and validates for a while, and sets back what it knows of."""
    from lightning.pytorch.tuner import Tuner

    class Tuned(Regression):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def on_validation_epoch_end(self) -> None:
            self.log("loss", self.net[0].weight.detach().abs().sum())

    def callbacks() -> list[Any]:
        return [PenaltyCallback(l1=0.02), EarlyStoppingCallback("loss", patience=2)]

    loader = DataLoader(data(), 4)
    found, plain = Tuned(), Tuned()
    penalty, stopping = callbacks()
    searched = trainer(penalty, stopping)
    Tuner(searched).lr_find(found, loader, loader, num_training=5, update_attr=False)
    assert penalty.penalty is None or penalty.penalty.steps == 0
    assert stopping.stopper is None or stopping.stopper.epoch is None
    searched.fit(found, loader, loader)
    trainer(*callbacks()).fit(plain, loader, loader)
    assert_same(found, plain, 0.0)
    assert penalty.penalty is not None
    assert penalty.penalty.steps == 12


def test_several_metrics() -> None:
    model = Scripted(LOSSES)
    stopping = EarlyStoppingCallback(weights={"val_loss": 1.0, "twice": -1.0}, patience=1)
    fit_scripted(model, stopping)  # the sum is the negative loss, which grows at epoch 1
    assert float(model.weight) == 0.0


def test_a_missing_metric_is_named_or_left() -> None:
    with pytest.raises(ValueError, match=r"no metric val_los; there are .*val_loss"):
        fit_scripted(Scripted(LOSSES), EarlyStoppingCallback("val_los", patience=1))
    model = Scripted(LOSSES)
    fit_scripted(model, EarlyStoppingCallback("val_los", patience=1, strict=False))
    assert float(model.weight) == 7.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"monitor": "a", "patience": 0}, "patience"),
        ({"monitor": "a", "patience": 1, "mode": "up"}, "mode"),
        ({"patience": 1}, "the name of one metric"),
        ({"monitor": "a", "metrics": {"b": "min"}, "patience": 1}, "the name of one metric"),
    ],
)
def test_wrong_arguments_are_told_when_the_callback_is_made(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        EarlyStoppingCallback(**options)


@pytest.mark.parametrize("in_checkpoint", [True, False])
def test_a_resumed_run_decides_and_restores_as_an_unbroken_one(
    in_checkpoint: bool, tmp_path: Path
) -> None:
    def make() -> EarlyStoppingCallback:
        return EarlyStoppingCallback("val_loss", patience=3, snapshot_in_checkpoint=in_checkpoint)

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fit_scripted(Scripted(LOSSES), make(), keeper, max_epochs=5)
    stopping, model = make(), Scripted(LOSSES)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit_scripted(model, stopping, ckpt_path=tmp_path / "epoch=4.ckpt")
    lost = [w for w in said if "of epoch 3, are not in the checkpoint" in str(w.message)]
    assert len(lost) == (not in_checkpoint)
    assert stopping.stopper is not None
    assert stopping.stopper.epoch == 6
    assert stopping.stopper.best_epoch == 3
    # Without the weights in the checkpoint those of epoch 3 are gone: the last ones stay.
    assert float(model.weight) == (3.0 if in_checkpoint else 6.0)


def test_the_last_checkpoint_holds_what_training_ended_with(tmp_path: Path) -> None:
    """The optimizer's state in it belongs to those weights, not to the best ones."""
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    model = Scripted(LOSSES)
    fit_scripted(model, EarlyStoppingCallback("val_loss", patience=3), keeper)
    saved = torch.load(keeper.last_model_path, weights_only=True)
    assert float(saved["state_dict"]["weight"]) == 6.0
    assert float(model.weight) == 3.0


def test_the_folder_and_what_else_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    stopping = EarlyStoppingCallback(
        "val_loss",
        patience=3,
        folder=tmp_path,
        also=lambda trainer: {"optimizer": trainer.optimizers[0]},
    )
    fit_scripted(Scripted(LOSSES), stopping)
    best = fusereg.early_stopping.load_best(tmp_path)
    assert best.epoch == 3
    assert float(best.states["model"]["weight"]) == 3.0
    assert set(best.states) == {"model", "optimizer"}


def test_another_fit_of_the_same_trainer_goes_on_and_of_another_one_begins_anew() -> None:
    model, stopping = Scripted(LOSSES), EarlyStoppingCallback("val_loss", patience=9)
    made = fit_scripted(model, stopping, max_epochs=4)
    first = stopping.stopper
    made.fit_loop.max_epochs = 6
    made.fit(model, DataLoader(ONE), DataLoader(ONE))
    assert stopping.stopper is first
    assert first is not None
    assert first.epoch == 5
    fit_scripted(model, stopping, max_epochs=2)
    assert stopping.stopper is not first
    assert pickle.loads(pickle.dumps(stopping)).stopper is not None


ON_TWO = """
import sys
import other_libraries
import torch
from torch.utils.data import DataLoader
import test_integrations_lightning as t

class Apart(t.Scripted):
    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        rank = self.trainer.global_rank  # the ranks' losses are apart; their mean is the script's
        self.log("apart", t.LOSSES[self.current_epoch] + (1.5 if rank else -1.5))

model = Apart(t.LOSSES)
regression = t.Regression()
stopping = t.EarlyStoppingCallback("apart", patience=3)
options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
made = t.trainer(stopping, max_epochs=8, **options)
made.fit(model, DataLoader(t.ONE), DataLoader(t.ONE))
assert (made.current_epoch, float(model.weight)) == (7, 3.0), (made.current_epoch, model.weight)
assert stopping.stopper.best == 2.0, stopping.stopper.best

# Each rank has the same data, so that the averaged gradients are those of one process.
wanted = t.Regression(in_loss=True)
made = t.trainer(t.PenaltyCallback(**t.STRENGTHS), **options)
made.fit(regression, DataLoader(t.data(), 4))
plain = t.sgd(wanted.parameters())
for batch in [*DataLoader(t.data(), 4)] * 2:
    plain.zero_grad()
    wanted.training_step(batch, 0).backward()
    plain.step()
t.assert_same(wanted, regression)
sys.stdout.write(f"rank {made.global_rank} is done\\n")
"""


@pytest.mark.slow
def test_two_processes_decide_together_and_have_the_penalty_once(tmp_path: Path) -> None:
    program = tmp_path / "on_two.py"
    program.write_text(ON_TWO)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    here = Path(__file__).resolve().parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(program)],
        cwd=here,
        env={**os.environ, "GLOO_SOCKET_IFNAME": loopback, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 is done" in done.stdout
    assert "rank 1 is done" in done.stdout


def test_it_decides_as_lightnings_own_where_that_one_is_right() -> None:
    own, model = LightningsOwn("val_loss", patience=3), Scripted(LOSSES)
    made = fit_scripted(model, own)
    assert made.current_epoch == 7
    assert float(model.weight) == 6.0  # and does not restore


def test_the_other_name_of_the_library() -> None:
    """A trainer of pytorch_lightning takes the callbacks too."""
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1).double()

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", 1.0 + self.current_epoch)

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    stopping = EarlyStoppingCallback("val_loss", patience=2)
    made = other.Trainer(
        callbacks=[stopping, PenaltyCallback(l1=0.1)],
        accelerator="cpu",
        logger=False,
        max_epochs=9,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made.fit(Module(), DataLoader(data(), 4), DataLoader(data(), 4))
    assert made.current_epoch == 3
    assert made.callback_metrics["penalty"] > 0
