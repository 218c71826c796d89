"""A lock on a folder, so that two processes do not write to it, with words about who holds it.

The kernel's lock on a file (flock) is released however the process ends. Where a file system has
none, the owner that the file names decides: it is taken over only if it is known to be dead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
import weakref
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: What says that a file system cannot lock, and not that the file is locked.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_UNSUPPORTED |= {errno.ENOSYS}


class FolderInUse(RuntimeError):
    """Another run writes to the folder; the text says who, and what to do."""


class _Lock:
    """The lock that this process holds on a file, until the last claim is gone."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.claims: list[weakref.ref[Claim]] = []

    def owner(self) -> Claim | None:
        """Return the latest claim that still exists."""
        self.claims = [claim for claim in self.claims if claim() is not None]
        return self.claims[-1]() if self.claims else None

    def guards(self, path: Path) -> bool:
        """Return whether the file of this path is the locked one, neither moved nor removed."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.lstat(path))
        except OSError:
            return False

    def close(self, wipe: bool = True) -> None:
        """Release the lock; with ``wipe``, the file then names no owner."""
        if self.handle >= 0:
            with contextlib.suppress(Exception):  # also at the interpreter's end
                if wipe:
                    os.ftruncate(self.handle, 0)
                os.close(self.handle)
            self.handle = -1

    def __del__(self) -> None:
        self.close()


_HELD: weakref.WeakValueDictionary[str, _Lock] = weakref.WeakValueDictionary()


def _after_fork() -> None:
    """Leave the parent's locks to the parent: a worker that outlives it must not keep them."""
    for lock in list(_HELD.values()):
        lock.close(wipe=False)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Claim:
    """One run's claim to a folder. In a process, the latest claim takes over from those before.

    Args:
        path: the lock's file, which is created and stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: _Lock | None = None

    def hold(self) -> None:
        """Lock the folder, or check that it is still locked by this claim.

        Raises:
            FolderInUse: another process has it, or a later run of this process.
            OSError: the file cannot be made.
        """
        if self._lock is None or self._lock.handle < 0:
            self._lock = self._taken()
            self._lock.claims.append(weakref.ref(self))
        elif self._lock.owner() is not self:
            raise FolderInUse(
                "was taken over by a later run of this process; each run needs a folder of its own"
            )
        elif not self._lock.guards(self._path):
            handle = self._locked()  # another process may hold the file that is there now
            self._lock.close()
            self._lock.handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy locks anew, when it writes: it must not close the file of this one.
        return Claim, (self._path,)

    def release(self) -> None:
        """Give the folder back to the claim before, or unlock it."""
        if self._lock is not None:
            self._lock.claims = [claim for claim in self._lock.claims if claim() is not self]
            self._lock = None

    def _taken(self) -> _Lock:
        """Return this process's lock of the file, a new one if it has none."""
        key = os.path.realpath(self._path)
        lock = _HELD.get(key)
        if lock is not None and lock.handle >= 0:
            return lock
        lock = _HELD[key] = _Lock(self._locked())
        return lock

    def _locked(self) -> int:
        """Open and lock the file, write who this is into it, and return its handle."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self._path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(None, f"{self._path.name} is not a regular file")
            self._exclude(handle)
            text = json.dumps(_owner()).encode()
            with contextlib.suppress(OSError):  # a full disk: the lock holds without words, too
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, text)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _exclude(self, handle: int) -> None:
        """Take the kernel's lock, or judge by the owner that is named in the file."""
        by = _read_owner(handle)
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no flock here")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise FolderInUse(f"is in use by {_words(by)}; {_ADVICE}") from error
            if by and not _is_dead(by):
                raise FolderInUse(
                    f"is in use by {_words(by)}; {_ADVICE} (if that process has ended, remove "
                    f"{self._path})"
                ) from error


_ADVICE = "each run needs a folder of its own"


def _owner() -> dict[str, Any]:
    """Return what identifies this process, also among those of other machines and containers."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    found |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "started": _started(os.getpid())}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
    return found


def _started(pid: int) -> str | None:
    """Return when a process was started, in the kernel's clock; None if it is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read_owner(handle: int) -> dict[str, Any]:
    """Return what the file says of its owner; nothing if it says nothing that can be read."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(by: dict[str, Any]) -> bool:
    """Return whether the owner is known to have ended: only a process of this machine can be."""
    mine = _owner()
    here = all(key in mine and by.get(key) == mine[key] for key in ("host", "boot", "namespace"))
    return here and (by.get("pid") == os.getpid() or _started(by["pid"]) != by.get("started"))


def _words(by: dict[str, Any]) -> str:
    """Name the owner."""
    if "pid" not in by:
        return "another process"
    return f"process {by['pid']} on {by.get('host')} (since {by.get('since')})"
