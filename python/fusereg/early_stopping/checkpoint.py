"""Checkpoint files of the best state, written atomically.

A folder holds ``early_stopping.json`` and the safetensors file that it names, with its SHA-256.
The JSON is the commit: it replaces the old one by a rename, after the tensors are written, flushed
to the disk (fsync) and renamed to their final name; the old tensors file is removed afterwards. So
a process that dies before that rename leaves the old checkpoint, and later the new one.
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

from .checks import OP
from .encoding import Encoder, decode
from .snapshot import Snapshot

FORMAT = "fusereg early stopping"
VERSION = 1
COMMIT = "early_stopping.json"
_TEMPORARY = ".early_stopping-"
_CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is damaged."""


def require_safetensors() -> None:
    """Raise ImportError if safetensors, or numpy, which it needs, is not installed."""
    for package in ("safetensors", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{OP}: checkpoint files need the package {package}; "
                'do: pip install "fusereg[checkpoints]"'
            )


class CheckpointFolder:
    """A folder with at most one checkpoint. One run at a time may write to it.

    Args:
        path: the folder; created by the first save, or by :meth:`make`.
        fresh: whether an existing checkpoint is another run's, which the first save replaces.
    """

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False) -> None:
        require_safetensors()
        self.path = Path(path)
        self._fresh = fresh
        self._best: dict[str, Any] | None = None  # the committed JSON's entry

    @property
    def best_epoch(self) -> int | None:
        """Epoch of the best state in the checkpoint that this object read or wrote last."""
        return None if self._best is None else int(self._best["epoch"])

    def make(self) -> None:
        """Create the folder, and try to write to it, to fail before the first epoch is trained."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._temporary_folder() as work:
            (work / "trial").write_bytes(b"")

    # -- reading --

    def read(self) -> dict[str, Any] | None:
        """Return the progress that was saved last; None if there is no checkpoint.

        Raises:
            CheckpointError: the file is damaged, or of another format or version.
        """
        path = self.path / COMMIT
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"{OP}: cannot read {path}: {error.strerror}") from error
        try:
            content = json.loads(text)
            found, version = content["format"], content["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{OP}: {path} is not a complete checkpoint: {error!r}"
            ) from error
        if found != FORMAT or version != VERSION:
            raise CheckpointError(
                f"{OP}: {path} is of format {found!r}, version {version}; "
                f"this fusereg reads {FORMAT!r}, version {VERSION}"
            )
        if content.get("sha256") != _hash_of(content):
            raise CheckpointError(f"{OP}: {path} is damaged: its SHA-256 does not match")
        self._best = content["best"]
        progress: dict[str, Any] = content["progress"]
        return progress

    def load_best(self) -> Snapshot | None:
        """Read the best state and check its SHA-256; return None if there is none.

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
                f"{OP}: {self.path / COMMIT} names {path.name}, which is missing"
            ) from error
        if digest != best["sha256"]:
            raise CheckpointError(
                f"{OP}: {path} is damaged: SHA-256 {digest}, wanted {best['sha256']}"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{OP}: {path} cannot be read: {error}") from error
        memo: dict[str, Any] = {}
        return Snapshot(
            best["epoch"],
            best["value"],
            decode(best["states"], tensors, memo),
            decode(best["buffers"], tensors, memo),
        )

    # -- writing --

    def save(self, progress: Mapping[str, Any], best: Snapshot | None) -> None:
        """Commit the progress, and the best state unless it is None (unchanged).

        Raises:
            CheckpointError: writing failed; the checkpoint from before is intact.
            TypeError, ValueError: ``Encoder.encode`` cannot encode a state.
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
            raise CheckpointError(getattr(error, "strerror", None) or str(error)) from error

    def _commit(
        self, progress: Mapping[str, Any], entry: dict[str, Any] | None, tensors: Any
    ) -> None:
        """Write the files and rename them into place."""
        self.path.mkdir(parents=True, exist_ok=True)
        created: Path | None = None
        try:
            with self._temporary_folder() as work:
                if tensors is not None:
                    assert entry is not None
                    created = self._write_tensors(work / "best", tensors, entry)
                    self._flush_folder()
                content = {"format": FORMAT, "version": VERSION}
                content |= {"progress": dict(progress), "best": entry}
                content["sha256"] = _hash_of(content)
                with (work / COMMIT).open("xb") as file:
                    file.write((json.dumps(content, allow_nan=False, indent=1) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(work / COMMIT, self.path / COMMIT)
                self._best, self._fresh, created = entry, False, None
                self._flush_folder()
        finally:
            # If the same epoch is saved again, the committed file may have the same name.
            if created is not None and created.name != (self._best or {}).get("file"):
                created.unlink(missing_ok=True)
        self._remove_old(None if entry is None else entry["file"])

    def _write_tensors(self, temporary: Path, tensors: Any, entry: dict[str, Any]) -> Path:
        """Write the tensors file under its final name, and note name and SHA-256 in ``entry``."""
        from safetensors.torch import save_file

        save_file(tensors, temporary, {"format": "pt"})
        # safetensors makes a file that only its owner can read; our folder's mode shows the umask.
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)
        with temporary.open("r+b") as file:
            digest = _hash_file(file)
            os.fsync(file.fileno())
        path = self.path / f"best-{entry['epoch']:06d}-{digest[:12]}.safetensors"
        entry.update(file=path.name, sha256=digest)
        os.replace(temporary, path)
        return path

    @contextlib.contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        """Create a folder in this one, thus on the same disk, and remove it afterwards.

        Not only a file, as safetensors writes a temporary file beside the one it is given: in a
        folder, all that a killed process leaves behind can be recognized.
        """
        work = self.path / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}.tmp"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _flush_folder(self) -> None:
        """Flush the folder to the disk, which makes renames permanent (on Windows they are)."""
        if os.name == "nt":
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _remove_old(self, keep: str | None) -> None:
        """Remove older tensors files, and what a killed process left; ignore failures."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path.match(f"{_TEMPORARY}*.tmp"):
                    shutil.rmtree(path, ignore_errors=True)
                elif path.match("best-*.safetensors") and path.name != keep:
                    path.unlink(missing_ok=True)


def _hash_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a checkpoint's content without the hash itself."""
    hashed = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(file: Any) -> str:
    """Return the SHA-256 of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
