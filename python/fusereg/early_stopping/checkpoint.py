"""Checkpoint files of the best state.

A folder holds ``early_stopping.json``, with the progress, and the safetensors file that it names;
see :mod:`fusereg.core.files` for how they stay whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.encoding import Encoder, decode
from ..core.files import CheckpointError, Folder, check_kinds
from ..core.snapshot import Snapshot
from .checks import OP

FORMAT = "fusereg early stopping"
VERSION = 1
COMMIT = "early_stopping.json"
#: The types of what a commit says of the best state.
_BEST: dict[str, tuple[type, ...]] = {
    "epoch": (int,), "value": (int, float), "states": (dict,), "buffers": (dict,), "sha256": (str,),
}  # fmt: skip
_DATA = r"best-\d{6,}-[0-9a-f]{12}\.safetensors"


class CheckpointFolder(Folder):
    """A folder with at most one checkpoint. One run at a time may write to it.

    Args:
        path: the folder; created by the first save, or by :meth:`claim`.
        fresh: whether an existing checkpoint is another run's, which the first save replaces.
    """

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False) -> None:
        super().__init__(OP, path, COMMIT, FORMAT, VERSION, _DATA)
        self._fresh = fresh
        #: The commit's entry of the best state that this object has read or written last.
        self.best: dict[str, Any] | None = None

    @property
    def best_epoch(self) -> int | None:
        """Epoch of the best state in the checkpoint that this object read or wrote last."""
        return None if self.best is None else int(self.best["epoch"])

    def brief(self) -> dict[str, Any] | None:
        """Return what identifies the best state, for the ranks that do not write."""
        return self.best and {key: self.best[key] for key in ("epoch", "sha256", "file")}

    def begin_anew(self) -> None:
        """Forget the checkpoint; it stays until the next save replaces it."""
        self.best, self._fresh = None, True

    def intact(self) -> str:
        """Return a few words on which checkpoint the folder holds, for a failed save's error."""
        if self.best is None:
            return "there was none before"
        if self.names(self.path / self.best["file"]):
            return f"the checkpoint of epoch {self.best_epoch} is intact"
        return "the folder holds none of this run"

    def names(self, path: Path) -> bool:
        """Return whether the commit on the disk names this file."""
        try:
            best = (self.read() or {}).get("best")
        except CheckpointError:
            return False
        return best is not None and best["file"] == path.name

    # -- reading --

    def progress(self) -> dict[str, Any] | None:
        """Return the progress that was saved last; None if there is no checkpoint.

        Raises:
            CheckpointError: the file is damaged, or of another format or version.
        """

        def read(content: dict[str, Any]) -> dict[str, Any]:
            self.best = self._entry(content)
            progress: dict[str, Any] = content["progress"]
            return progress

        return self.load(read)

    def _entry(self, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the commit's entry of the best state; raise unless its content is of our form."""
        best, progress = content["best"], content["progress"]
        if not isinstance(progress, dict):
            raise TypeError(f"progress is {type(progress).__name__}")
        if best is None:
            return None
        check_kinds(best, _BEST)
        if not math.isfinite(best["value"]):
            raise ValueError(f"best.value is {best['value']}")
        self.path_of(best["file"])
        entry: dict[str, Any] = best
        return entry

    def load_best(self, own: bool = False) -> Snapshot | None:
        """Read the best state and check its SHA-256; return None if there is none.

        Args:
            own: whether it must be the one that this object has read or written.

        Raises:
            CheckpointError: a file is damaged or missing, or another run's.
        """
        wanted = self.best

        def read(content: dict[str, Any]) -> Snapshot | None:
            best = self._entry(content)
            if best is None:
                return None
            if own and (wanted is None or best["sha256"] != wanted["sha256"]):
                raise CheckpointError(
                    f"{OP}: {self.commit_path} was written by another run meanwhile; each run "
                    "needs a folder of its own"
                )
            tensors = self.read_tensors(self.path_of(best["file"]), best)
            memo: dict[str, Any] = {}
            states, buffers = (decode(best[k], tensors, memo) for k in ("states", "buffers"))
            self.best = best
            return Snapshot(best["epoch"], best["value"], states, buffers)

        return self.load(read)

    # -- writing --

    def save(self, progress: Mapping[str, Any], best: Snapshot | None) -> None:
        """Write the progress, and the best state unless it is None (unchanged).

        Raises:
            CheckpointError: writing failed; the checkpoint from before is intact.
            TypeError, ValueError: ``Encoder.encode`` cannot encode a state.
        """
        from safetensors import SafetensorError

        encoder = Encoder(OP)
        entry = None if self._fresh else self.best
        if best is not None:
            entry = {
                "epoch": best.epoch,
                "value": best.value,
                "states": {k: encoder.encode(v, k) for k, v in best.states.items()},
                "buffers": {k: encoder.encode(v, k) for k, v in best.buffers.items()},
            }
        try:
            self._save(progress, entry, encoder.tensors if best is not None else None)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(getattr(error, "strerror", None) or str(error)) from error

    def _save(
        self, progress: Mapping[str, Any], entry: dict[str, Any] | None, tensors: Any
    ) -> None:
        """Write the files and rename them into place."""
        created: Path | None = None
        try:
            with self.workplace() as work:
                if tensors is not None:
                    assert entry is not None
                    entry.update(self.write_tensors(work / "best", tensors))
                    name = f"best-{entry['epoch']:06d}-{entry['sha256'][:12]}.safetensors"
                    entry["file"], created = name, self.path / name
                    os.replace(work / "best", created)
                    self.flush()
                elif entry is not None and not (self.path / entry["file"]).exists():
                    raise CheckpointError(f"{entry['file']}, the best state, is missing")
                self.commit(work, {"progress": dict(progress), "best": entry})
                self.best, self._fresh, created = entry, False, None
                self.flush()
        finally:
            # By what is on the disk, as an interruption may have come right after the commit; the
            # same epoch saved again has the same name as the file that is committed.
            if created is not None and not self.names(created):
                created.unlink(missing_ok=True)
        self.remove_others(() if entry is None else (entry["file"],))
