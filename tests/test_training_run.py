"""TrainingRun: a run that ends at any moment and is started again computes the same bits."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

import fusereg
from forked import elsewhere
from fusereg import EarlyStopping, TrainingRun
from fusereg.core import files
from fusereg.run import CheckpointError

pytest.importorskip("safetensors")

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


class Noisy(Dataset[torch.Tensor]):
    """Samples that draw from each global generator."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.full((4,), float(index)) / 22 + 0.1 * drawn


class Streamed(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(22):
            yield Noisy()[index]


class Own:
    """A loader with a state of its own, which after the last batch is that of the epoch's end."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(11)
        self.order: list[int] = []
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self.order:
            self.order = torch.randperm(5, generator=self.draw).tolist()
        while self.at < 5:
            index = self.order[self.at]
            self.at += 1
            yield torch.rand(4, 4) + index
        self.order, self.at = [], 0

    def state_dict(self) -> dict[str, Any]:
        return {"draw": self.draw.get_state(), "order": list(self.order), "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draw.set_state(state["draw"])
        self.order, self.at = list(state["order"]), state["at"]


def with_generator() -> DataLoader[Any]:
    return DataLoader(
        Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    )


def weighted() -> DataLoader[Any]:
    own = torch.Generator().manual_seed(4)
    sampler = WeightedRandomSampler([1.0] * 11 + [2.0] * 11, 19, generator=own)
    return DataLoader(Noisy(), batch_size=4, sampler=sampler)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, drop_last=True),
    "generator": with_generator,
    "weighted": weighted,
    "stream": lambda: DataLoader(Streamed(), batch_size=5),
    "list": lambda: [torch.full((4, 4), float(i)) for i in range(5)],
    "own state": Own,
}


class Crash(Exception):
    pass


class Run:
    """A whole run, made anew by each start as by a script."""

    def __init__(
        self, folder: Path, loader: str = "shuffled", accumulate: int = 1, **options: Any
    ) -> None:
        torch.manual_seed(1)
        np.random.seed(2)  # noqa: NPY002
        random.seed(3)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), fusereg.nn.Dropout(0.2)
        ).append(nn.Linear(8, 1))
        self.optimizer = fusereg.optim.AdamW(self.model.parameters(), lr=0.05, l1=1e-4)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=40)
        self.average = swa_utils.AveragedModel(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        self.draw = torch.Generator().manual_seed(9)
        self.stopper = EarlyStopping(self.model, patience=9)
        self.loader = LOADERS[loader]()
        self.accumulate = accumulate
        self.seen: list[tuple[int, int, int]] = []
        self.run = TrainingRun(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            average=self.average,
            scaler=self.scaler,
            generator=self.draw,
            stopper=self.stopper,
            **options,
        )

    def train(self, epochs: int = 3, at_batch: Callable[[TrainingRun], None] | None = None) -> Any:
        run = self.run
        for epoch in run.epochs(epochs):
            torch.rand(3)  # what the body draws before its loop
            for x in run.batches(self.loader):
                self.seen.append((epoch, run.batch, run.step))
                loss = self.model(x + torch.rand((), generator=self.draw)).square().mean()
                self.scaler.scale(loss / self.accumulate).backward()
                if (run.batch + 1) % self.accumulate == 0:
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.optimizer.zero_grad()
                    self.scheduler.step()
                    self.average.update_parameters(self.model)
                if at_batch is not None:
                    at_batch(run)
            self.optimizer.zero_grad()
            metric = float(self.model(torch.ones(4, 4)).detach().square().mean())
            self.stopper.step(metric, epoch=epoch)
            run.save(metric=metric)
        return self.result()

    def result(self) -> Any:
        things = (self.model, self.average)
        tensors = [t.double().flatten() for m in things for t in m.state_dict().values()]
        states = [t.flatten().double() for s in self.optimizer.state.values() for t in s.values()]
        last = [torch.rand(3, dtype=torch.float64), torch.tensor(np.random.rand(3))]  # noqa: NPY002
        last.append(torch.tensor([random.random(), self.scaler.get_scale()], dtype=torch.float64))
        last.append(torch.rand(2, generator=self.draw, dtype=torch.float64))
        return torch.cat([*tensors, *states, *last]), self.scheduler.state_dict()["last_epoch"]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1]


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("when", [{}, {"every_steps": 1}, {"every_steps": 3}], ids=str)
def test_a_run_that_crashes_again_and_again_computes_the_same_bits(
    tmp_path: Path, loader: str, when: dict[str, Any]
) -> None:
    wanted = Run(tmp_path / "whole", loader, **when).train()
    count = Run(tmp_path / "count", loader)
    count.train()
    steps = count.run.step
    draw = random.Random(loader)
    ended, starts = None, 0
    while ended is None:
        starts += 1
        left = draw.randint(2, 8) if starts < 9 else steps + 1

        def crash(run: TrainingRun, until: list[int] = [left]) -> None:  # noqa: B006
            until[0] -= 1
            if not until[0]:
                raise Crash

        try:
            script = Run(tmp_path / "killed", loader, **when)
            ended = script.train(at_batch=crash)
        except Crash:
            pass
    assert starts > 2
    assert same(ended, wanted)


def test_nothing_is_trained_twice_or_left_out(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    for _ in range(30):
        script = Run(tmp_path, every_steps=1)

        def crash(run: TrainingRun) -> None:
            if len(script.seen) == 2:  # noqa: B023
                raise Crash

        try:
            script.train(at_batch=crash)
        except Crash:
            seen += script.seen[:-1]  # the last one's checkpoint was not made
        else:
            seen += script.seen
            break
    assert seen == [(i // 5, i % 5, i) for i in range(15)]
    again = Run(tmp_path, every_steps=1)
    again.train()
    assert again.seen == [], "a run that has ended is not trained again"
    assert again.run.resumed


@pytest.mark.parametrize("accumulate", [2, 3])
def test_no_checkpoint_is_made_amid_gradient_accumulation(tmp_path: Path, accumulate: int) -> None:
    at = []

    def note(run: TrainingRun) -> None:
        at.append(run.last and (run.last.epoch, run.last.batch))

    Run(tmp_path, accumulate=accumulate, every_steps=1).train(at_batch=note)
    assert all(where is None or where[1] % accumulate == 0 for where in at)
    assert any(where is not None and where[1] for where in at)


def test_workers_draw_the_same_after_resuming(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=1)

    LOADERS["workers"] = loader
    try:
        wanted = Run(tmp_path / "whole", "workers", every_steps=1).train(2)

        def crash(run: TrainingRun) -> None:
            if run.step == 7:
                raise Crash

        with pytest.raises(Crash):
            Run(tmp_path / "killed", "workers", every_steps=1).train(2, crash)
        assert same(Run(tmp_path / "killed", "workers", every_steps=1).train(2), wanted)
    finally:
        del LOADERS["workers"]


def test_early_stopping_ends_the_run_with_the_best_model(tmp_path: Path) -> None:
    """Also of a run that is started again after its end, and whose best was before a crash."""
    results = []
    for crashes in (False, True):
        folder = tmp_path / str(crashes)
        for start in range(4):
            model = nn.Linear(2, 1)
            stopper = EarlyStopping(model, patience=2)
            run = TrainingRun(folder, model=model, stopper=stopper)
            try:
                for epoch in run.epochs(20):
                    for _ in run.batches([1, 2]):
                        with torch.no_grad():
                            model.weight.fill_(run.step)
                    if crashes and start == 0 and epoch == 3:
                        raise Crash
                    stopper.step([5, 4, 3, 4, 5, 6][epoch], epoch=epoch)
            except Crash:
                continue
            assert (run.epoch, stopper.best_epoch) == (5, 2)
            assert bool((model.weight == 5).all()), "that of epoch 2"
            assert stopper.explain().endswith("best metric 3 at epoch 2, restored")
            assert run.restore("last") == 10
            assert bool((model.weight == 9).all())
            results.append(start)
    assert results == [0, 1, 2, 3, 1, 2, 3]


def test_a_larger_patience_goes_on_from_the_last_weights(tmp_path: Path) -> None:
    seen = []
    for patience in (1, 1, 3):
        model = nn.Linear(1, 1)
        stopper = EarlyStopping(model, patience=patience)
        run = TrainingRun(tmp_path, model=model, stopper=stopper)
        for epoch in run.epochs(6):
            seen.append((patience, epoch, float(model.weight.detach()) if epoch else None))
            nn.init.constant_(model.weight, epoch)
            stopper.step([1, 2, 3, 4, 5, 6][epoch], epoch=epoch)
        assert float(model.weight.detach()) == 0.0, "the best one"
    assert seen == [(1, 0, None), (1, 1, 0.0), (3, 2, 1.0), (3, 3, 2.0)]


# --- what is kept ---------------------------------------------------------------------------------


def counted(folder: Path, **options: Any) -> tuple[TrainingRun, nn.Linear]:
    model = nn.Linear(1, 1)
    return TrainingRun(folder, model=model, **options), model


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name.startswith("step-"))


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    run, model = counted(tmp_path, keep_best=2, mode="max")
    values = [1.0, 5.0, float("nan"), 4.0, 3.0]
    for epoch in run.epochs(5):
        for _ in run.batches([0]):
            nn.init.constant_(model.weight, epoch)
        run.save(metric=torch.tensor(values[epoch]))
    assert [saved.metric for saved in run.best] == [5.0, 4.0]
    assert run.last is not None
    assert (run.last.step, run.last.epoch, run.last.batch) == (5, 5, 0)
    kept = {saved.path.name for saved in (*run.best, run.last)}
    assert set(folders(tmp_path)) == kept
    assert run.restore() == 2
    assert float(model.weight.detach()) == 1.0
    again, other = counted(tmp_path, keep_best=2, mode="max")
    assert float(other.weight.detach()) == 4.0
    assert again.best == run.best
    with pytest.raises(ValueError, match='which must be one of "best", "last"'):
        again.restore("worst")  # type: ignore[arg-type]


def test_saving_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run, _ = counted(tmp_path, every_minutes=2)
    saved = []
    for _ in run.epochs(2):
        for _ in run.batches(range(10)):
            saved.append(run.last.step if run.last else None)
            now[0] += 50
    assert saved == [None, *[None] * 2, *[3] * 3, *[6] * 3, *[9] * 3, *[12] * 3, *[15] * 3, 18, 18]
    assert run.last is not None
    assert run.last.step == 20


def test_early_stopping_that_is_ahead_of_a_new_run_is_noticed(tmp_path: Path) -> None:
    stopper = EarlyStopping(patience=3)
    TrainingRun(tmp_path / "new", stopper=stopper)
    stopper.step(1.0, epoch=4)
    with pytest.warns(RuntimeWarning, match="stopper has the records of its epoch 4 already"):
        TrainingRun(tmp_path, stopper=stopper)


def test_outside_of_the_loops_it_saves_at_once(tmp_path: Path) -> None:
    run, _ = counted(tmp_path)
    run.save(metric=1.0)
    assert run.last is not None
    assert (run.last.step, run.last.metric) == (0, 1.0)
    for wrong in ("low", torch.ones(2), [[1.0], [1.0, 2.0]]):
        with pytest.raises(TypeError, match=r"save: metric must be a number"):
            run.save(metric=wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="batches: it belongs into a loop over epochs"):
        run.batches([1])
    for _ in run.epochs(1):
        list(run.batches([1]))
        with pytest.raises(RuntimeError, match="batches: there is one loop over batches in each"):
            run.batches([1])


def test_a_loop_that_was_left_is_not_gone_on_with(tmp_path: Path) -> None:
    run, _ = counted(tmp_path)
    for _ in run.epochs(2):
        for i in run.batches([1, 2, 3]):
            if i == 2:
                break
        break
    with pytest.raises(RuntimeError, match="was left within an epoch; make a new TrainingRun"):
        list(run.epochs(2))


def test_other_runs_and_other_files_are_left_alone(tmp_path: Path) -> None:
    foreign = ["step-000000001", "step-000000001-0123456.json", "step-final", ".run-x.tmp"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    first, _ = counted(tmp_path)
    second, _ = counted(tmp_path)
    second.save()
    with pytest.raises(CheckpointError, match="was taken over by a later run of this process"):
        first.save()
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = type("FullyShardedDataParallel", (nn.Module,), {})()


@fork
@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_another_process_is_refused_in_words(tmp_path: Path, on_save_error: Any) -> None:
    run, _ = counted(tmp_path)
    run.save()
    for resume in (True, False):

        def other(resume: bool = resume) -> Any:
            return counted(tmp_path, on_save_error=on_save_error, resume=resume)

        said = elsewhere(other)
        assert said.startswith(f"CheckpointError: fusereg.TrainingRun: folder {tmp_path} is in use")
        assert f"by process {os.getpid()} on" in said
    run.save()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every_steps": 0}, ValueError, "every_steps must be >= 1, got 0"),
        ({"every_steps": 2.0}, TypeError, "every_steps must be an integer, got float"),
        ({"every_minutes": 0}, ValueError, "every_minutes must be > 0, got 0"),
        ({"keep_best": -1}, ValueError, "keep_best must be >= 0, got -1"),
        ({"mode": "best"}, ValueError, "mode must be one of"),
        ({"on_save_error": "no"}, ValueError, "on_save_error must be one of"),
        ({"model": 3}, TypeError, "model must have state_dict and load_state_dict, got int"),
        ({"model": nn.Linear}, TypeError, "model must have state_dict and load_state_dict"),
        ({"model": Wrapped()}, ValueError, "model has a FullyShardedDataParallel, whose parts"),
        ({"thing": lambda: 0}, TypeError, "thing must have state_dict and load_state_dict"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_arguments_that_make_no_sense(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^fusereg.TrainingRun: .*{text}"):
        TrainingRun(tmp_path, **{"model": nn.Linear(1, 1), **options})
    with pytest.raises(ValueError, match="give the objects to save by name"):
        TrainingRun(tmp_path)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TrainingRun(tmp_path, model=model, optimizer=optimizer).save()
    wider = nn.Linear(2, 1)
    own = torch.optim.SGD(wider.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has model's weight with shape"):
        TrainingRun(tmp_path, model=wider, optimizer=own)
    with pytest.raises(ValueError, match="holds nothing for other; it has"):
        TrainingRun(tmp_path, other=model, model=model, optimizer=optimizer)
    with pytest.warns(RuntimeWarning, match="has the states of optimizer too"):
        TrainingRun(tmp_path, model=model)
    run = TrainingRun(tmp_path, model=model, optimizer=optimizer, every_steps=1)
    for _ in run.epochs(1):
        for i in run.batches(range(9)):
            if i == 5:
                break
            optimizer.step()
        break
    run = TrainingRun(tmp_path, model=model, optimizer=optimizer)
    epochs = run.epochs(1)
    next(epochs)
    with pytest.raises(ValueError, match=r"only 3 batches, and the checkpoint was saved after 5"):
        next(run.batches(range(3)))


# --- damage, full disks ---------------------------------------------------------------------------


def crashed(folder: Path) -> None:
    for _ in Run(folder, every_steps=2).run.epochs(1):
        break
    script = Run(folder, every_steps=2)

    def crash(run: TrainingRun) -> None:
        if run.step == 3:
            raise Crash

    with pytest.raises(Crash):
        script.train(at_batch=crash)


def test_any_damage_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    crashed(folder)
    (place,) = (folder / name for name in folders(folder))
    commit = folder / "run.json"
    for path in (commit, *sorted(place.iterdir())):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-2], whole[:40] + b"\xff" + whole[41:], None, "pipe"):
            path.unlink()
            if damaged == "pipe":
                os.mkfifo(path)
            elif isinstance(damaged, bytes):
                path.write_bytes(damaged)
            elif path == commit:
                path.write_bytes(whole)
                continue
            with pytest.raises(CheckpointError):
                Run(folder)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
    content = json.loads(commit.read_text())
    changes: list[Callable[[Any], Any]] = [
        lambda c: c["last"].update(name="../step-000000001-01234567"),
        lambda c: c["last"].update(name="/etc"),
        lambda c: c["last"].update(step="one"),
        lambda c: c["last"].update(ranks=-1),
        lambda c: c["last"].update(metric="low"),
        lambda c: c["last"]["files"].update({"../../x": {"sha256": "", "bytes": 1}}),
        lambda c: c["last"]["files"].pop("rank-0.json"),
        lambda c: c["last"]["files"]["shared.json"].update(bytes=1 << 60),
        lambda c: c["last"].update(files=[]),
        lambda c: c.update(best=3),
        lambda c: c.update(best=[1]),
        lambda c: c.pop("last"),
    ]
    for change in changes:
        forged = json.loads(json.dumps(content))
        change(forged)
        forged["sha256"] = files._hash_of(forged)
        commit.write_text(json.dumps(forged))
        with pytest.raises(CheckpointError):
            Run(folder)
    anew = Run(folder, resume=False)
    assert not anew.run.resumed
    anew.train(1)
    assert Run(folder).run.epoch == 1


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
@pytest.mark.parametrize("call", ["save_file", "fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_save_error: Any, call: str
) -> None:
    import safetensors.torch

    run, _ = counted(tmp_path, on_save_error=on_save_error)
    run.save()
    before = folders(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    text = "No space left on device; the checkpoint of step 0 is intact; training"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch if call == "save_file" else os, call, full)
        if on_save_error == "raise":
            with pytest.raises(CheckpointError, match=f"{text} stops"):
                run.save()
        else:
            with pytest.warns(RuntimeWarning, match=f"{text} goes on"):
                run.save()
    assert folders(tmp_path) == before
    counted(tmp_path)
    assert not list(tmp_path.glob(".run-*.tmp"))


# --- kill -9 --------------------------------------------------------------------------------------


def killed(folder: Path, delay: float, call: int) -> bool:
    """Go on with the run in a forked process, which is killed; return whether it had ended."""
    child = os.fork()
    if child == 0:
        try:
            if call:
                die_at(call)
            signal.setitimer(signal.ITIMER_REAL, 0)
            result = Run(folder, every_steps=1).train()
            torch.save(result, folder.parent / "result.part")
            os.replace(folder.parent / "result.part", folder.parent / "result")
            os._exit(0)
        finally:
            os._exit(1)
    if not call:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + 120.0
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the run of the forked process did not end within 120 s")
        time.sleep(0.005)
    status = found[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def die_at(call: int) -> None:
    """Let this process kill itself at its n-th fsync or rename, half of them done and half not."""
    left = [call]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and call % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return step

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: a forked process has no copies of the others, and would wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@fork
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_at_drawn_moments(tmp_path: Path, kills: int) -> None:
    """A warm parent forks: what a step imports at first was imported by the run that is compared.

    Every other kill is from outside at any moment, the rest in the midst of a save.
    """
    wanted = Run(tmp_path / "whole", every_steps=1).train()
    draw = random.Random(6)
    done = runs = 0
    while done < kills:
        runs += 1
        folder = tmp_path / f"run {runs}" / "run"
        folder.parent.mkdir()
        while done < kills or not (folder.parent / "result").exists():
            last = done >= kills
            done += 1
            call = 10**9 if last else draw.randint(1, 90) if done % 2 else 0
            if killed(folder, draw.uniform(0, 0.5), call):
                break
        assert same(torch.load(folder.parent / "result"), wanted)
    left = [p for p in (tmp_path / f"run {runs}" / "run").iterdir() if p.name.endswith(".tmp")]
    assert left == []


def test_without_safetensors_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    with pytest.raises(ImportError, match=r'TrainingRun: .*pip install "fusereg\[checkpoints\]"'):
        counted(tmp_path)


def test_a_run_warns_of_persistent_workers(tmp_path: Path) -> None:
    run, _ = counted(tmp_path)
    run.save()
    run, _ = counted(tmp_path)
    loader = [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in run.epochs(1):
            list(run.batches(loader))

    class Persistent(list[int]):
        persistent_workers = True

    run, _ = counted(tmp_path)
    run.epoch = 0
    epochs = run.epochs(2)
    next(epochs)
    with pytest.warns(RuntimeWarning, match="persistent workers keep random numbers"):
        list(run.batches(Persistent(loader)))


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    results = []
    for crash in (None, 7):
        for _ in range(2 if crash else 1):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 1)).cuda()
            optimizer = fusereg.optim.AdamW(model.parameters(), lr=0.1)
            run = TrainingRun(
                tmp_path / str(crash), model=model, optimizer=optimizer, every_steps=1
            )
            try:
                for _ in run.epochs(2):
                    for x in run.batches(DataLoader(torch.arange(20.0).view(-1, 4), shuffle=True)):
                        if run.step == crash and not run.resumed:
                            raise Crash
                        optimizer.zero_grad()
                        model(x.cuda()).square().sum().backward()
                        optimizer.step()
            except Crash:
                continue
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)
