"""Early stopping: checkpoints stay intact whatever happens to the disk or the process.

A process is killed a hundred times in the midst of saving, each step of a save is made to fail, and
real limits stand in for a full disk.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from early_stopping_runs import fill
from fusereg import EarlyStopping
from fusereg.early_stopping import CheckpointError, load_best
from fusereg.early_stopping.checkpoint import COMMIT, CheckpointFolder

safetensors_torch = pytest.importorskip("safetensors.torch")


def linear(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    fill(model, value)
    return model


LOCK = ".early_stopping.lock"


def names(folder: Path) -> list[str]:
    """Return the names in a folder besides the lock's."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def assert_holds(folder: Path, epoch: int, value: float) -> None:
    """Check that the folder holds one checkpoint, with this epoch's values."""
    best = load_best(folder)
    assert best.epoch == epoch
    assert all(bool((t == value).all()) for t in best.states["model"].values())


# --- what is in the folder ------------------------------------------------------------------------


def test_the_folder_holds_the_best_and_one_commit(tmp_path: Path) -> None:
    model = linear(0)
    stopper = EarlyStopping(model, patience=9, folder=tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert names(folder) == []
    for epoch, value in enumerate([3.0, 2.0, 5.0]):
        fill(model, epoch)
        stopper.step(value, epoch=epoch)
    commit, tensors = sorted(names(folder), key=lambda n: n != COMMIT)
    content = json.loads((folder / COMMIT).read_text())
    assert commit == COMMIT
    assert content["best"]["file"] == tensors
    assert tensors.startswith("best-000001-")
    assert content["progress"]["state"]["epoch"] == 2
    assert_holds(folder, 1, 1)
    assert load_best(folder).value == 2.0
    # Any safetensors reader takes it.
    plain = safetensors_torch.load_file(folder / tensors)
    assert sorted(plain) == ["model.bias", "model.weight"]
    fresh = nn.Linear(3, 2)
    state = load_best(folder).states["model"]
    assert state._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    fresh.load_state_dict(state)
    assert bool((fresh.weight == 1).all())
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / tensors).stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_is_on_the_disk_before_its_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """write, fsync, rename, fsync of the folder: tensors first, then the commit."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        size = "" if path.is_dir() else ("whole" if path.stat().st_size else "empty")
        calls.append(f"fsync {'folder' if path.is_dir() else size}")
        fsync(handle)

    def seen_replace(source: Path, target: Path) -> None:
        assert source.parent.parent == target.parent, "not on the same disk"
        calls.append(f"rename to {target.suffix}")
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc, which tells what is flushed")
    stopper = EarlyStopping(linear(1), patience=9, folder=tmp_path)
    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    commit = ["fsync whole", "rename to .json", "fsync folder"]
    stopper.step(1.0, epoch=0)
    assert calls == ["fsync whole", "rename to .safetensors", "fsync folder", *commit]
    calls.clear()
    stopper.step(2.0, epoch=1)
    assert calls == commit


# --- each step of a save fails once ---------------------------------------------------------------


@contextmanager
def failing_at(step: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Make the n-th call of a save that touches the disk raise when half of it is done."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(name: str, call: Callable[..., Any], half: Callable[..., Any]) -> Any:
            def watched(*args: Any, **kwargs: Any) -> Any:
                made.append(name)
                if len(made) == step:
                    half(*args)
                    raise error()
                return call(*args, **kwargs)

            return watched

        def torn(tensors: Any, path: Path, *rest: Any) -> None:
            path.write_bytes(b"half a file")

        def nothing(*args: Any) -> None:
            return None

        save, open_ = safetensors_torch.save_file, Path.open
        patch.setattr(safetensors_torch, "save_file", watch("tensors", save, torn))
        patch.setattr(os, "fsync", watch("fsync", os.fsync, nothing))
        patch.setattr(os, "replace", watch("rename", os.replace, nothing))
        patch.setattr(
            Path,
            "open",
            lambda path, mode="r", *a, **k: (
                watch("json", open_, nothing)(path, mode, *a, **k)
                if mode == "xb"
                else open_(path, mode, *a, **k)
            ),
        )
        yield made


STEPS = ["tensors", "fsync", "rename", "fsync", "json", "fsync", "rename", "fsync"]
COMMITTED = 8  # the folder's fsync after the commit's rename: from here on it is the new one


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_full_disk_with_warn_training_goes_on(tmp_path: Path, step: int, place: Any) -> None:
    model = linear(0)
    stopper = EarlyStopping(
        model, patience=9, folder=tmp_path, snapshot=place, on_save_error="warn"
    )
    stopper.step(3.0, epoch=0)
    fill(model, 1)
    with (
        failing_at(step, full) as made,
        pytest.warns(RuntimeWarning) as heard,
    ):
        assert stopper.step(2.0, epoch=1).new_best
    assert made == STEPS[:step]
    intact = 1 if step == COMMITTED else 0
    assert str(heard[0].message) == (
        f"fusereg.EarlyStopping: cannot write the checkpoint of epoch 1 to {tmp_path}: "
        f"No space left on device; the checkpoint of epoch {intact} is intact; training goes on "
        '(on_save_error="warn")'
    )
    assert heard[0].filename == __file__
    assert_holds(tmp_path, intact, intact)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    # Nothing is lost meanwhile: memory has the new best, and the next check writes it.
    fill(model, 2)
    assert stopper.restore() == 1
    assert bool((model.weight == 1).all())
    fill(model, 2)
    stopper.step(5.0, epoch=2)
    assert_holds(tmp_path, 1, 1)
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_a_full_disk_with_raise_training_stops(tmp_path: Path, step: int) -> None:
    model = linear(0)
    with EarlyStopping(model, patience=9, folder=tmp_path) as stopper:
        stopper.step(3.0, epoch=0)
        fill(model, 1)
        intact = 1 if step == COMMITTED else 0
        with (
            failing_at(step, full),
            pytest.raises(
                CheckpointError,
                match=rf"epoch {intact} is intact; training stops \(on_save_error=\"raise\"\)",
            ) as caught,
        ):
            stopper.step(2.0, epoch=1)
        assert isinstance(caught.value.__cause__, OSError)
        assert_holds(tmp_path, intact, intact)
        fill(model, 9)
    assert bool((model.weight == 1).all()), "the best in memory"


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_ctrl_c_in_a_save(tmp_path: Path, step: int) -> None:
    model = linear(0)
    stopper = EarlyStopping(model, patience=9, folder=tmp_path)
    stopper.step(3.0, epoch=0)
    fill(model, 1)
    with failing_at(step, KeyboardInterrupt), pytest.raises(KeyboardInterrupt), stopper:
        stopper.step(2.0, epoch=1)
    assert bool((model.weight == 1).all())
    intact = 1 if step == COMMITTED else 0
    assert_holds(tmp_path, intact, intact)
    resumed = EarlyStopping(model, patience=9, folder=tmp_path, resume=True)
    assert resumed.best_epoch == intact


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_saving_the_same_epoch_again_does_not_lose_it(tmp_path: Path, step: int) -> None:
    """After resuming, an epoch repeats: its file has the name of the one that is committed."""
    model = linear(0)
    folder = CheckpointFolder(tmp_path)
    stopper = EarlyStopping(model, patience=9)
    stopper.step(3.0, epoch=0)
    kept = stopper._keeper._in_memory
    folder.save({}, kept)
    before = names(tmp_path)
    with failing_at(step, full), pytest.raises(CheckpointError):
        folder.save({}, kept)
    assert names(tmp_path) == before
    assert_holds(tmp_path, 0, 0)


@pytest.mark.slow
def test_a_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """What safetensors says about a disk that takes no more is understood too."""
    resource = pytest.importorskip("resource")
    model = nn.Linear(300, 300)
    stopper = EarlyStopping(model, patience=9, folder=tmp_path)
    fill(model, 0)
    stopper.step(3.0, epoch=0)
    fill(model, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CheckpointError, match="checkpoint of epoch 0 is intact"):
            stopper.step(2.0, epoch=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert_holds(tmp_path, 0, 0)
    assert len(names(tmp_path)) == 2
    stopper.step(1.0, epoch=2)
    assert_holds(tmp_path, 2, 1)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    """Like a read-only one, also for root: it lies below a file."""
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "below"
    model = linear(1)
    with pytest.raises(CheckpointError, match=f"cannot write to folder {folder}: Not a directory"):
        EarlyStopping(model, patience=2, folder=folder)
    with pytest.warns(RuntimeWarning, match="Not a directory; training goes on"):
        stopper = EarlyStopping(model, patience=2, folder=folder, on_save_error="warn")
    with pytest.warns(
        RuntimeWarning, match="Not a directory; there was none before; training goes"
    ):
        stopper.step(1.0, epoch=0)
    fill(model, 2)
    assert stopper.restore() == 0
    assert bool((model.weight == 1).all())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopper = EarlyStopping(linear(1), patience=2, folder=tmp_path, on_save_error="warn")
    stopper.step(1.0, epoch=0)

    def read_only(*args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(safetensors_torch, "save_file", read_only)
    with pytest.warns(RuntimeWarning, match="Read-only file system; the checkpoint of epoch 0 is"):
        stopper.step(0.5, epoch=1)
    assert_holds(tmp_path, 0, 1)


# --- kill -9 --------------------------------------------------------------------------------------

# One process imports torch and forks a hundred savers: each goes on from the folder and saves
# without a pause until it is killed. Every other one is killed from outside at any moment, once it
# has saved a few times; the rest kill themselves in the midst of a save, at a drawn step of it, so
# that no slow machine can let all kills miss. OMP_NUM_THREADS=1, as OpenMP's threads do not survive
# a fork.
KILLER = """
import json, os, random, signal, sys, time
import torch, fusereg
assert "safetensors" not in sys.modules, "importing fusereg must not need safetensors"
from fusereg.early_stopping import load_best
import safetensors.torch, numpy
torch.set_num_threads(1)
folder, trials = sys.argv[1], int(sys.argv[2])

