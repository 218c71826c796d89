"""The best state on disk: whole before it counts, whole whenever the process dies.

A folder holds ``early_stopping.json`` and the safetensors file that it names, with its SHA-256.
The JSON is the commit: it takes the place of the old one by a rename, after the tensors are
written, flushed to the disk (fsync) and under their final name; only then does the old tensors file
go. Until that rename the folder is the old checkpoint, from then on the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .encoding import Encoder, decode
from .snapshot import Snapshot

_OP = "fusereg.EarlyStopping"
FORMAT = "fusereg early stopping"
VERSION = 1
COMMIT = "early_stopping.json"
_TEMPORARY = ".early_stopping-"
_CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is there is not whole."""


def require_safetensors() -> None:
    """Raises ImportError, with the remedy, where the package is missing."""
    for package in ("safetensors", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{_OP}: checkpoint files need the package {package}; "
                'do: pip install "fusereg[checkpoints]"'
            )


class CheckpointFolder:
    """A folder with at most one checkpoint. One run at a time may write to it.

    Args:
        path: the folder; made with the first save, or by :meth:`make`.
        fresh: whether a checkpoint that is there is another run's: the first save replaces it.
    """

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False) -> None:
        require_safetensors()
        self.path = Path(path)
        self._fresh = fresh
        self._best: dict[str, Any] | None = None  # what the committed JSON says of the best

    @property
    def best_epoch(self) -> int | None:
        """Of the checkpoint that is on disk, as far as this object has read or written it."""
        return None if self._best is None else int(self._best["epoch"])

    def make(self) -> None:
        """Makes the folder and tries to write there: better now than after the first epoch."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._workplace() as work:
            (work / "trial").write_bytes(b"")

    # -- reading --

    def read(self) -> dict[str, Any] | None:
        """The progress that was saved last; None if there is no checkpoint.

        Raises:
            CheckpointError: the file is damaged, or of another format or version.
        """
        path = self.path / COMMIT
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"{_OP}: cannot read {path}: {error.strerror}") from error
        try:
            content = json.loads(text)
            found, version = content["format"], content["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{_OP}: {path} is no whole checkpoint: {error!r}") from error
        if found != FORMAT or version != VERSION:
            raise CheckpointError(
                f"{_OP}: {path} is of format {found!r}, version {version}; "
                f"this fusereg reads {FORMAT!r}, version {VERSION}"
            )
        if content.get("sha256") != _hash_of(content):
            raise CheckpointError(f"{_OP}: {path} is damaged: its SHA-256 does not match")
        self._best = content["best"]
        progress: dict[str, Any] = content["progress"]
        return progress

    def load_best(self) -> Snapshot | None:
        """The best state, read from the disk and held against its SHA-256; None if there is none.

        Raises:
            CheckpointError: a file is damaged or missing.
        """
        self.read()
        best = self._best
        if best is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / best["file"]
        try:
            with path.open("rb") as file:
                digest = _hash_file(file)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{_OP}: {self.path / COMMIT} names {path.name}, which is missing"
            ) from error
        if digest != best["sha256"]:
            raise CheckpointError(
                f"{_OP}: {path} is damaged: SHA-256 {digest}, wanted {best['sha256']}"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{_OP}: {path} cannot be read: {error}") from error
        memo: dict[str, Any] = {}
        return Snapshot(
            best["epoch"],
            best["value"],
            decode(best["states"], tensors, memo),
            decode(best["buffers"], tensors, memo),
        )

    # -- writing --

    def save(self, progress: Mapping[str, Any], best: Snapshot | None) -> None:
        """Commits the progress, and the best state if there is a new one (None: as before).

        Raises:
            CheckpointError: the disk did not take it; what was committed before is whole.
            TypeError, ValueError: a state cannot be written, as ``Encoder.encode`` says.
        """
        from safetensors import SafetensorError

        encoder = Encoder()
        entry = None if self._fresh else self._best
        if best is not None:
            entry = {
                "epoch": best.epoch,
                "value": best.value,
                "states": {k: encoder.encode(v, k) for k, v in best.states.items()},
                "buffers": {k: encoder.encode(v, k) for k, v in best.buffers.items()},
            }
        try:
            self._commit(progress, entry, encoder.tensors if best is not None else None)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(reason) from error

    def _commit(
        self, progress: Mapping[str, Any], entry: dict[str, Any] | None, tensors: Any
    ) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        committed = False
        created: Path | None = None
        try:
            with self._workplace() as work:
                if tensors is not None:
                    assert entry is not None
                    created = self._write_tensors(work / "best", tensors, entry)
                    self._flush_folder()
                content = {
                    "format": FORMAT,
                    "version": VERSION,
                    "progress": dict(progress),
                    "best": entry,
                }
                content["sha256"] = _hash_of(content)
                with (work / COMMIT).open("xb") as file:
                    file.write((json.dumps(content, allow_nan=False, indent=1) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(work / COMMIT, self.path / COMMIT)
                committed = True
                self._flush_folder()
        except BaseException:
            # The same epoch saved again may have the old file's name: that one stays.
            old = None if self._best is None else self._best["file"]
            if created is not None and not committed and created.name != old:
                created.unlink(missing_ok=True)
            raise
        finally:
            if committed:
                self._best, self._fresh = entry, False
        self._tidy(None if entry is None else entry["file"])

    def _write_tensors(self, temporary: Path, tensors: Any, entry: dict[str, Any]) -> Path:
        from safetensors.torch import save_file

        save_file(tensors, temporary, {"format": "pt"})
        # safetensors makes a file that only its owner reads; a folder made here tells the umask.
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)
        with temporary.open("r+b") as file:
            digest = _hash_file(file)
            os.fsync(file.fileno())
        path = self.path / f"best-{entry['epoch']:06d}-{digest[:12]}.safetensors"
        entry.update(file=path.name, sha256=digest)
        os.replace(temporary, path)
        return path

    @contextlib.contextmanager
    def _workplace(self) -> Iterator[Path]:
        """A new folder in this one, thus on the same disk, that is gone afterwards.

        A folder, as safetensors writes by a temporary file of its own beside the one it is told:
        this way all that a killed process leaves lies under a name of ours.
        """
        work = self.path / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}.tmp"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _flush_folder(self) -> None:
        """A rename lasts once the folder is on the disk. Windows does so by itself."""
        if os.name == "nt":
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _tidy(self, keep: str | None) -> None:
        """Removes older tensors files, and what a killed process left. Failing at it is no harm."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                old = path.name.startswith("best-") and path.name.endswith(".safetensors")
                left = path.name.startswith(_TEMPORARY) and path.name.endswith(".tmp")
                if left:
                    shutil.rmtree(path, ignore_errors=True)
                elif old and path.name != keep:
                    path.unlink(missing_ok=True)


def _hash_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON without its own hash, in a form that does not depend on layout."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
