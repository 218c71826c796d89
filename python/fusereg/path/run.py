"""fusereg.path: one network, trained with one strength after the other."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core import screen
from ..core.arguments import check_choice, check_integer, check_type
from ..core.files import CheckpointError
from ..core.hints import explains
from ..core.snapshot import Snapshot, Sources
from ..early_stopping import EarlyStopping
from ..penalty.functional import sparsity
from ..penalty.strengths import dimension_of
from ..run.checkpoint import RunFolder
from ..run.training_run import TrainingRun
from . import measure
from .budget import OP, Watch, find, geometric, norms
from .point import PathPoint
from .result import Mode, RegularizationPath

Train: TypeAlias = Callable[[nn.Module, float], Iterator[Any] | None]
Evaluate: TypeAlias = Callable[[nn.Module], "float | Tensor | Mapping[str, float | Tensor]"]

_log = logging.getLogger("fusereg")


@explains()
def path(
    make_model: Callable[[], nn.Module],
    train: Train,
    evaluate: Evaluate,
    *,
    strengths: int | Sequence[float] = 8,
    penalized: Callable[[nn.Module], Any] | None = None,
    dim: int | None = 0,
    names: Sequence[str] | None = None,
    mode: Mode = "max",
    samples: int | None = None,
    patience: int | None = None,
    example_inputs: Any = None,
    smaller: Callable[[nn.Module], nn.Module] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RegularizationPath:
    r"""Train a network with one strength of a penalty after the other, and tabulate what it costs.

    Each strength starts from the weights that the one before ended with. In the order from weak to
    strong this fits deep networks: a group that is zero has no gradient and does not grow again.
    From strong to weak (``strengths`` in descending order) it makes sense only where zeros do
    grow again, as input features with a linear skip do (see :func:`fusereg.prox.hierarchical_`).

    Args:
        make_model: returns the network; called once for the path, and for each
            :meth:`RegularizationPath.model_at`.
        train: trains the network, which is in training mode, with a strength. It makes its own
            optimizer, which takes proximal steps. It may be a generator that yields after each
            epoch.
        evaluate: returns the metric of the network, which is in evaluation mode, on a validation
            split, without recording gradients: a number, or several by name, of which the first is
            chosen by. One named ``"standard_error"`` is that of the first.
        strengths: the strengths >= 0, in ascending or descending order; or a number n: then the
            first training has strength 0, and n lie, each by one factor stronger, between 0.02 and
            1 times the :func:`shrink_budget` of that training. Its learning rates and moves are
            observed in the steps of its ``torch.optim`` or ``fusereg.optim`` optimizers, and all
            trainings should be of the same length. The path ends when no group is left; if some
            are at the n-th strength, because gradients grow under the penalty, it goes on by the
            same factor, for at most n more.
        penalized: returns the parameters that the penalty is on, a tensor or several; needed for a
            number of strengths.
        dim: the dimension of these whose indices are the groups, 1 for the inputs of a linear
            layer; None: each element is one (L1).
        names: of all groups, such as the features' names. Without, they are numbered.
        mode: whether larger or smaller metrics are better.
        samples: on how many samples the metric is an accuracy, or with ``mode="min"`` an error
            rate, for its standard error :math:`\sqrt{p (1 - p) / n}`. For a mean loss let
            ``evaluate`` return a mapping with a ``"standard_error"``.
        patience: of early stopping for each strength: ``train`` must then yield the objective of
            each epoch, the loss with the penalty, preferably on validation data; training with
            this strength ends after so many epochs in a row without a smaller one, and the state
            of the smallest is restored. (The loss without the penalty would be smallest where the
            penalty has not yet done its work.) For all other rules use
            :class:`fusereg.EarlyStopping` in ``train`` itself.
        example_inputs: a tensor or a tuple of arguments with which to count operations and measure
            the time of a forward pass.
        smaller: returns the network to be measured, given a copy of the trained one: where groups
            that are zero are cut out.
        folder: where to save each strength as it is done, or None. The path is a
            :class:`fusereg.TrainingRun` whose epochs are the strengths: a script that was killed
            and is started again goes on with the strength that it was at, from its beginning, and
            computes the same bits, as far as its operations are deterministic.
        resume: whether to go on from what is in the folder.
        progress: whether to show a progress bar; None: if the standard error is a terminal.

    Returns:
        The :class:`RegularizationPath`. Print it to see its table.

    Raises:
        TypeError, ValueError: an argument is invalid, a callback returns what it should not, or
            the folder holds a path over other strengths.
        CheckpointError: as :class:`fusereg.TrainingRun`.

    Example:
        >>> path = fusereg.path(
        ...     make_model, train, evaluate, penalized=lambda m: m[0].weight, dim=1, samples=400
        ... )
        >>> print(path)
        >>> path.plot("path.png")
        >>> model = path.model_at(path.chosen)
    """
    functions = {"make_model": make_model, "train": train, "evaluate": evaluate}
    for name, thing in {**functions, "penalized": penalized, "smaller": smaller}.items():
        # A path that is done, and read from its folder, calls no train.
        if thing is None and (name not in functions or (name == "train" and folder is not None)):
            continue
        if not callable(thing) or (name == "make_model" and isinstance(thing, nn.Module)):
            raise TypeError(f"{OP}: {name} must be a function, got {type(thing).__name__}")
    asked = _check_strengths(strengths, penalized)
    check_choice(mode, ("max", "min"), f"{OP}: mode")
    for name, number in (("samples", samples), ("patience", patience)):
        if number is not None:
            check_integer(number, 1, f"{OP}: {name}")
    if example_inputs is not None:
        wanted = "a tensor or a tuple of the model's arguments"
        check_type(example_inputs, (Tensor, tuple, list), f"{OP}: example_inputs", wanted)
    elif smaller is not None:
        raise ValueError(f"{OP}: smaller goes with example_inputs, to measure what it returns")
    model = make_model()
    check_type(model, nn.Module, f"{OP}: what make_model returns", "a torch.nn.Module")
    groups = _Groups(penalized, dim, names, model)
    record = _Record(asked)
    count = 2 * asked + 1 if isinstance(asked, int) else len(asked)
    run = None
    if folder is not None:
        run = TrainingRun(
            folder, model=model, path=record, keep_best=count, mode="max", resume=resume
        )
        record.check(asked)
    states = Sources(OP, {"model": model})
    kept: list[Snapshot] = []

    with _Bar(count, len(record.points), progress) as bar:
        for index in _indices(run, count, record):
            bracketing = record.strengths is None
            strength = 0.0 if record.strengths is None else record.strengths[index]
            bar.show(strength)
            model.zero_grad(set_to_none=True)
            model.train()
            if bracketing:
                with Watch(lambda: groups.tensors(model), dim) as watch:
                    epochs = _train(train, model, strength, patience, bar)
                record.bracket(watch.strength())
            else:
                epochs = _train(train, model, strength, patience, bar)
            model.eval()
            with torch.no_grad():
                metrics, error = _metrics(evaluate(model), mode, samples)
            if math.isnan(next(iter(metrics.values()))):
                _log.warning("%s: the metric is NaN at strength %g", OP, strength)
            tensors = groups.tensors(model)
            point = PathPoint(
                strength, metrics, error, sparsity(tensors or model), groups.used(model), epochs
            )
            costs = {} if example_inputs is None else _costs(model, smaller, example_inputs)
            record.points.append(PathPoint(**{**asdict(point), **costs}))
            bar.advance()
            if run is None:
                kept.append(states.capture(index, math.nan, "cpu"))

    def load(index: int) -> nn.Module:
        made = make_model()
        snapshot = kept[index] if folder is None else _read(folder, index)
        Sources(OP, {"model": made}).restore(snapshot)
        return made

    return RegularizationPath(record.points, mode, groups.names, samples, load)


def _check_strengths(strengths: Any, penalized: Any) -> int | list[float]:
    """Return the number of strengths, or the strengths."""
    if isinstance(strengths, int) and not isinstance(strengths, bool):
        if strengths < 1:
            raise ValueError(f"{OP}: strengths must be at least 1, got {strengths}")
        if penalized is None:
            raise ValueError(
                f"{OP}: a number of strengths needs penalized=, the parameters whose norms bracket "
                "them; or pass strengths as a sequence"
            )
        return strengths
    found = None
    if not isinstance(strengths, str):  # whose characters may be numbers
        with suppress(TypeError, ValueError, RuntimeError):
            found = [float(s) for s in strengths]
    if found is None:
        raise TypeError(
            f"{OP}: strengths must be an int or a sequence of numbers, got {strengths!r}"
        )
    if not found:
        raise ValueError(f"{OP}: strengths must be at least one, got none")
    if not all(0 <= s < math.inf for s in found):
        raise ValueError(f"{OP}: strengths must be finite and not negative, got {found}")
    steps = [b - a for a, b in itertools.pairwise(found)]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise ValueError(f"{OP}: strengths must ascend or descend, got {found}")
    return found


class _Groups:
    """The penalized parameters and the names of their groups."""

    def __init__(
        self,
        penalized: Callable[[nn.Module], Any] | None,
        dim: int | None,
        names: Sequence[str] | None,
        model: nn.Module,
    ) -> None:
        self._penalized, self._dim = penalized, dim
        if isinstance(names, str):
            raise TypeError(f"{OP}: names must be one for each group, got the word {names!r}")
        if names is not None and (penalized is None or dim is None):
            raise ValueError(f"{OP}: names go with penalized, and with a dim that has groups")
        for w in self.tensors(model):
            if dim is not None:
                dimension_of(w, dim, f"{OP}: dim", "what penalized returns")
        count = len(self.used(model))
        self.names = (
            [f"group {i}" for i in range(count)] if names is None else list(map(str, names))
        )
        if len(self.names) != count or len(set(self.names)) != count:
            raise ValueError(f"{OP}: names must be {count} different ones, got {self.names}")

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """Return the penalized parameters."""
        return [] if self._penalized is None else find(self._penalized, model)

    def used(self, model: nn.Module) -> list[bool]:
        """Return of each group whether one of its weights is not zero."""
        if self._dim is None:
            return []
        return [used for w in self.tensors(model) for used in (norms(w, self._dim) != 0).tolist()]


class _Record:
    """A record of the strengths that are done, from which a path is resumed."""

    def __init__(self, asked: int | list[float]) -> None:
        self.points: list[PathPoint] = []
        self._asked = asked
        #: None before the training that brackets them.
        self.strengths = None if isinstance(asked, int) else asked

    def bracket(self, high: float) -> None:
        """Set the strengths, from the one that removes all."""
        assert isinstance(self._asked, int)
        if high == 0:
            raise ValueError(f"{OP}: all penalized parameters are zero, and none of them moves")
        self.strengths = [0.0, *geometric(high, self._asked)]

    @property
    def stopped(self) -> bool:
        """Return whether nothing is left that stronger penalties could remove."""
        last = self.points[-1] if self.points and isinstance(self._asked, int) else None
        return last is not None and last.zeros == 1.0

    def check(self, asked: int | list[float]) -> None:
        """Raise if a record that was loaded is of another path."""
        if self._asked != asked:
            raise ValueError(
                f"{OP}: the folder holds a path over other strengths ({self._asked}, and now "
                f"{asked}); use another folder, or resume=False to begin anew"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the points and strengths."""
        points = [asdict(p) for p in self.points]
        return {"asked": self._asked, "strengths": self.strengths, "points": points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what state_dict() returned."""
        self._asked, self.strengths = state["asked"], state["strengths"]
        self.points = [PathPoint(**p) for p in state["points"]]


def _indices(run: TrainingRun | None, count: int, record: _Record) -> Iterator[int]:
    """Yield the indices of the strengths that are not yet done; save after each."""
    if run is None:
        yield from itertools.takewhile(lambda _: not record.stopped, range(count))
        return
    for index in run.epochs(count):  # which asks the record whether it has stopped
        for _ in run.batches([None]):
            yield index
        run.save(metric=float(index))  # as all of the best are kept, all are


def _read(folder: str | os.PathLike[str], index: int) -> Snapshot:
    """Return the state of the network after a strength, from its checkpoint."""
    reader = RunFolder(folder)
    last, best = reader.entries() or ({}, [])
    for entry in (last, *best):
        if entry.get("epoch") == index + 1:
            return Snapshot(index, math.nan, **reader.read_states(entry, "shared"))
    raise CheckpointError(f"{OP}: folder {reader.path} no longer holds strength number {index}")


def _train(
    train: Train, model: nn.Module, strength: float, patience: int | None, bar: _Bar
) -> int | None:
    """Train with a strength; return the number of epochs, if it is known."""
    epochs = train(model, strength)
    check_type(epochs, (Iterator, type(None)), f"{OP}: what train returns", "None or a generator")
    if epochs is None:
        if patience is not None:
            raise TypeError(f"{OP}: with patience, train must yield the objective of each epoch")
        return None
    stopper = None if patience is None else EarlyStopping(model, patience=patience)
    done = 0
    for value in epochs:
        done += 1
        bar.epoch(done)
        if stopper is not None:
            if value is None:
                raise TypeError(
                    f"{OP}: with patience, train must yield the objective of each epoch, got None"
                )
            if stopper.step(value, epoch=done).stop:
                break
        model.train()
    close = getattr(epochs, "close", None)
    if close is not None:
        close()
    if stopper is not None:
        stopper.finish()
    return done


def _metrics(found: Any, mode: Mode, samples: int | None) -> tuple[dict[str, float], float | None]:
    """Return the metrics by name, and the standard error of the first."""
    if not isinstance(found, Mapping):
        share = "accuracy" if mode == "max" else "error rate"
        found = {"metric" if samples is None else share: found}
    try:
        metrics = {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:  # of tensors with several elements
        raise TypeError(f"{OP}: evaluate must return numbers, got {found!r}") from error
    standard_error = metrics.pop("standard_error", None)
    if not metrics:
        raise ValueError(f"{OP}: evaluate must return a metric, got {found!r}")
    name, value = next(iter(metrics.items()))
    if mode == "max" and ("loss" in name.lower() or "error" in name.lower()):
        raise ValueError(f'{OP}: is a smaller {name} better? Then pass mode="min"')
    if math.isnan(value):
        return metrics, None
    if standard_error is None and samples is not None:
        if not 0 <= value <= 1:
            raise ValueError(
                f"{OP}: samples are for the standard error of an accuracy in [0, 1], got "
                f"{name} = {value}"
            )
        standard_error = math.sqrt(value * (1 - value) / samples)
    if standard_error is not None and not standard_error >= 0:
        raise ValueError(f"{OP}: standard_error must not be negative, got {standard_error}")
    return metrics, standard_error


def _costs(
    model: nn.Module, smaller: Callable[[nn.Module], nn.Module] | None, example_inputs: Any
) -> dict[str, Any]:
    """Return what the network costs, that which ``smaller`` makes of it where there is one."""
    if smaller is None:
        return measure.cost(model, example_inputs)
    try:
        return measure.cost(smaller(copy.deepcopy(model)), example_inputs)
    except (ValueError, RuntimeError) as error:
        _log.warning("%s: no smaller network could be measured: %s", OP, error)
        return {}


class _Bar:
    """A progress bar over the strengths."""

    def __init__(self, count: int, done: int, wanted: bool | None) -> None:
        from rich.console import Console

        console = Console(stderr=True, force_terminal=wanted or None)
        self._progress = screen.progress(console, wanted=wanted is not False)
        self._task = self._progress.add_task("", total=count, completed=done)
        self._text = ""

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, strength: float) -> None:
        """Show which strength is in training."""
        self._text = f"strength {strength:.3g}"
        self._progress.update(self._task, description=self._text)

    def epoch(self, number: int) -> None:
        """Show how many epochs of it are done."""
        self._progress.update(self._task, description=f"{self._text}, epoch {number}")

    def advance(self) -> None:
        """Count a strength as done."""
        self._progress.advance(self._task)
