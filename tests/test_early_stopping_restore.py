"""Early stopping: what a snapshot holds, and that it is restored however the loop ends."""

from __future__ import annotations

import gc
import io
import itertools
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusereg
from fusereg import EarlyStopping
from fusereg.core import snapshot as snapshots
from fusereg.early_stopping import CheckpointError
from stopping_cases import Odd, Partial, fill, holds, train


@pytest.mark.parametrize("place", ["cpu", "device", "disk"])
def test_a_parameter_that_a_custom_state_leaves_out_comes_back(place: Any, tmp_path: Path) -> None:
    model = Partial()
    where: dict[str, Any] = {"folder": tmp_path} if place == "disk" else {}
    stopper = EarlyStopping(model, patience=2, snapshot=place, **where)
    for epoch in stopper.epochs(9):
        fill(model, epoch)
        model.frozen.data.fill_(-1)
        stopper.step(VALUES[epoch], epoch=epoch)
    for name, p in model.named_parameters():
        assert p.tolist() == [-1.0 if name == "frozen" else 1.0] * len(p), name
    if where:
        buffers = fusereg.early_stopping.load_best(tmp_path).buffers
    else:
        buffers = stopper.state_dict()["best"]["buffers"]
    assert list(buffers["model"]) == ["left_out"], "one name for each, and none for the frozen"


def test_two_snapshots_are_held_while_a_new_best_is_taken_and_one_afterwards() -> None:
    shape = (3, 17, 5)

    class Counting(nn.Module):
        during = 0

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(shape))

        def get_extra_state(self) -> int:
            self.during = max(self.during, alive())
            return 0

        def set_extra_state(self, state: int) -> None:
            pass

    def alive() -> int:
        """The memories of this shape, that of the parameter among them."""
        gc.collect()
        found = (o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))
        return len({o.data_ptr() for o in found if o.shape == shape})

    model = Counting()
    stopper = EarlyStopping(model, patience=2)
    for epoch in range(4):
        stopper.step(-epoch, epoch=epoch)
        assert alive() == 2, "the model and one snapshot"
    assert model.during == 2, "the old one is held until the new one is whole"


# --- the ways out ---------------------------------------------------------------------------------

VALUES = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]  # best at epoch 1


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_stopping_brings_the_best_back(place: Any) -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=2, snapshot=place)
    assert list(train(stopper, model, VALUES)) == [0, 1, 2, 3]
    assert holds(model, 1)
    assert model.first.weight is model.second.weight


def test_so_does_the_last_epoch() -> None:
    model = Odd()
    assert list(train(EarlyStopping(model, patience=9), model, VALUES))[-1] == 5
    assert holds(model, 1)


# Each way to loop over the epochs, as a function from the stopper to an iterable.
LOOPS: dict[str, Callable[[EarlyStopping], Any]] = {
    "plain": lambda stopper: stopper.epochs(10),
    "enumerate": lambda stopper: (epoch for _, epoch in enumerate(stopper.epochs(10))),
    "zip": lambda stopper: (epoch for epoch, _ in zip(stopper.epochs(10), range(10), strict=False)),
    "islice": lambda stopper: itertools.islice(stopper.epochs(10), 10),
    "chain": lambda stopper: itertools.chain(stopper.epochs(10), ()),
    "takewhile": lambda stopper: itertools.takewhile(lambda _: True, stopper.epochs(10)),
    "nested": lambda stopper: (epoch for epoch in stopper.epochs(10) for _ in range(1)),
}
if find_spec("tqdm"):
    LOOPS["tqdm"] = lambda stopper: import_module("tqdm").tqdm(
        stopper.epochs(10), file=io.StringIO()
    )


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("leave", [False, True], ids=["to the end", "break when stopped"])
def test_a_check_that_stops_any_loop_restores_at_once(
    loop: Callable[[EarlyStopping], Any], leave: bool
) -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=2)
    named = loop(stopper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in named:
            fill(model, epoch)
            if stopper.step(VALUES[epoch], epoch=epoch).stop:
                assert holds(model, 1)
                if leave:
                    break
        assert (epoch, stopper.epoch) == (3, 3)
        assert holds(model, 1)
        fill(model, 42)
        del named
        gc.collect()
    assert holds(model, 42), "nothing is written after the end"
    assert stopper.explain().endswith("best metric 1 at epoch 1, restored")


@pytest.mark.parametrize("by", ["close", "throw", "return", "next", "a thread"])
def test_every_other_way_out_of_a_loop_warns_too(by: str) -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=9)

    def train() -> None:
        iterator: Any = stopper.epochs(10)
        while True:
            epoch = next(iterator)
            fill(model, epoch)
            stopper.step(VALUES[epoch], epoch=epoch)
            if epoch < 3:
                continue
            if by == "close":
                iterator.close()
            elif by == "throw":
                with pytest.raises(ValueError, match="thrown"):
                    iterator.throw(ValueError("thrown"))
            return

    def run() -> None:
        if by == "a thread":
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
        else:
            train()
        gc.collect()

    with pytest.warns(RuntimeWarning, match="left in epoch 3 before its end"):
        run()
    assert holds(model, 3)
    assert "without a reason to stop" in stopper.explain()


