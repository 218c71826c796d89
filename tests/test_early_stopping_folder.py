"""Early stopping: who may use a folder, and that no damage to it is mistaken for a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import json
import multiprocessing
import os
import pickle
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from early_stopping_runs import fill
from forked import elsewhere
from fusereg import EarlyStopping, TrainingRun
from fusereg.core import files, lock
from fusereg.early_stopping import CheckpointError, load_best
from fusereg.early_stopping.checkpoint import COMMIT

pytest.importorskip("safetensors")

LOCK = ".early_stopping.lock"
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def started(folder: Path, value: float = 1.0, **options: Any) -> EarlyStopping:
    """Return a stopper that has saved one check of a model that is filled with the value."""
    model = nn.Linear(3, 2)
    fill(model, value)
    stopper = EarlyStopping(model, patience=9, folder=folder, **options)
    stopper.step(1.0, epoch=0)
    return stopper


def holds(folder: Path, value: float) -> bool:
    return all(bool((t == value).all()) for t in load_best(folder).states["model"].values())


# --- whose files these are ------------------------------------------------------------------------


def test_nobody_elses_file_is_touched(tmp_path: Path) -> None:
    """Names that are like its own, but are not."""
    foreign = [
        *("best-model.safetensors", "best-000001.safetensors", "best-1-0123456789ab.safetensors"),
        *("best-000001-0123456789AB.safetensors", "best-000001-0123456789ab.safetensors.bak"),
        *("my-best-000001-0123456789ab.safetensors", ".early_stopping-notes.tmp"),
        *(".early_stopping-1-0123.tmp", "early_stopping.json.old", ".early_stopping-x.tmp/kept"),
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    stopper = started(tmp_path)
    for epoch in (1, 2):
        stopper.step(1.0 / (epoch + 1), epoch=epoch)
    for name in foreign:
        assert (tmp_path / name).read_text() == "mine"
    leftovers = [
        tmp_path / "best-000000-0123456789ab.safetensors",
        tmp_path / ".early_stopping-17-0123abcd.tmp",
    ]
    leftovers[0].write_text("of a killed run")
    leftovers[1].mkdir()
    stopper.step(5.0, epoch=3)
    assert not any(path.exists() for path in leftovers)


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    started(Path("~/runs/7"))
    assert holds(tmp_path / "runs" / "7", 1)
    assert load_best("~/runs/7").epoch == 0
    assert not (tmp_path / "~").exists()


# --- two runs, one folder -------------------------------------------------------------------------


def test_a_later_run_of_a_process_takes_the_folder_over(tmp_path: Path) -> None:
    """As where a cell of a notebook runs again; the earlier run cannot harm it any more."""
    first = EarlyStopping(nn.Linear(3, 2), patience=9, folder=tmp_path)
    second = started(tmp_path, 2)
    with pytest.raises(CheckpointError, match="was taken over by a later run of this process"):
        first.step(0.5, epoch=0)
    assert holds(tmp_path, 2)
    second.step(0.9, epoch=1)
    with pytest.raises(ValueError, match="holds a checkpoint"):
        EarlyStopping(nn.Linear(3, 2), patience=9, folder=tmp_path)
    with pytest.raises(ValueError, match="the state is that of"):
        EarlyStopping(nn.Linear(3, 2), patience=9, mode="max", folder=tmp_path, resume=True)
    second.step(0.8, epoch=2)  # runs that could not begin have taken nothing over


def test_a_commit_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    """Even where no lock works: the bytes of the commit tell."""
    mine, other = started(tmp_path / "mine", 1, snapshot="disk"), started(tmp_path / "other", 2)
    for path in (tmp_path / "other").iterdir():
        if path.name != LOCK:
            (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="was written by another run meanwhile"):
        mine.restore()
    with pytest.raises(CheckpointError, match=r"by another run meanwhile.* holds none of this run"):
        mine.step(0.5, epoch=1)
    assert holds(tmp_path / "mine", 2)
    other.step(0.5, epoch=1)


@fork
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"resume": False}], ids=str)
@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_another_process_is_refused_in_words(
    tmp_path: Path, options: dict[str, Any], on_save_error: Any
) -> None:
    stopper: Any = EarlyStopping(nn.Linear(3, 2), patience=9, folder=tmp_path)
    said = elsewhere(lambda: started(tmp_path, 2, on_save_error=on_save_error, **options))
    assert said.startswith(
        f"CheckpointError: fusereg.EarlyStopping: folder {tmp_path} is in use by process "
        f"{os.getpid()} on {socket.gethostname()} (since "
    )
    assert "each run needs a folder of its own" in said
    stopper.step(1.0, epoch=0)
    said = elsewhere(lambda: stopper.step(0.5, epoch=1))  # a fork is another process too
    assert "is in use by process" in said
    stopper.step(0.5, epoch=1)
    assert elsewhere(lambda: load_best(tmp_path).epoch) == "1", "reading needs no lock"
    gone = weakref.ref(stopper)
    stopper = None
    assert gone() is None
    assert elsewhere(lambda: started(tmp_path, 2, resume=False).epoch) == "0"


def test_a_relative_folder_stays_where_it_was_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("begun", "later"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    stopper = started(Path("run"))
    training = TrainingRun("whole", model=nn.Linear(3, 2))
    training.save()
    monkeypatch.chdir(tmp_path / "later")
    stopper.step(0.5, epoch=1)
    training.save()
    assert list((tmp_path / "later").iterdir()) == []
    assert load_best(tmp_path / "begun" / "run").epoch == 1
    assert training.last is not None
    assert training.last.path.parent == tmp_path / "begun" / "whole"
    assert training.restore("last") == 0


@fork
@pytest.mark.parametrize("gone", ["the file of the lock", "the folder"])
def test_another_process_is_noticed_where_the_lock_was_moved_away(
    tmp_path: Path, gone: str
) -> None:
    """The earlier run stops, and the later one goes on: they do not write over each other."""
    folder = tmp_path / "run"
    stopper = started(folder)
    if gone == "the folder":
        folder.rename(tmp_path / "moved")
    else:
        (folder / LOCK).unlink()
    get, put = multiprocessing.get_context("fork").Pipe(duplex=False)

    def other() -> None:
        kept = started(folder, 2, resume=False)
        put.send(kept.epoch)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=other, daemon=True)
    process.start()
    try:
        assert get.poll(60)
        with pytest.raises(CheckpointError, match="is in use by process"):
            stopper.step(0.5, epoch=1)
    finally:
        process.kill()
        process.join()
    assert holds(folder, 2)


@pytest.mark.parametrize("gone", ["the file of the lock", "the folder"])
def test_a_run_alone_goes_on_where_the_lock_was_moved_away(tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "run"
    earlier = started(folder)
    stopper = started(folder, resume=False)
    if gone == "the folder":
        folder.rename(tmp_path / "moved")
    else:
        (folder / LOCK).unlink()
    stopper.step(0.5, epoch=1)
    assert load_best(folder).epoch == 1
    if hasattr(os, "fork"):
        said = elsewhere(lambda: started(folder, 2, resume=False))
        assert "is in use by process" in said, "it is locked again"
    with pytest.raises(CheckpointError, match="was taken over by a later run"):
        earlier.step(0.5, epoch=1)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_stopper_neither_holds_nor_closes_its_lock(
    tmp_path: Path, how: Callable[[Any], Any]
) -> None:
    """The number of a file that was closed twice may be another file's by then."""
    stopper = started(tmp_path)
    made = how(stopper._keeper._folder._claim)
    del made
    if how is not copy.copy:
        made = how(stopper)
        del made
    gc.collect()
    stopper.step(0.5, epoch=1)
    if hasattr(os, "fork"):
        assert "is in use by process" in elsewhere(lambda: started(tmp_path, 2, resume=False))
    taking_over = copy.deepcopy(stopper)
    taking_over.step(0.4, epoch=2)
    with pytest.raises(CheckpointError, match="was taken over by a later run"):
        stopper.step(0.4, epoch=2)


