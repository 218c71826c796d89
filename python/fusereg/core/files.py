"""Folders of checkpoints: written atomically, locked while in use, and read only if undamaged.

A folder's *commit* is a JSON file that names the data files which belong to it, with their SHA-256.
It is written last, by a rename, after all data have been flushed to the disk (fsync) and renamed to
their final names; what it no longer names is removed afterwards. So a process that dies at any
moment leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

from .lock import Claim, FolderInUse

_CHUNK = 1 << 20
#: A commit holds structure and numbers, no tensors.
_MAX_COMMIT = 1 << 30

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is damaged."""


def require_safetensors(op: str) -> None:
    """Raise ImportError if safetensors, or numpy, which it needs, is not installed."""
    for package in ("safetensors", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{op}: checkpoint files need the package {package}; "
                'do: pip install "fusereg[checkpoints]"'
            )


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; OSError for a link, a pipe or anything else."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    # A pipe must not block, and a link must not lead out of the folder.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(None, "not a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_kinds(content: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Raise KeyError or TypeError unless the content has values of these types by these names."""
    for name, kind in kinds.items():
        value = content[name]
        # A Boolean is an int for isinstance.
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise TypeError(f"{name} is {value!r:.80}")


def hash_file(file: BinaryIO) -> str:
    """Return the SHA-256 of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class Folder:
    """A folder with one commit, which one run at a time writes to and anyone may read.

    Args:
        op: the name that begins error messages.
        path: the folder; ``~`` is the home directory.
        commit: the name of the commit's file.
        form: what it says as its "format".
        version: what it says as its "version".
        data: a regular expression of the names of data files; only these are ever removed.
    """

    def __init__(
        self, op: str, path: str | os.PathLike[str], commit: str, form: str, version: int, data: str
    ) -> None:
        require_safetensors(op)
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{op}: folder must be a path, got {type(path).__name__}")
        self.op = op
        # Absolute, as a script may change its working directory; expanduser leaves unknown ~names.
        self.path = Path(os.path.expanduser(path)).absolute()
        self.commit_path = self.path / commit
        self._form, self._version = form, version
        self._data = re.compile(data)
        self._stem = commit.partition(".")[0]
        self._work = re.compile(rf"\.{self._stem}-\d+-[0-9a-f]{{8}}\.tmp")
        self._claim: Claim | None = None
        #: SHA-256 of the commit's bytes that this object has read or written, or is writing.
        self._known: set[str | None] = set()

    # -- writing --

    def claim(self) -> None:
        """Create and lock the folder, and try to write to it, before any training is spent.

        Raises:
            CheckpointError: it cannot be written to, or another process has locked it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            with self.workplace() as work:
                (work / "trial").write_bytes(b"")
        except OSError as error:
            raise CheckpointError(
                f"{self.op}: cannot write to folder {self.path}: {error.strerror or error}"
            ) from error
        self._known = {self._digest()}

    def _lock(self) -> None:
        if self._claim is None:
            self._claim = Claim(self.path / f".{self._stem}.lock")
        try:
            self._claim.hold()
        except FolderInUse as error:
            raise CheckpointError(f"{self.op}: folder {self.path} {error}") from error

    def release(self) -> None:
        """Give the folder back, for whoever had it before."""
        if self._claim is not None:
            self._claim.release()

    def _digest(self) -> str | None:
        """Return the SHA-256 of the commit's bytes; None if there is no commit, "" for no file."""
        try:
            data = self._bytes()
        except CheckpointError:
            return ""
        return None if data is None else hashlib.sha256(data).hexdigest()

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Create a folder in this one, thus on the same disk, and remove it afterwards.

        Not only a file, as safetensors writes a temporary file beside the one it is given: in a
        folder, all that a killed process leaves behind can be recognized.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        work = self.path / f".{self._stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def commit(self, work: Path, content: Mapping[str, Any]) -> None:
        """Write the content, with format, version and SHA-256, and rename it into place.

        Raises:
            CheckpointError: someone else has written a commit meanwhile.
        """
        whole = {"format": self._form, "version": self._version, **content}
        whole["sha256"] = _hash_of(whole)
        data = (json.dumps(whole, allow_nan=False, indent=1) + "\n").encode()
        path = work / self.commit_path.name
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        found = self._digest()
        if found is not None and self._known and found not in self._known:
            raise CheckpointError(
                f"{self.commit_path.name} was written by another run meanwhile; each run needs a "
                "folder of its own"
            )
        mine = hashlib.sha256(data).hexdigest()
        self._known.add(mine)
        os.replace(path, self.commit_path)
        self._known = {mine}

    def flush(self, path: Path | None = None) -> None:
        """Flush a folder to the disk, which makes renames permanent (on Windows they are)."""
        if os.name == "nt":
            return
        handle = os.open(path or self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove_others(self, keep: Collection[str]) -> None:
        """Remove data that are not named here, and what a killed process left; ignore failures."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if self._work.fullmatch(path.name) or (
                    self._data.fullmatch(path.name) and path.name not in keep
                ):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)

    # -- reading --

    def _bytes(self) -> bytes | None:
        """Return the commit's bytes; None if there is none."""
        try:
            with open_regular(self.commit_path) as file:
                data = file.read(_MAX_COMMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, MemoryError) as error:
            raise CheckpointError(
                f"{self.op}: cannot read {self.commit_path}: {_strerror(error)}"
            ) from error
        if len(data) > _MAX_COMMIT:
            raise CheckpointError(f"{self.op}: {self.commit_path} is of an absurd size")
        return data

    def read(self) -> dict[str, Any] | None:
        """Return the commit's content; None if there is no commit.

        Raises:
            CheckpointError: the file is damaged, or of another format or version.
        """
        data = self._bytes()
        if data is None:
            return None
        try:
            content = json.loads(data.decode("utf-8"))
            found, version = content["format"], content["version"]
            fits = content.get("sha256") == _hash_of(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.op}: {self.commit_path} is not a complete checkpoint: {error!r}"
            ) from error
        if found != self._form or version != self._version:
            raise CheckpointError(
                f"{self.op}: {self.commit_path} is of format {found!r}, version {version}; "
                f"this fusereg reads {self._form!r}, version {self._version}"
            )
        if not fits:
            raise CheckpointError(
                f"{self.op}: {self.commit_path} is damaged: its SHA-256 does not match"
            )
        assert isinstance(content, dict)
        return content

    def load(self, read: Callable[[dict[str, Any]], T | None]) -> T | None:
        """Return what ``read`` makes of the commit's content, and of the files that it names.

        A writer may replace both at any time: if a file is gone and the commit is another one by
        now, that one is read. Whatever ``read`` raises is a CheckpointError.
        """
        while True:
            content = self.read()
            if content is None:
                return None
            try:
                return read(content)
            except Exception as error:
                again: Any = None
                with contextlib.suppress(CheckpointError):
                    again = self.read()
                if again is not None and again["sha256"] != content["sha256"]:
                    continue
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"{self.op}: {self.commit_path} is damaged: {type(error).__name__}: {error}"
                ) from error

    def path_of(self, name: Any) -> Path:
        """Return the path of the data that the commit names, if that is a name for such data."""
        if not isinstance(name, str) or not self._data.fullmatch(name):
            raise CheckpointError(
                f"{self.op}: {self.commit_path} is damaged: it names {str(name)[:80]!r}, which is "
                "no file of such a folder"
            )
        return self.path / name

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write a safetensors file and flush it; return its SHA-256 and size."""
        from safetensors.torch import save_file

        save_file(dict(tensors), path, {"format": "pt"})
        # safetensors makes a file that only its owner can read; our folder's mode shows the umask.
        path.chmod(path.parent.stat().st_mode & 0o666)
        with path.open("r+b") as file:
            digest = hash_file(file)
            size = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        return {"sha256": digest, "bytes": size}

    def checked_bytes(self, path: Path, entry: Mapping[str, Any]) -> bytes:
        """Return a file's bytes, which have the SHA-256 (and size) of the commit's entry."""
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if entry.get("bytes", size) != size:
                    raise CheckpointError(
                        f"{self.op}: {path} is damaged: it has {size} bytes, "
                        f"wanted {entry['bytes']}"
                    )
                data = file.read()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.op}: {self.commit_path} names {path.name}, which is missing"
            ) from error
        except (OSError, MemoryError) as error:
            raise CheckpointError(f"{self.op}: cannot read {path}: {_strerror(error)}") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["sha256"]:
            raise CheckpointError(
                f"{self.op}: {path} is damaged: SHA-256 {digest}, wanted {entry['sha256']}"
            )
        return data

    def read_tensors(self, path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """Read a safetensors file of this entry: what is parsed are the bytes that were hashed."""
        from safetensors.torch import load

        data = self.checked_bytes(path, entry)
        try:
            found: dict[str, Tensor] = load(data)
        except Exception as error:  # also KeyError for a dtype, OverflowError, MemoryError
            raise CheckpointError(f"{self.op}: {path} cannot be read: {error!r}") from error
        return found


def _strerror(error: BaseException) -> str:
    return getattr(error, "strerror", None) or repr(error)


def _hash_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a commit's content without the hash itself."""
    hashed = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
