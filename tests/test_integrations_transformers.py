"""Callbacks and the optimizer factory in Hugging Face's own Trainer, with a small model."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import other_libraries  # noqa: F401  # before transformers

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments

import fusereg
from fusereg.integrations.transformers import EarlyStoppingCallback, PenaltyCallback, optimizer_of
from penalized_models import assert_same_parameters

STRENGTHS = {"l1": 0.02, "l2": 0.1, "group": 0.01}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 24) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 6, generator=draw)
        self.y = self.x.sum(1, keepdim=True).tanh()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Regression(nn.Module):
    """Two layers; the penalty is in the loss if there is one."""

    def __init__(self, in_loss: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self._in_loss = in_loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        loss = (out - labels).square().mean()
        if self._in_loss:
            loss = loss + fusereg.WeightPenalty(self, **STRENGTHS).penalty()
        return {"loss": loss, "logits": out}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "logging_steps": 2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def train(
    model: nn.Module, args: TrainingArguments, *callbacks: Any, resume: Any = None, **options: Any
) -> Trainer:
    trainer = Trainer(
        model,
        args,
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        callbacks=list(callbacks),
        **{"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05}), **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


assert_same = functools.partial(assert_same_parameters, tolerance=1e-6)


# --- penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_callback_trains_as_the_penalty_in_the_loss(accumulate: int, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 3}
    wanted, got = Regression(in_loss=True), Regression()
    train(wanted, arguments(tmp_path, **options))
    callback = PenaltyCallback(**STRENGTHS)
    trainer = train(got, arguments(tmp_path, **options), callback)
    assert_same(wanted, got)
    assert callback.penalty is not None
    assert callback.penalty.steps == trainer.state.global_step > 0


def test_clipping_leaves_the_penalty_alone(tmp_path: Path) -> None:
    """The Trainer clips before its last event: with next to no loss gradient the penalty is all."""
    model = Regression()
    before = [p.detach().clone() for p in model.parameters()]
    callback = PenaltyCallback(l2=1.0)
    train(model, arguments(tmp_path, max_grad_norm=1e-12, max_steps=1), callback)
    weight, bias = model.net[0].weight, model.net[0].bias
    assert torch.allclose(weight, before[0] * 0.95, atol=1e-6)
    assert torch.equal(bias, before[1])


class Scaled(Trainer):
    """fp16 wants a GPU; a scaler on the CPU stands in for the one that Accelerate makes there."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, fusereg.optim.SGD], ids=["torch", "own"])
@pytest.mark.parametrize("max_norm", [0.0, 100.0], ids=["not clipped", "clipped"])
def test_a_grad_scaler_is_respected(optimizer: Any, max_norm: float, tmp_path: Path) -> None:
    def run(in_loss: bool, *callbacks: Any) -> nn.Module:
        model = Regression(in_loss)
        args = arguments(tmp_path, max_grad_norm=max_norm, num_train_epochs=1)
        trainer = Scaled(
            model,
            args,
            train_dataset=Rows(),
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=(optimizer, {"lr": 0.05}),
        )
        with torch.autocast("cpu", enabled=False):
            trainer.train()
        assert trainer.accelerator.scaler.get_scale() == 256.0
        return model

    assert_same(run(True), run(False, PenaltyCallback(**STRENGTHS)), tolerance=2e-3)