def die_at(call):
    calls = [0]
    def watched(function):
        def step(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return step
    os.fsync, os.replace = watched(os.fsync), watched(os.replace)

def saver(saved, call):
    if call:
        die_at(call)
    model = torch.nn.Linear(100, 100)
    stopper = fusereg.EarlyStopping(model, patience=9, folder=folder, resume=True)
    epoch = 0 if stopper.epoch is None else stopper.epoch + 1
    while True:
        os.write(saved, b"x")
        with torch.no_grad():
            model.weight.fill_(epoch), model.bias.fill_(epoch)
        stopper.step(-float(epoch), epoch=epoch)
        epoch += 1

model = torch.nn.Linear(100, 100)
stopper = fusereg.EarlyStopping(model, patience=9, folder=os.path.join(folder, "trial"))
times = []
for epoch in range(9):
    started = time.perf_counter()
    stopper.step(-float(epoch), epoch=epoch)
    times.append(time.perf_counter() - started)
pause = sorted(times)[4]
folder = os.path.join(folder, "killed")
os.mkdir(folder)

random.seed(5)
epochs, left = [], 0
for trial in range(trials):
    call = random.randint(1, 12) if trial % 2 else 0
    get, put = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            saver(put, call)
        finally:
            os._exit(1)
    os.close(put)
    if not call:
        for _ in range(1 + random.randint(0, 2)):
            assert os.read(get, 1) == b"x"
        time.sleep(random.uniform(0, 2 * pause))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(get)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    left += any(name.endswith(".tmp") for name in os.listdir(folder))
    if os.path.exists(os.path.join(folder, "early_stopping.json")):
        best = load_best(folder)
        assert all(bool((t == best.epoch).all()) for t in best.states["model"].values()), best
        assert best.value == -best.epoch
        epochs.append(best.epoch)
print(json.dumps({"epochs": epochs, "left": left}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_a_hundred_times(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "100"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    epochs = found["epochs"]
    assert epochs == sorted(epochs), "a best that was there has gone"
    assert len(epochs) > 50
    assert epochs[-1] > 20
    assert found["left"] > 20, "hardly a kill came in the midst of a save"
    # Whoever goes on clears up.
    folder = tmp_path / "killed"
    resumed = EarlyStopping(nn.Linear(100, 100), patience=9, folder=folder, resume=True)
    assert resumed.best_epoch == epochs[-1]
    resumed.step(-1e9, epoch=10**6)
    assert len(names(folder)) == 2


# --- going on from a folder -----------------------------------------------------------------------


def test_a_folder_with_a_checkpoint_is_gone_on_from_or_begun_anew_but_never_by_chance(
    tmp_path: Path,
) -> None:
    model = linear(4)
    first = EarlyStopping(model, patience=3, folder=tmp_path, resume=True)  # nothing there yet
    first.step(1.0, epoch=0)
    first.step(2.0, epoch=1)
    with pytest.raises(ValueError, match=r"holds a checkpoint \(best epoch: 0\); resume=True goes"):
        EarlyStopping(model, patience=3, folder=tmp_path)
    with pytest.raises(ValueError, match="the state is that of"):
        EarlyStopping(model, patience=3, mode="max", folder=tmp_path, resume=True)
    fill(model, 5)
    second = EarlyStopping(model, patience=3, folder=tmp_path, resume=True)
    assert list(second.epochs(4)) == [2, 3]
    assert bool((model.weight == 4).all()), "the loop's end restores the best"
    assert (second.best, second.best_epoch, second.misses) == (1.0, 0, 1)
    second.step(1.5, epoch=2)
    assert_holds(tmp_path, 0, 4)
    assert second.step(1.5, epoch=3).reason == "patience"
    third = EarlyStopping(model, patience=3, folder=tmp_path, resume=False)
    assert_holds(tmp_path, 0, 4)
    fill(model, 6)
    third.step(9.0, epoch=0)
    assert_holds(tmp_path, 0, 6)
    assert load_best(tmp_path).value == 9.0
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_beginning_anew_does_not_fall_back_on_the_old_run(tmp_path: Path, place: Any) -> None:
    model = linear(4)
    EarlyStopping(model, patience=3, folder=tmp_path).step(0.1, epoch=0)
    anew = EarlyStopping(
        model, patience=3, folder=tmp_path, resume=False, snapshot=place, on_save_error="warn"
    )
    assert anew.restore() is None
    fill(model, 5)
    with failing_at(1, full), pytest.warns(RuntimeWarning, match="checkpoint of epoch 0 is intact"):
        anew.step(3.0, epoch=7)
    assert_holds(tmp_path, 0, 4)
    assert anew.restore() == 7
    anew.step(4.0, epoch=8)
    assert_holds(tmp_path, 7, 5)


def test_beginning_anew_without_a_best_yet(tmp_path: Path) -> None:
    EarlyStopping(linear(4), patience=3, folder=tmp_path).step(0.1, epoch=0)
    anew = EarlyStopping(linear(5), patience=3, folder=tmp_path, resume=False, nan="count")
    anew.step(math.nan, epoch=0)
    assert names(tmp_path) == [COMMIT], "the other run's best is none of this one's"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_small_state_goes_with_the_folder(tmp_path: Path, place: Any) -> None:
    """A run's own checkpoint holds the records; the best state is taken from the folder."""
    model = linear(1)
    first = EarlyStopping(model, patience=3, folder=tmp_path, snapshot=place)
    first.step(1.0, epoch=0)
    small = first.state_dict(snapshot=False)
    second = EarlyStopping(model, patience=3, folder=tmp_path, snapshot=place, resume=True)
    second.load_state_dict(small)
    fill(model, 5)
    assert second.restore() == 0
    assert bool((model.weight == 1).all())
    # The folder is ahead of the records: its best is none of theirs.
    del second  # which has the folder until then
    first.step(0.5, epoch=1)
    third = EarlyStopping(model, patience=3, folder=tmp_path, snapshot=place, resume=True)
    third.load_state_dict(small)
    assert third.restore() is None
    fill(model, 6)
    third.step(0.75, epoch=1)
    assert_holds(tmp_path, 1, 6)


def test_where_warnings_are_errors_a_failed_save_is_one(tmp_path: Path) -> None:
    stopper = EarlyStopping(linear(1), patience=3, folder=tmp_path, on_save_error="warn")
    with failing_at(1, full), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="No space left on device"):
            stopper.step(1.0, epoch=0)


def damage(folder: Path, what: str) -> None:
    commit = folder / COMMIT
    (tensors,) = folder.glob("best-*.safetensors")
    if what == "a flipped bit":
        content = bytearray(tensors.read_bytes())
        content[-3] ^= 4
        tensors.write_bytes(content)
    elif what == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif what == "gone":
        tensors.unlink()
    elif what == "half a commit":
        commit.write_text(commit.read_text()[:100])
    elif what == "an edited commit":
        commit.write_text(commit.read_text().replace('"best_epoch": 0', '"best_epoch": 1'))
    elif what == "another version":
        commit.write_text(commit.read_text().replace('"version": 1', '"version": 2'))
    elif what == "no commit of ours":
        commit.write_text("[]")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a flipped bit", r"best-000000-\w+.safetensors is damaged: SHA-256 \w+, wanted \w+"),
        ("cut short", r"is damaged: it has \d+ bytes, wanted \d+"),
        ("gone", r"early_stopping.json names best-000000-\w+.safetensors, which is missing"),
        ("half a commit", "early_stopping.json is not a complete checkpoint"),
        ("an edited commit", "early_stopping.json is damaged: its SHA-256 does not match"),
        ("another version", "version 2; this fusereg reads 'fusereg early stopping', version 1"),
        ("no commit of ours", "is not a complete checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_found_out(tmp_path: Path, what: str, text: str) -> None:
    model = linear(1)
    EarlyStopping(model, patience=3, folder=tmp_path).step(1.0, epoch=0)
    damage(tmp_path, what)
    with pytest.raises(CheckpointError, match=text):
        load_best(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        EarlyStopping(model, patience=3, folder=tmp_path, resume=True)
    EarlyStopping(model, patience=3, folder=tmp_path, resume=False).step(1.0, epoch=0)
    assert_holds(tmp_path, 0, 1)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"load_best: no checkpoint in {tmp_path}"):
        load_best(tmp_path)
    stopper = EarlyStopping(linear(1), patience=3, folder=tmp_path, nan="count")
    stopper.step(math.nan, epoch=0)
    assert names(tmp_path) == [COMMIT]
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_best(tmp_path)
    assert EarlyStopping(linear(1), patience=3, folder=tmp_path, resume=True).misses == 1


def test_without_safetensors_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    with pytest.raises(ImportError, match=r'safetensors; do: pip install "fusereg\[checkpoints\]"'):
        EarlyStopping(linear(1), patience=3, folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EarlyStopping(linear(1), patience=3).step(1.0, epoch=0)  # in memory nothing is needed


def test_a_state_that_cannot_be_written_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    class Thing:
        def state_dict(self) -> Any:
            return {"f": test_there_is_none}

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError(state)

    with pytest.raises(TypeError, match=r"cannot write thing\.f to a checkpoint: function is"):
        EarlyStopping(patience=2, also={"thing": Thing()}, folder=tmp_path, on_save_error="warn")
