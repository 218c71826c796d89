"""Storage of the best state, in memory and on disk, on one rank or many.

Methods that all ranks must call say so; an error on one rank is raised on all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from ..core.arguments import check_choice
from ..core.encoding import check_savable
from ..core.files import CheckpointError
from ..core.lock import FolderInUse
from ..core.ranks import Problem, attempt, describe, raise_first
from ..core.snapshot import Memo, Place, Snapshot, Sources, clone, fingerprint, release
from .agreement import AgreeingRanks
from .checkpoint import CheckpointFolder
from .checks import OP

Where: TypeAlias = Literal["cpu", "device", "disk", "none"]
SAME_ARGUMENTS = (
    "the ranks must have the same arguments (rank 0 alone writes to folder, but all must be given "
    "it)"
)

OnSaveError: TypeAlias = Literal["raise", "warn"]


class Opened(NamedTuple):
    """The message of each rank to the others when the folder is opened."""

    problem: Problem | None
    progress: dict[str, Any] | None
    best: dict[str, Any] | None


class Keeper:
    """Captures, writes and restores the best state; arguments as EarlyStopping's."""

    def __init__(
        self,
        sources: Sources,
        ranks: AgreeingRanks,
        where: Where,
        folder: str | os.PathLike[str] | None,
        resume: bool | None,
        on_save_error: OnSaveError,
    ) -> None:
        check_choice(where, ("cpu", "device", "disk", "none"), f"{OP}: snapshot")
        check_choice(on_save_error, ("raise", "warn"), f"{OP}: on_save_error")
        if folder is None:
            if where == "disk" or resume is not None:
                name = "resume" if resume is not None else 'snapshot="disk"'
                raise ValueError(f"{OP}: {name} needs a folder")
        elif where == "none":
            raise ValueError(f'{OP}: snapshot="none" leaves nothing to write to folder; use "disk"')
        elif ranks.agreement == "none":
            raise ValueError(
                f'{OP}: agreement="none" and folder exclude each other: the ranks, which decide '
                "apart, would write over each other's checkpoints"
            )
        self._sources = sources
        self._ranks = ranks
        self._where = where
        self._place: Place = "device" if where == "device" else "cpu"
        self._resume = resume
        self._on_save_error = on_save_error
        self._in_memory: Snapshot | None = None
        self._unsaved: Snapshot | None = None  # still to be written
        self._in_parts = False  # whether that one is sharded; the same on all ranks
        self._on_disk: int | None = None  # the epoch of this run's best in the folder
        self._models: dict[str, str | None] = {}  # fingerprints of the last model and the best
        self._folder = None if folder is None else CheckpointFolder(folder, fresh=resume is False)

    @property
    def collective_arguments(self) -> dict[str, object]:
        """The arguments that collectives depend on: with different ones, ranks would hang."""
        return {
            "snapshot": self._where,
            "folder": self._folder is not None,
            "model or also": bool(self._sources),
        }

    # -- resuming from a folder --

    def open(self) -> dict[str, Any] | None:
        """Lock the folder, and return the progress in it if this run resumes from it.

        All ranks must call it, and all raise if it fails on one. Rank 0 alone uses the folder.
        """
        if self._folder is None:
            return None
        folder = self._folder

        def checked() -> dict[str, Any] | None:
            check_savable(self._sources, OP)
            return self._open(folder) if self._ranks.index() == 0 else None

        own, progress = attempt(checked)
        heard = self._ranks.gather(Opened(describe(own), progress, self._folder.brief()))
        if any(not isinstance(opened, Opened) for opened in heard):
            raise ValueError(f"{OP}: {SAME_ARGUMENTS}")
        raise_first([opened.problem for opened in heard], own)
        if self._ranks.index() > 0:
            _, progress, self._folder.best = heard[0]
        return progress

    def _open(self, folder: CheckpointFolder) -> dict[str, Any] | None:
        """Open the folder, on rank 0."""
        self._resumed(folder)  # before the folder is claimed: another run may be using it
        if self._ranks.unsettled():
            return self._resumed(folder)  # rank 0, which is not known yet, claims it when it saves
        try:
            folder.claim()
        except CheckpointError as error:
            if self._on_save_error == "raise" or isinstance(error.__cause__, FolderInUse):
                raise
            text = f'{error}; training goes on (on_save_error="warn")'
            warnings.warn(text, RuntimeWarning, stacklevel=5)
        return self._resumed(folder)

    def _resumed(self, folder: CheckpointFolder) -> dict[str, Any] | None:
        """Return the progress in the folder if this run resumes from it."""
        try:
            progress = folder.progress()
        except CheckpointError:
            if self._resume is not False:
                raise
            return None  # a damaged checkpoint is replaced like any other
        if progress is None or self._resume is False:
            return None
        if self._resume is None:
            raise ValueError(
                f"{OP}: folder {folder.path} holds a checkpoint (best epoch: {folder.best_epoch}"
                "); resume=True goes on from it, resume=False starts anew and replaces it"
            )
        return progress

    def take_over(self) -> None:
        """Make the folder's best state this run's, after ``open`` returned its progress.

        All ranks must call it, and all raise if it fails on one.
        """
        assert self._folder is not None
        in_memory = self._where != "disk"
        self._in_memory = self._ranks.together(lambda: self._load_best() if in_memory else None)
        self._on_disk = self._folder.best_epoch

    def _fingerprint(self) -> str | None:
        """Return a hash by which the present model is known again; None without a model."""
        model = self._sources.module("model")
        return None if model is None else fingerprint(model)

    def unfamiliar(self, models: Any) -> bool:
        """Return whether the model is neither of those that ``write`` has noted in the progress."""
        if not isinstance(models, dict) or self._ranks.index() > 0 or self._sources.sharded():
            return False
        self._models = models
        mine = self._fingerprint()
        return mine is not None and mine not in models.values()

    def close(self) -> None:
        """Give the folder back to the run that had it before."""
        if self._folder is not None:
            self._folder.release()

    def forget(self) -> None:
        """Forget the best state; that in the folder stays until the next save."""
        self._in_memory = self._unsaved = self._on_disk = None
        self._in_parts = False
        if self._folder is not None:
            self._folder.begin_anew()

    # -- the best state --

    def capture(self, epoch: int, value: float) -> Snapshot | None:
        """Take a snapshot. All ranks must call it, and all raise if it fails on one."""
        if not self._sources or self._where == "none":
            return None
        wanted = self._where != "disk" or self._ranks.index() == 0 or self._sources.sharded()
        return self._ranks.together(
            lambda: self._sources.capture(epoch, value, self._place) if wanted else None
        )

    def accept(self, captured: Snapshot) -> None:
        """Make this snapshot the best state."""
        self._in_memory = captured if self._where in ("cpu", "device") else None
        self._unsaved = captured if self._folder is not None else None
        self._in_parts = self._unsaved is not None and self._sources.sharded()

    def restore(self) -> int | None:
        """Restore the best state and return its epoch; None if there is none."""
        kept = self._kept()
        if kept is None and self._where == "disk" and self._on_disk is not None:
            kept = self._load_best()
        if kept is None:
            return None
        self._sources.restore(kept)
        return kept.epoch

    @property
    def restorable(self) -> bool:
        """Return whether ``restore`` would find a state."""
        return self._kept() is not None or (self._where == "disk" and self._on_disk is not None)

    def _kept(self) -> Snapshot | None:
        """Return the best state in memory."""
        return self._in_memory if self._in_memory is not None else self._unsaved

    def _load_best(self) -> Snapshot | None:
        """Load the best state in the folder, sharded as this rank's model."""
        assert self._folder is not None
        found = self._folder.load_best(own=True)
        if found is None or not self._sources.sharded():
            return found
        return self._sources.part_of(found, self._place)

    # -- as part of a state_dict --

    def content(self) -> dict[str, Any] | None:
        """Return the best state in memory as plain data that shares its tensors; None without."""
        kept = self._kept()
        if kept is None:
            return None
        states, buffers = (release(t, {}, copying=False) for t in (kept.states, kept.buffers))
        return {"epoch": kept.epoch, "value": kept.value, "states": states, "buffers": buffers}

    def load(
        self, content: Mapping[str, Any] | None, epoch: int | None, value: float | None
    ) -> None:
        """Load what ``content`` returned.

        Without content, a best state that is already here stays if it is that of this epoch and
        value.
        """
        if content is None:
            kept = self._kept()
            if kept is None or (kept.epoch, kept.value) != (epoch, value):
                self._in_memory = self._unsaved = None
            if self._on_disk != epoch:
                self._on_disk = None
            return
        memo: Memo = {}
        states, buffers = (clone(content[k], self._place, memo) for k in ("states", "buffers"))
        self.accept(Snapshot(content["epoch"], content["value"], states, buffers))

    def why_not_movable(self) -> str | None:
        """Return why the best state cannot become that of another model; None if it can."""
        if others := [name for name in self._sources.names() if name != "model"]:
            return f"it keeps states of {', '.join(others)} as well, which belong to the model"
        if self._folder is not None:
            return (
                "it keeps its best state in a folder, where another model's would be out of place"
            )
        return None

    def move(self, model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Keep states of another model from now on, the best one so far as changed."""
        content = self.content()
        self._sources = Sources(OP, {"model": model})
        if content is not None:
            states = {"model": change(content["states"]["model"])}
            self.load({**content, "states": states}, content["epoch"], content["value"])

    # -- writing --

    def write(self, progress: dict[str, Any], new_best: bool, epoch: int) -> None:
        """Write the progress, and the best state if it is new. All ranks must call it.

        Raises:
            CheckpointError: rank 0 could not write, with ``on_save_error="raise"``.
            TypeError, ValueError: a file cannot hold a state.
        """
        if self._folder is None:
            return
        if self._in_parts and self._unsaved is not None:
            whole = self._sources.whole(self._unsaved)
            self._unsaved = whole if self._ranks.index() == 0 else None
            self._in_parts = False
        own: Exception | None = None
        if self._ranks.index() == 0:
            try:
                self._models["last"] = self._fingerprint()
                if new_best:
                    self._models["best"] = self._models["last"]
                self._folder.save({**progress, "model": self._models}, self._unsaved)
                self._on_disk = self._folder.best_epoch
                self._unsaved = None
            except CheckpointError as error:
                own = self._failure(self._folder, error, epoch)
                if self._on_save_error == "warn":
                    try:
                        warnings.warn(str(own), RuntimeWarning, stacklevel=3)
                        own = None
                    except RuntimeWarning as warning:  # where warnings are errors
                        own = warning
            except Exception as error:
                own = error
        heard = self._ranks.gather((describe(own), self._on_disk, self._folder.brief()))
        if len(heard) > 1:
            _, self._on_disk, brief = heard[0]
            if self._ranks.index() > 0:
                self._folder.best = brief
            if self._where == "disk" or self._ranks.index() > 0:
                # The other ranks could not restore what rank 0 alone still holds.
                self._unsaved = None
        raise_first([problem for problem, *_ in heard], own)

    def _failure(self, folder: CheckpointFolder, error: CheckpointError, epoch: int) -> Exception:
        """Return an error that says what was not written, what is intact, and what follows."""
        follows = "training goes on" if self._on_save_error == "warn" else "training stops"
        made = CheckpointError(
            f"{OP}: cannot write the checkpoint of epoch {epoch} to {folder.path}: {error}; "
            f'{folder.intact()}; {follows} (on_save_error="{self._on_save_error}")'
        )
        made.__cause__ = error.__cause__
        return made
