"""JSON and other files that commands write."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from fusereg.cli.errors import InputError


def check_writable(option: str, target: Path) -> None:
    """Make the folder of a file that is to be written at the end; raise InputError if it cannot."""
    folder = target.absolute().parent
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{option} {target}: cannot be written")


def write_json(target: str, content: object) -> None:
    """Write the content as JSON to a file, or to standard output if the target is `-`."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_atomically(Path(target), text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the whole new one, never a part.

    Raises:
        OSError: it cannot be written; names the file that was asked for.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
