"""Where the best state is kept, in memory and on disk, on one rank or many.

Every method that ranks have to call together says so; what fails on one rank is raised on all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from .agreement import Ranks, raise_first, told
from .checkpoint import CheckpointError, CheckpointFolder
from .decision import choice
from .snapshot import Place, Snapshot, Sources, clone, release

_OP = "fusereg.EarlyStopping"

Where: TypeAlias = Literal["cpu", "device", "disk", "none"]
OnSaveError: TypeAlias = Literal["raise", "warn"]


class Keeper:
    """Takes, writes and brings back the best state; the arguments are EarlyStopping's.

    Args:
        sources: what a snapshot is taken of.
        ranks: those that take part.
        where: memory, disk or nowhere.
        folder: where checkpoints go, or None.
        resume: what to do with one that is there.
        on_save_error: whether a failed write stops training.
    """

    def __init__(
        self,
        sources: Sources,
        ranks: Ranks,
        where: Where,
        folder: str | os.PathLike[str] | None,
        resume: bool | None,
        on_save_error: OnSaveError,
    ) -> None:
        choice("snapshot", where, ("cpu", "device", "disk", "none"))
        choice("on_save_error", on_save_error, ("raise", "warn"))
        if folder is None:
            if where == "disk" or resume is not None:
                name = "resume" if resume is not None else 'snapshot="disk"'
                raise ValueError(f"{_OP}: {name} needs a folder")
        elif where == "none":
            raise ValueError(
                f'{_OP}: snapshot="none" leaves nothing to write to folder; use "disk"'
            )
        elif ranks.agreement == "none":
            raise ValueError(
                f'{_OP}: agreement="none" and folder exclude each other: the ranks, which decide '
                "apart, would write over each other's checkpoints"
            )
        self._sources = sources
        self._ranks = ranks
        self._where = where
        self._place: Place = "device" if where == "device" else "cpu"
        self._resume = resume
        self._on_save_error = on_save_error
        self._in_memory: Snapshot | None = None
        self._unsaved: Snapshot | None = None  # waits to be written
        self._in_parts = False  # and is spread over the ranks; the same on all of them
        self._on_disk: int | None = None  # the epoch of this run's best in the folder
        self._folder = None if folder is None else CheckpointFolder(folder, fresh=resume is False)

    @property
    def meetings(self) -> dict[str, object]:
        """What decides when the ranks meet: where it differs, one would wait for the others."""
        return {
            "snapshot": self._where,
            "folder": self._folder is not None,
            "model or also": bool(self._sources),
        }

    # -- going on from a folder --

    def open(self) -> dict[str, Any] | None:
        """Makes the folder, and gives the progress in it if this run is to go on from there."""
        folder = self._folder
        if folder is None:
            return None
        try:
            folder.make()
        except OSError as error:
            text = f"{_OP}: cannot write to folder {folder.path}: {error.strerror or error}"
            if self._on_save_error == "raise":
                raise CheckpointError(text) from error
            warnings.warn(
                f'{text}; training goes on (on_save_error="warn")', RuntimeWarning, stacklevel=3
            )
        try:
            progress = folder.read()
        except CheckpointError:
            if self._resume is not False:
                raise
            return None  # what is damaged is replaced like anything else
        if progress is None or self._resume is False:
            return None
        if self._resume is None:
            raise ValueError(
                f"{_OP}: folder {folder.path} holds a checkpoint (best epoch: {folder.best_epoch}"
                "); resume=True goes on from it, resume=False starts anew and replaces it"
            )
        return progress

    def take_over(self) -> None:
        """Makes the best state of the folder this run's, after ``open`` gave its progress."""
        assert self._folder is not None
        if self._where in ("cpu", "device"):
            self._in_memory = self._load_best()
        self._on_disk = self._folder.best_epoch

    # -- the best state --

    def capture(self, epoch: int, value: float) -> Snapshot | None:
        """The state now. All ranks together; raises on all if one has none."""
        if not self._sources or self._where == "none":
            return None
        captured, own = None, None
        if self._where != "disk" or self._ranks.index() == 0 or self._sources.sharded():
            try:
                captured = self._sources.capture(epoch, value, self._place)
            except Exception as problem:
                own = problem
        raise_first(self._ranks.gather(told(own)), own)
        return captured

    def accept(self, captured: Snapshot | None) -> None:
        """From now on this is the best one; None: as before."""
        if captured is not None:
            self._in_memory = captured if self._where in ("cpu", "device") else None
            self._unsaved = captured if self._folder is not None else None
            self._in_parts = self._unsaved is not None and self._sources.sharded()

    def restore(self) -> int | None:
        """Brings the best state back and gives its epoch; None if there is none."""
        kept = self._kept()
        if kept is None and self._where == "disk" and self._on_disk is not None:
            kept = self._load_best()
        if kept is None:
            return None
        self._sources.restore(kept)
        return kept.epoch

    @property
    def restorable(self) -> bool:
        """Whether ``restore`` would find a state."""
        on_disk = self._where == "disk" and self._on_disk is not None
        return on_disk or self._kept() is not None

    def _kept(self) -> Snapshot | None:
        return self._in_memory if self._in_memory is not None else self._unsaved

    def _load_best(self) -> Snapshot | None:
        """The best state in the folder, as this rank holds it."""
        assert self._folder is not None
        found = self._folder.load_best()
        if found is None or not self._sources.sharded():
            return found
        return self._sources.part_of(found, self._place)

    # -- as part of a state_dict --

    def content(self) -> dict[str, Any] | None:
        """The best state in memory, as plain data that shares its tensors; None without one."""
        kept = self._kept()
        if kept is None:
            return None
        return {
            "epoch": kept.epoch,
            "value": kept.value,
            "states": release(kept.states, {}, copying=False),
            "buffers": release(kept.buffers, {}, copying=False),
        }

    def load(
        self, content: Mapping[str, Any] | None, epoch: int | None, value: float | None
    ) -> None:
        """Takes over what ``content`` gave, where the best check is the one of this epoch.

        Without content, a best state that is already here stays if it is of that check.
        """
        if content is None:
            kept = self._kept()
            if kept is None or (kept.epoch, kept.value) != (epoch, value):
                self._in_memory = self._unsaved = None
            if self._on_disk != epoch:
                self._on_disk = None
            return
        memo: dict[Any, Any] = {}
        made = Snapshot(
            content["epoch"],
            content["value"],
            clone(content["states"], self._place, memo),
            clone(content["buffers"], self._place, memo),
        )
        self.accept(made)

    # -- writing --

    def write(self, progress: dict[str, Any], epoch: int) -> None:
        """Writes the progress, and the best state if it is new. All ranks together.

        Raises:
            CheckpointError: rank 0 could not, and that is to stop training.
            TypeError, ValueError: a state has no place in a file.
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
                self._folder.save(progress, self._unsaved)
                self._on_disk = self._folder.best_epoch
                self._unsaved = None
            except CheckpointError as error:
                own = self._failure(self._folder, error, epoch)
                if self._on_save_error == "warn":
                    own = _warn(str(own))
            except Exception as error:
                own = error
        if self._ranks.count() > 1:
            heard = self._ranks.gather((told(own), self._on_disk))
            self._on_disk = heard[0][1]
            if self._where == "disk" or self._ranks.index() > 0:
                # What one rank alone still has, the others cannot go back to.
                self._unsaved = None
            raise_first([problem for problem, _ in heard], own)
        elif own is not None:
            raise own

    def _failure(self, folder: CheckpointFolder, error: CheckpointError, epoch: int) -> Exception:
        """What could not be written, what is whole, and what follows."""
        intact = (
            "there was none before"
            if folder.best_epoch is None
            else f"the checkpoint of epoch {folder.best_epoch} is intact"
        )
        follows = "training goes on" if self._on_save_error == "warn" else "training stops"
        made = CheckpointError(
            f"{_OP}: cannot write the checkpoint of epoch {epoch} to {folder.path}: {error}; "
            f'{intact}; {follows} (on_save_error="{self._on_save_error}")'
        )
        made.__cause__ = error.__cause__
        return made


def _warn(text: str) -> Exception | None:
    """Warns at the caller of step(); gives the warning back where warnings are errors."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    except RuntimeWarning as error:
        return error
    return None