def test_the_value_is_in_the_log_and_strengths_are_resumed(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=1)
    first = PenaltyCallback(l1=0.5)
    trainer = train(Regression(), args, first)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    assert all(entry["penalty"] > 0 for entry in logged)

    class Halve(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            assert second.penalty is not None
            second.penalty.l1 = 0.25

    second = PenaltyCallback(l1=0.5)
    train(Regression(), args, second, Halve())
    third = PenaltyCallback(l1=0.5)
    args = arguments(tmp_path, save_strategy="no", num_train_epochs=2)
    train(Regression(), args, third, resume=str(tmp_path / "checkpoint-6"))
    assert third.penalty is not None
    assert third.penalty.l1 == 0.25
    assert third.penalty.steps == 12


def test_it_leaves_the_optimizer_when_training_ends(tmp_path: Path) -> None:
    trainer = train(Regression(), arguments(tmp_path), PenaltyCallback(l2=1.0))
    optimizer = trainer.optimizer.optimizer
    weight = trainer.model.net[0].weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_deepspeed_is_refused() -> None:
    class Arguments:
        deepspeed = "zero.json"

    with pytest.raises(RuntimeError, match="DeepSpeed keeps the gradients"):
        PenaltyCallback(l1=1.0).on_train_begin(Arguments(), None, None)


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad", "FTRL"])
def test_the_factory_takes_the_training_arguments(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1, adam_beta2=0.9, num_train_epochs=1)
    model = Regression()
    model.net[3].bias.requires_grad_(False)
    l1 = 5.0 if name == "FTRL" else 0.5
    trainer = train(
        model, args, optimizer_cls_and_kwargs=optimizer_of(args, name, l1=l1, max_grad_norm=1.0)
    )
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is getattr(fusereg.optim, name)
    decayed, rest = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.net[0].weight), id(model.net[3].weight)]
    assert len(rest["params"]) == 3  # without the frozen bias
    assert (decayed["weight_decay"], decayed["l1"]) == (0.1, l1)
    assert (rest["weight_decay"], rest["l1"]) == (0.0, 0.0)
    assert decayed["initial_lr"] == 0.05  # the Trainer's scheduler drives it
    assert decayed["lr"] < 0.05
    if name.startswith("Adam"):
        assert decayed["betas"] == (0.9, 0.9)
    assert optimizer.grad_norm > 0
    assert fusereg.sparsity(model) > 0


def test_adamw_of_fusereg_is_the_trainers_own(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1, max_grad_norm=0.5)
    wanted, got = Regression(), Regression()
    train(wanted, args, optimizer_cls_and_kwargs=None)
    train(got, args, optimizer_cls_and_kwargs=optimizer_of(args))
    assert_same(wanted, got)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])  # linear is the default
def test_ftrl_learns_under_the_trainers_schedule(schedule: str, tmp_path: Path) -> None:
    """The rate ends at 0; the weights must not."""
    args = arguments(tmp_path, lr_scheduler_type=schedule, num_train_epochs=30, learning_rate=0.3)
    model = Regression()
    rows = Rows()
    before = float(model(rows.x, rows.y)["loss"])
    trainer = train(model, args, optimizer_cls_and_kwargs=optimizer_of(args, "FTRL"))
    assert trainer.optimizer.param_groups[0]["lr"] < 0.01
    assert float(model(rows.x, rows.y)["loss"]) < 0.3 * before
    assert float(model.net[0].weight.detach().abs().max()) > 0.2


def test_an_optimizer_or_an_option_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer must be one of AdamW, Adam, SGD"):
        optimizer_of(arguments(tmp_path), "Lion")
    with pytest.raises(TypeError, match=r"optimizer_of\(FTRL\): unknown argument 'momentum'"):
        optimizer_of(arguments(tmp_path), "FTRL", momentum=0.9)


# --- early stopping -------------------------------------------------------------------------------

LOSSES = [5.0, 3.0, 4.0, 2.0, 6.0, 6.0, 6.0, 1.0]


class Scripted(Trainer):
    """Evaluation reports given numbers; the one weight tells in which epoch it was."""

    fails_in: int | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        index = round(self.state.epoch) - 1
        metrics = {"eval_loss": LOSSES[index], "eval_score": -LOSSES[index]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def training_step(self, model: Any, *_: Any, **__: Any) -> Tensor:
        if round(self.state.epoch or 0) == self.fails_in:
            raise RuntimeError("in the midst")
        with torch.no_grad():
            model.weight.fill_(float(round(self.state.epoch or 0)))
        loss = (model.weight * 0.0).sum()
        loss.backward()
        return loss.detach()


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight * 0.0}


