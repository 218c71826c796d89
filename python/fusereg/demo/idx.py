"""Reads the IDX files in which MNIST and its relatives come, checking every byte count.

An IDX file is: two zero bytes, a type byte (0x08: unsigned byte), the number of dimensions, then
each size as a big-endian 32-bit integer, then the data (LeCun, Cortes, Burges: the MNIST database).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from fusereg.cli.errors import InputError

_TYPES = {
    0x08: "unsigned bytes",
    0x09: "signed bytes",
    0x0B: "16-bit integers",
    0x0C: "32-bit integers",
    0x0D: "float32",
    0x0E: "float64",
}
_PIECE = 1 << 20
MAX_BYTES = 8 << 30  # far above any data set of this kind; a header that asks for more is damaged


def _read_up_to(file: IO[bytes], count: int) -> bytes:
    """At most `count` bytes, in pieces: a damaged header must not make us allocate its claim."""
    pieces: list[bytes] = []
    left = count
    while left > 0:
        piece = file.read(min(left, _PIECE))
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if gzipped else path.open("rb")


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def read_idx(path: Path, dimensions: int, what: str) -> npt.NDArray[np.uint8]:
    """Reads one IDX file of unsigned bytes.

    Args:
        path: the file; gzip is recognised by its content, whatever the name.
        dimensions: how many the file must have (3 for images, 1 for labels).
        what: "images" or "labels", for the error.

    Raises:
        InputError: the file cannot be read or is not what was wanted; names file, found and wanted.
    """
    try:
        with _open(path) as file:
            return _parse(file, path, dimensions, what)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip data ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror or error}") from error


def _parse(file: IO[bytes], path: Path, dimensions: int, what: str) -> npt.NDArray[np.uint8]:
    header = _read_up_to(file, 4 + 4 * dimensions)
    magic = bytes([0, 0, 0x08, dimensions])
    if len(header) < 4 or header[:4] != magic:
        found = header[:4].hex(" ") or "an empty file"
        if len(header) >= 4 and header[:2] == b"\0\0" and header[2] in _TYPES:
            found += f" ({_TYPES[header[2]]}, {_plural(header[3], 'dimension')})"
        raise InputError(
            f"{path}: not an IDX file of {what}: starts with {found}, "
            f"wanted {magic.hex(' ')} (unsigned bytes, {_plural(dimensions, 'dimension')})"
        )
    if len(header) < 4 + 4 * dimensions:
        raise InputError(
            f"{path}: header cut off: found {len(header)} bytes, wanted {4 + 4 * dimensions}"
        )
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    shape = " x ".join(f"{size:,}" for size in sizes)
    count = 1
    for size in sizes:
        count *= size
    if count == 0 or count > MAX_BYTES:
        limit = f"1 to {MAX_BYTES:,} bytes of data"
        raise InputError(f"{path}: header says {shape} ({count:,} bytes), wanted {limit}")
    data = _read_up_to(file, count + 1)
    if len(data) != count:
        found = f"{len(data):,} bytes" if len(data) < count else f"more than {count:,} bytes"
        raise InputError(
            f"{path}: header says {shape}, so {count:,} bytes of {what} are wanted, found {found}"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(sizes)