@fork
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    kept: list[EarlyStopping] = []
    assert elsewhere(lambda: kept.append(started(tmp_path)), kill=True) == "None"
    assert json.loads((tmp_path / LOCK).read_text())["pid"] != os.getpid()
    started(tmp_path, resume=False)


@fork
def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    stopper = started(tmp_path)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    try:
        del stopper
        assert elsewhere(lambda: started(tmp_path, resume=False).epoch) == "0"
    finally:
        worker.kill()
        worker.join()


@fork
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_the_owner_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refused(*args: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    stopper = started(tmp_path)
    again = {"resume": False}
    said = elsewhere(lambda: started(tmp_path, **again))
    assert f"is in use by process {os.getpid()} on" in said
    assert f"if that process has ended, remove {tmp_path / LOCK}" in said
    del stopper
    kept: list[EarlyStopping] = []
    elsewhere(lambda: kept.append(started(tmp_path, **again)), kill=True)
    started(tmp_path, **again)  # its owner is known to be dead
    owner = {**lock._owner(), "pid": 1, "started": "1"}
    for change, taken in (({}, True), ({"host": "other"}, False), ({"boot": "x"}, False)):
        (tmp_path / LOCK).write_text(json.dumps({**owner, **change}))
        said = elsewhere(lambda: started(tmp_path, **again).epoch)
        assert said == "0" if taken else "in use by process 1" in said


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a link", "nonsense"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / LOCK
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a link":
        path.symlink_to(tmp_path / "mine")
        (tmp_path / "mine").write_text("mine")
    else:
        path.write_bytes(b"\xff" * 5000)
        started(tmp_path)
        return
    with pytest.raises(CheckpointError, match="cannot write to folder"):
        started(tmp_path)
    assert what != "a link" or (tmp_path / "mine").read_text() == "mine"


# --- a reader beside a writer ---------------------------------------------------------------------


def test_a_reader_beside_a_writer_always_gets_a_whole_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(30, 30)
    stopper = EarlyStopping(model, patience=999, folder=tmp_path)
    fill(model, 0)
    stopper.step(0.0, epoch=0)
    problems: list[BaseException] = []
    found: list[int] = []
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                best = load_best(tmp_path)
                assert bool((best.states["model"]["weight"] == best.epoch).all())
                found.append(best.epoch)
        except BaseException as problem:
            problems.append(problem)

    reader = threading.Thread(target=read)
    reader.start()
    for epoch in range(1, 40):
        fill(model, epoch)
        stopper.step(-float(epoch), epoch=epoch)
    ended.set()
    reader.join()
    assert problems == []
    assert found == sorted(found)
    assert found


@pytest.mark.parametrize("moment", ["the commit is read", "the tensors are opened"])
def test_a_reader_that_a_writer_overtakes_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stopper = started(tmp_path)
    opened = files.open_regular
    calls: list[Path] = []

    def overtaken(path: Path) -> Any:
        calls.append(path)
        if len(calls) == (1 if moment == "the commit is read" else 2):
            with monkeypatch.context() as patch:
                patch.setattr(files, "open_regular", opened)
                stopper.step(0.5, epoch=1)
        return opened(path)

    monkeypatch.setattr(files, "open_regular", overtaken)
    assert load_best(tmp_path).epoch == 1


def test_what_is_hashed_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened once: another one under its name comes too late."""
    started(tmp_path)
    (tensors,) = tmp_path.glob("best-*")
    opened = files.open_regular

    def replaced(path: Path) -> Any:
        file = opened(path)
        if path == tensors:
            tensors.unlink()
            tensors.write_bytes(b"another file")
        return file

    monkeypatch.setattr(files, "open_regular", replaced)
    assert holds(tmp_path, 1)


# --- damage ---------------------------------------------------------------------------------------


def refused(folder: Path) -> None:
    """Check that a damaged checkpoint is a CheckpointError, and can be replaced."""
    with pytest.raises(CheckpointError):
        load_best(folder)
    with pytest.raises(CheckpointError):
        EarlyStopping(nn.Linear(3, 2), patience=9, folder=folder, resume=True)
    stopper = EarlyStopping(nn.Linear(3, 2), patience=9, folder=folder, resume=False)
    fill(nn.Linear(3, 2), 0)
    stopper.step(1.0, epoch=0)
    assert load_best(folder).epoch == 0


def test_no_flipped_bit_of_a_commit_is_accepted(tmp_path: Path) -> None:
    started(tmp_path)
    whole = (tmp_path / COMMIT).read_bytes()
    draw = np.random.default_rng(3)
    for at in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(draw.integers(8))
        (tmp_path / COMMIT).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_best(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"null",
        b'"format"',
        b"[1, 2]",
        b'{"format": "fusereg early stopping"}',
        b"9" * 10_000,
        '{"format": 1}'.encode("utf-16"),
        b"\x00" * 1000,
    ],
    ids=lambda c: repr(c[:12]),
)
def test_nonsense_for_a_commit_is_refused_and_can_be_replaced(
    tmp_path: Path, content: bytes
) -> None:
    started(tmp_path)
    (tmp_path / COMMIT).write_bytes(content)
    refused(tmp_path)


@pytest.mark.parametrize("which", ["commit", "tensors"])
@pytest.mark.parametrize("what", ["a pipe", "a folder", "a link out", "a link to a device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, which: str, what: str) -> None:
    folder = tmp_path / "run"
    started(folder)
    (tensors,) = folder.glob("best-*")
    path = folder / COMMIT if which == "commit" else tensors
    path.rename(tmp_path / "moved")
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "moved" if what == "a link out" else "/dev/zero")
    with pytest.raises(CheckpointError):
        load_best(folder)
    if not (what == "a folder" and which == "commit"):
        refused(folder)
    assert (tmp_path / "moved").exists()


#: Ways to change a commit whose SHA-256 is then made right again, as a forger would.
FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no best": lambda c: c.pop("best"),
    "no progress": lambda c: c.pop("progress"),
    "best is a number": lambda c: c.update(best=1),
    "best is a list": lambda c: c.update(best=[1]),
    "progress is a list": lambda c: c.update(progress=[]),
    "an absolute path": lambda c: c["best"].update(file="/etc/passwd"),
    "a path out": lambda c: c["best"].update(file="../best-000000-0123456789ab.safetensors"),
    "a path in": lambda c: c["best"].update(file="x/best-000000-0123456789ab.safetensors"),
    "the commit": lambda c: c["best"].update(file=COMMIT),
    "a number for a file": lambda c: c["best"].update(file=7),
    "a number for a hash": lambda c: c["best"].update(sha256=7),
    "no hash": lambda c: c["best"].pop("sha256"),
    "another size": lambda c: c["best"].update(bytes=1 << 60),
    "a word for a size": lambda c: c["best"].update(bytes="many"),
    "a word for an epoch": lambda c: c["best"].update(epoch="one"),
    "a Boolean for an epoch": lambda c: c["best"].update(epoch=True),
    "a word for a value": lambda c: c["best"].update(value="low"),
    "an infinite value": lambda c: c["best"].update(value=1e999),
    "a list of states": lambda c: c["best"].update(states=[]),
    "an unknown tensor": lambda c: c["best"]["states"].update(model={"$tensor": "other"}),
    "a tensor by number": lambda c: c["best"]["states"].update(model={"$tensor": [1]}),
    "an unknown tag": lambda c: c["best"]["states"].update(model={"$call": "os.system"}),
    "an unknown dtype": lambda c: c["best"]["states"].update(x={"$dtype": "zzz"}),
    "a function for a dtype": lambda c: c["best"]["states"].update(x={"$dtype": "load"}),
    "no number": lambda c: c["best"]["states"].update(x={"$float": "many"}),
    "no device": lambda c: c["best"]["states"].update(x={"$device": "toaster"}),
    "no pairs": lambda c: c["best"]["states"].update(x={"$dict": [1, 2]}),
    "no bytes": lambda c: c["best"]["states"].update(x={"$bytes": 5}),
    "no set": lambda c: c["best"]["states"].update(x={"$set": [[1]]}),
    "no metadata": lambda c: c["best"]["states"].update(x={"$state_dict": {}}),
    "no array": lambda c: c["best"]["states"].update(x={"$array": 5}),
    "absurd strides": lambda c: reach(c).update(stride=[1 << 40, 1]),
    "overlapping strides": lambda c: reach(c).update(stride=[0, 0]),
    "too few strides": lambda c: reach(c).update(stride=[1]),
    "negative strides": lambda c: reach(c).update(stride=[-3, 1]),
    "strides in words": lambda c: reach(c).update(stride="ab"),
    "an absurd shape": lambda c: reach(c).update(dtype="float64", shape=[1 << 40, 1 << 40]),
    "another dtype": lambda c: reach(c).update(dtype="load", shape=[2, 3]),
}
#: Of these, only a run that resumes reads what is wrong.
FORGED_RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no state": lambda c: c["progress"].pop("state"),
    "a list for a state": lambda c: c["progress"].update(state=[]),
    "no tracks": lambda c: c["progress"]["state"].update(tracks=None),
    "a word for a track": lambda c: c["progress"]["state"].update(tracks=["one"]),
    "two tracks": lambda c: c["progress"]["state"]["tracks"].append(track(c)),
    "a word for a best": lambda c: track(c).update(best="low"),
    "a Boolean for misses": lambda c: track(c).update(misses=True),
    "a word for misses": lambda c: track(c).update(misses="many"),
    "a word for a memory": lambda c: track(c).update(memory="abc"),
    "a word for an epoch": lambda c: c["progress"]["state"].update(epoch="one"),
    "a list for checks": lambda c: c["progress"]["state"].update(checks=[]),
    "an unknown reason": lambda c: c["progress"]["state"]["last"].update(stop=True, reason="x"),
    "a stop without a reason": lambda c: c["progress"]["state"]["last"].update(stop=True),
    "another decision": lambda c: c["progress"]["state"]["last"].update(more=1),
}


def reach(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["best"]["states"]["model"]["$state_dict"]["weight"]
    return found


def track(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["progress"]["state"]["tracks"][0]
    return found


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / COMMIT).read_text())
    change(content)
    content["sha256"] = files._hash_of(content)
    (folder / COMMIT).write_text(json.dumps(content))


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_commit_is_refused_and_can_be_replaced(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    started(tmp_path)
    forge(tmp_path, change)
    refused(tmp_path)


@pytest.mark.parametrize("change", FORGED_RECORDS.values(), ids=FORGED_RECORDS)
def test_forged_records_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    started(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(CheckpointError):
        EarlyStopping(nn.Linear(3, 2), patience=9, folder=tmp_path, resume=True)
    started(tmp_path, 4, resume=False)
    assert holds(tmp_path, 4)


def forged_tensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(24)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(8),
        (1 << 60).to_bytes(8, "little"),
        forged_tensors(b"{}"),
        forged_tensors(b'{"model.weight": {"dtype": "F32", "shape": [2, 3]}}'),
        forged_tensors(
            b'{"model.weight": {"dtype": "X9", "shape": [2, 3], "data_offsets": [0, 24]}}'
        ),
        forged_tensors(
            b'{"model.weight": {"dtype": "F32", "shape": [4294967296, 4294967296], '
            b'"data_offsets": [0, 24]}}'
        ),
        forged_tensors(
            b'{"model.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
        ),
    ],
    ids=range(8),
)
def test_forged_tensors_are_refused(tmp_path: Path, data: bytes) -> None:
    started(tmp_path)
    (tensors,) = tmp_path.glob("best-*")
    tensors.write_bytes(data)
    with tensors.open("rb") as file:
        digest = files.hash_file(file)
    forge(tmp_path, lambda c: c["best"].update(sha256=digest, bytes=len(data)))
    refused(tmp_path)


def test_a_best_state_that_has_gone_is_noticed_by_the_next_save(tmp_path: Path) -> None:
    stopper = started(tmp_path)
    (tensors,) = tmp_path.glob("best-*")
    tensors.unlink()
    with pytest.raises(CheckpointError, match=f"{tensors.name}, the best state, is missing"):
        stopper.step(2.0, epoch=1)


# --- what a file cannot hold ----------------------------------------------------------------------


class Extra(nn.Linear):
    """A layer with an extra state, as those of TransformerEngine, quantizers and others have."""

    def __init__(self, state: Any) -> None:
        super().__init__(3, 2)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_comes_back_from_a_file(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"scale": torch.ones(3)}, file)
    state = {"file": file, "array": np.arange(6, dtype=np.uint32).reshape(2, 3)}
    state["numbers"] = np.float32(0.5)  # type: ignore[assignment]
    EarlyStopping(Extra(state), patience=3, folder=tmp_path).step(1.0, epoch=0)
    fresh = Extra(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        EarlyStopping(fresh, patience=3, folder=tmp_path, resume=True).restore()
    assert fresh.state["file"].getvalue() == file.getvalue()
    assert fresh.state["array"].dtype == np.uint32
    assert fresh.state["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert fresh.state["numbers"] == 0.5


@pytest.mark.parametrize(
    "state",
    [Path("x"), object(), threading.Lock, np.array(["a"]), {"deep": [print]}],
    ids=lambda value: type(value).__name__,
)
def test_extra_state_that_no_file_can_hold_is_found_at_once(tmp_path: Path, state: Any) -> None:
    for on_save_error in ("raise", "warn"):
        with pytest.raises(TypeError, match=r"cannot write model\._extra_state\S* to a checkpoint"):
            EarlyStopping(
                Extra(state),
                patience=3,
                folder=tmp_path,
                on_save_error=on_save_error,  # type: ignore[arg-type]
            )
    assert list(tmp_path.iterdir()) == []
    with contextlib.suppress(TypeError):  # deepcopy's, for a lock
        EarlyStopping(Extra(state), patience=3).step(1.0, epoch=0)


def test_a_run_resumed_from_a_folder_with_a_larger_patience_goes_on(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    stopper = EarlyStopping(model, patience=1, folder=tmp_path)
    stopper.step(1.0, epoch=0)
    assert stopper.step(2.0, epoch=1).stop
    for patience, stopped in ((1, True), (2, False)):
        again = EarlyStopping(model, patience=patience, folder=tmp_path, resume=True)
        assert again.stopped == stopped


def test_reset_leaves_objects_and_the_checkpoint_until_the_next_save(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    stopper = EarlyStopping(model, patience=1, folder=tmp_path)
    fill(model, 1)
    stopper.step(1.0, epoch=4)
    fill(model, 2)
    stopper.reset()
    assert bool((model.weight == 2).all())
    assert holds(tmp_path, 1)
    stopper.step(9.0, epoch=0)
    assert holds(tmp_path, 2)


# --- resuming with another model ------------------------------------------------------------------


def test_resuming_with_a_fresh_model_warns(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    stopper = EarlyStopping(model, patience=9, folder=tmp_path)
    stopper.step(1.0, epoch=0)
    best = {k: v.clone() for k, v in model.state_dict().items()}
    fill(model, 3)
    stopper.step(2.0, epoch=1)
    fresh = nn.Linear(3, 2)
    with pytest.warns(RuntimeWarning, match=r"but not the model in training.* epoch 1\).*fresh"):
        EarlyStopping(fresh, patience=9, folder=tmp_path, resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for state in (best, model.state_dict()):
            fresh.load_state_dict(state)
            EarlyStopping(fresh, patience=9, folder=tmp_path, resume=True)
        EarlyStopping(nn.Linear(3, 2), patience=9, folder=tmp_path, resume=False)