def scripted(folder: Path, *callbacks: Any, fails_in: int | None = None, **options: Any) -> Any:
    args = arguments(
        folder,
        **{
            "num_train_epochs": 8,
            "per_device_train_batch_size": 24,
            "eval_strategy": "epoch",
            **options,
        },
    )
    trainer = Scripted(
        One(), args, train_dataset=Rows(), eval_dataset=Rows(4), callbacks=list(callbacks)
    )
    trainer.fails_in = fails_in
    return trainer


def test_it_stops_and_the_best_weights_are_back(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback("eval_loss", patience=3)
    trainer = scripted(tmp_path, stopping)
    trainer.train()
    assert trainer.state.global_step == 7
    assert float(trainer.model.weight) == 3.0
    assert stopping.stopper is not None
    assert (stopping.stopper.best, stopping.stopper.best_epoch) == (2.0, 4)  # the fourth step
    trainer.evaluate()  # after training: no check any more
    assert stopping.stopper.epoch == 7


def test_it_restores_where_training_simply_ends_and_after_an_exception(tmp_path: Path) -> None:
    trainer = scripted(
        tmp_path, EarlyStoppingCallback("eval_score", mode="max", patience=9), num_train_epochs=6
    )
    trainer.train()
    assert float(trainer.model.weight) == 3.0
    stopping = EarlyStoppingCallback(patience=9)
    trainer = scripted(tmp_path, stopping, fails_in=5)
    with pytest.raises(RuntimeError, match="in the midst"):
        trainer.train()
    assert stopping.restore() == 4
    assert float(trainer.model.weight) == 3.0


def test_restoring_can_be_left_out(tmp_path: Path) -> None:
    trainer = scripted(tmp_path, EarlyStoppingCallback(patience=3, restore_best=False))
    trainer.train()
    assert float(trainer.model.weight) == 6.0


def test_a_missing_metric_is_named_or_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metric eval_los; there are eval_loss, eval_score"):
        scripted(tmp_path, EarlyStoppingCallback("eval_los", patience=1)).train()
    trainer = scripted(tmp_path, EarlyStoppingCallback("eval_los", patience=1, strict=False))
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("own_folder", [False, True])
@pytest.mark.parametrize("trainers_way", [False, True])
def test_a_resumed_run_decides_as_an_unbroken_one(
    own_folder: bool, trainers_way: bool, tmp_path: Path
) -> None:
    """trainers_way: the Trainer also restores callbacks of its own kind; ours are not of it."""
    if own_folder:
        pytest.importorskip("safetensors")

    def make() -> EarlyStoppingCallback:
        more = {"folder": tmp_path / "best", "resume": True} if own_folder else {}
        return EarlyStoppingCallback(patience=3, **more)

    options: dict[str, Any] = {
        "save_strategy": "epoch",
        "restore_callback_states_from_checkpoint": trainers_way,
    }
    first = scripted(tmp_path, make(), num_train_epochs=5, **options)
    first.train()
    stopping = make()
    second = scripted(tmp_path, stopping, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert second.state.global_step == 7
    assert stopping.stopper is not None
    assert stopping.stopper.best_epoch == 4
    assert any("of step 4, are not in the" in str(w.message) for w in said) != own_folder
    assert float(second.model.weight) == (3.0 if own_folder else 6.0)


def test_the_optimizer_can_be_kept_too(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(
        patience=3, also=lambda optimizer, scheduler: {"optimizer": optimizer, "rate": scheduler}
    )
    trainer = scripted(tmp_path, stopping)
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: PenaltyCallback(l1=0.1),
        lambda: PenaltyCallback(l1=0.1, name=None),
        lambda: EarlyStoppingCallback("eval_loss", patience=2),
    ],
)
def test_two_callbacks_that_would_overwrite_each_others_state_are_refused(
    make: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="two callbacks keep their states under the name"):
        train(Regression(), arguments(tmp_path), make(), make())
    callback = make()
    for _ in range(2):  # the same one in two runs is no clash
        train(Regression(), arguments(tmp_path, num_train_epochs=1), callback)


def test_wrong_arguments_are_told_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="patience"):
        EarlyStoppingCallback(patience=0)
    with pytest.raises(TypeError, match="leave model out"):
        EarlyStoppingCallback(patience=1, model=One())