class Cycle:
    """Keeps an iterator until the garbage collector finds it."""

    def __init__(self, held: Any) -> None:
        self.held, self.me = held, self


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("named", ["unnamed", "named", "in a cycle"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_loop_that_is_left_early_warns_and_never_writes(
    loop: Callable[[EarlyStopping], Any], named: str, error: type[BaseException] | None
) -> None:
    """Whenever the iterator is closed: at once, with its name, or by the garbage collector."""
    model = Odd()
    stopper = EarlyStopping(model, patience=9)
    kept: list[Any] = []

    def train(iterator: Any) -> None:
        for epoch in iterator:
            fill(model, epoch)
            stopper.step(VALUES[epoch], epoch=epoch)
            if epoch == 3:
                if error is not None:
                    raise error
                break

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(error) if error else nullcontext() as caught:
            if named == "unnamed":
                train(loop(stopper))
            else:
                kept.append(loop(stopper))
                train(kept[0])
        del caught
        assert holds(model, 3)
        fill(model, 42)
        if named == "in a cycle":
            kept[:] = [Cycle(kept[0])]
        kept.clear()
        gc.collect()
    (one,) = (w for w in heard if w.category is RuntimeWarning)
    assert re.search(
        r"left in epoch 3 before .* \(of epoch 1\) was not restored; call restore\(\), or put the "
        'loop into a block "with stopper:"',
        str(one.message),
    )
    assert holds(model, 42)
    assert stopper.restore() == 1
    assert holds(model, 1)


def test_no_warning_where_nothing_is_left_to_restore() -> None:
    model = Odd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopper = EarlyStopping(model, patience=9)
        for _ in stopper.epochs(3):
            break  # no check yet
        it = stopper.epochs(9)
        stopper.step(1.0, epoch=next(it))
        assert stopper.restore() == 0  # by hand, before the iterator goes
        del it
        for stopper in (
            EarlyStopping(model, patience=9, restore_best=False),
            EarlyStopping(model, patience=9, snapshot="none"),
            EarlyStopping(patience=9),
        ):
            for epoch in stopper.epochs(3):
                stopper.step(1.0, epoch=epoch)
                break
        # An old iterator that goes while a new loop runs.
        stopper = EarlyStopping(model, patience=9)
        it = stopper.epochs(9)
        stopper.step(1.0, epoch=next(it))
        for epoch in stopper.epochs(3):
            stopper.step(2.0, epoch=epoch)
            it = iter(())  # type: ignore[assignment]
            gc.collect()


def test_a_loop_that_never_checks_says_so() -> None:
    stopper = EarlyStopping(Odd(), patience=2)
    with pytest.warns(RuntimeWarning, match="ended without a call of step"):
        for _ in stopper.epochs(3):
            pass
    stopper.step(1.0, epoch=0)
    with pytest.warns(RuntimeWarning, match="ended without a call of step"):
        assert list(stopper.epochs(3)) == [1, 2]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("named", [True, False])
def test_a_with_block_restores_however_it_is_left(
    error: type[BaseException] | None, named: bool
) -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=9)
    kept: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) if error else nullcontext(), stopper:
            epochs = stopper.epochs(10)
            if named:
                kept.append(epochs)
            for epoch in epochs:
                fill(model, epoch)
                if epoch == 4:
                    if error is None:
                        break
                    raise error
                stopper.step(VALUES[epoch], epoch=epoch)
        assert holds(model, 1)
        fill(model, 42)
        del epochs
        kept.clear()
        gc.collect()
    assert holds(model, 42)


@pytest.mark.parametrize("how", ["stop", "exhaustion", "with", "finish"])
def test_an_error_in_restoring_reaches_the_caller(how: str, tmp_path: Path) -> None:
    """With the only copy on the disk, which is damaged meanwhile."""
    model = Odd()
    stopper = EarlyStopping(
        model, patience=2 if how == "stop" else 9, folder=tmp_path, snapshot="disk"
    )

    def loop() -> None:
        for epoch in stopper.epochs(6):
            fill(model, epoch)
            if epoch == 3:
                (file,) = tmp_path.glob("best-*")
                file.write_bytes(b"damaged")
                if how == "finish":
                    stopper.finish()
            stopper.step(VALUES[epoch], epoch=epoch)

    with (
        pytest.raises(CheckpointError, match="is damaged"),
        stopper if how == "with" else nullcontext(),
    ):
        loop()
    assert holds(model, 5 if how in ("with", "exhaustion") else 3)


@pytest.mark.parametrize("refuses", ["model", "optimizer", "thing"])
def test_what_cannot_be_restored_whole_is_not_restored_in_part(refuses: str) -> None:
    class Thing:
        def __init__(self) -> None:
            self.state = 1

        def state_dict(self) -> Any:
            return {"state": self.state}

        def load_state_dict(self, state: Any) -> None:
            if refuses == "thing" and state["state"] == 1:
                raise LookupError("not today")
            self.state = state["state"]

    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    thing = Thing()
    stopper = EarlyStopping(model, patience=2, also={"optimizer": optimizer, "thing": thing})
    stopper.step(1.0, epoch=0)
    fill(model, 3)
    thing.state = 2
    optimizer.param_groups[0]["lr"] = 0.5
    if refuses == "model":
        model.bias = nn.Parameter(torch.full((3,), 3.0))
    if refuses == "optimizer":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises((ValueError, LookupError)):
        stopper.restore()
    assert holds(model, 3)
    assert (thing.state, optimizer.param_groups[0]["lr"]) == (2, 0.5)


def test_the_block_restores_at_its_end_and_not_before() -> None:
    model = Odd()
    with EarlyStopping(model, patience=2) as stopper:
        for epoch in stopper.epochs(10):
            fill(model, epoch)
            stopper.step(VALUES[epoch], epoch=epoch)
        assert holds(model, 3)
    assert holds(model, 1)


def test_not_if_it_is_not_wanted() -> None:
    model = Odd()
    with EarlyStopping(model, patience=2, restore_best=False) as stopper:
        for epoch in stopper.epochs(10):
            fill(model, epoch)
            stopper.step(VALUES[epoch], epoch=epoch)
    assert holds(model, 3)
    assert stopper.restore() == 1
    assert holds(model, 1)
    stopper = EarlyStopping(model, patience=2, restore_best=False)
    assert list(train(stopper, model, VALUES)) == [0, 1, 2, 3]
    assert holds(model, 3)


def test_without_a_best_the_model_stays_as_it_is() -> None:
    model = Odd()
    with EarlyStopping(model, patience=2) as stopper:
        fill(model, 7)
        assert stopper.step(float("nan"), epoch=0).reason == "non_finite"
        assert stopper.restore() is None
    assert holds(model, 7)
    for stopper in (EarlyStopping(patience=2), EarlyStopping(model, patience=2, snapshot="none")):
        stopper.step(1.0, epoch=0)
        assert stopper.restore() is None


def test_restoring_again_gives_the_same_though_training_went_on() -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=2)
    list(train(stopper, model, VALUES))
    for _ in range(2):
        fill(model, 9)
        assert stopper.restore() == 1
        assert holds(model, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_snapshot_leaves_the_old_one_and_its_record(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=9)
    fill(model, 1)
    stopper.step(1.0, epoch=1)
    before = stopper.state_dict(snapshot=False)
    copies = []

    def interrupted(*args: Any) -> Any:
        if len(copies) == 4:
            raise error
        copies.append(clone(*args))
        return copies[-1]

    clone = snapshots._clone_tensor
    monkeypatch.setattr(snapshots, "_clone_tensor", interrupted)
    fill(model, 2)
    with pytest.raises(error), stopper:
        stopper.step(0.5, epoch=2)
    assert len(copies) == 4
    assert holds(model, 1)
    assert stopper.state_dict(snapshot=False) == before
    monkeypatch.undo()
    fill(model, 2)
    assert stopper.step(0.5, epoch=2).new_best  # the check that did not count can be made again
