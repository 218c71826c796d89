"""Checkpoint files of a run: a new folder for each, and the commit that names those in use.

``run.json`` names the last checkpoint and the best ones, each a folder with the files of all ranks
and their SHA-256; see :mod:`fusereg.core.files` for how they stay whole.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.encoding import Encoder, decode
from ..core.files import CheckpointError, Folder, hash_file, open_regular

OP = "fusereg.TrainingRun"
_DATA = r"step-\d{9,}-[0-9a-f]{8}"
_FILE = re.compile(r"(shared|rank-\d+)\.(json|safetensors)|sharded/(\.metadata|__\d+_\d+\.distcp)")


class RunFolder(Folder):
    """The folder of a run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(OP, path, "run.json", "fusereg training run", 1, _DATA)

    def entries(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Return the entries of the last checkpoint and of the best ones, the best first.

        Raises:
            CheckpointError: the commit is damaged.
        """

        def read(content: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            last, best = content["last"], content["best"]
            for entry in (last, *best):
                self._check(entry)
            return last, best

        return self.load(read)

    def _check(self, entry: Any) -> None:
        """Raise unless this is an entry of a checkpoint."""
        self.path_of(entry["name"])
        for key in ("step", "epoch", "batch", "ranks"):
            if type(entry[key]) is not int or entry[key] < 0:
                raise TypeError(f"{key} is {entry[key]!r}")
        if type(entry["metric"]) not in (float, int, type(None)):
            raise TypeError(f"metric is {entry['metric']!r}")
        for name, file in entry["files"].items():
            if not _FILE.fullmatch(name):
                raise ValueError(f"a file named {name[:80]!r}")
            if type(file["sha256"]) is not str or type(file["bytes"]) is not int:
                raise TypeError(f"{name} has no SHA-256 and size")

    def write_states(self, place: Path, stem: str, tree: Any) -> list[Path]:
        """Write a tree of states to two files, of structure and of tensors; return their paths."""
        encoder = Encoder(OP)
        encoded = encoder.encode(tree, stem)
        paths = [place / f"{stem}.json", place / f"{stem}.safetensors"]
        with paths[0].open("xb") as file:
            file.write(json.dumps(encoded, allow_nan=False).encode())
            file.flush()
            os.fsync(file.fileno())
        self.write_tensors(paths[1], encoder.tensors)
        return paths

    def described(self, place: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
        """Return the entries of files, by their names in the checkpoint's folder."""
        found = {}
        for path in paths:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                digest = hash_file(file)
            found[path.relative_to(place).as_posix()] = {"sha256": digest, "bytes": size}
        return found

    def publish(
        self, work: Path, place: Path, last: dict[str, Any], best: Sequence[Mapping[str, Any]]
    ) -> None:
        """Name the written folder, and commit it as the last checkpoint, with the best ones."""
        for path in (*(p for p in place.rglob("*") if p.is_dir()), place):
            self.flush(path)
        last["name"] = f"step-{last['step']:09d}-{secrets.token_hex(4)}"
        os.replace(place, self.path / last["name"])
        self.flush()
        self.commit(work, {"last": last, "best": list(best)})
        self.flush()
        self.remove_others({last["name"], *(entry["name"] for entry in best)})

    def read_states(self, entry: Mapping[str, Any], stem: str) -> Any:
        """Return the tree that ``write_states`` was given.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        place, files = self.path_of(entry["name"]), entry["files"]
        text, data = (f"{stem}.{kind}" for kind in ("json", "safetensors"))
        for name in (text, data):
            if name not in files:
                raise CheckpointError(f"{OP}: checkpoint {place} has no {name}")
        try:
            tensors = self.read_tensors(place / data, files[data])
            return decode(json.loads(self.checked_bytes(place / text, files[text])), tensors)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{OP}: checkpoint {place} is damaged: {type(error).__name__}: {error}"
            ) from error

    def check_files(self, entry: Mapping[str, Any], share: slice) -> None:
        """Check the SHA-256 of a share of the files that torch.distributed.checkpoint reads."""
        place = self.path_of(entry["name"])
        for name in sorted(n for n in entry["files"] if n.startswith("sharded/"))[share]:
            try:
                found = self.described(place, [place / name])[name]
            except OSError as error:
                raise CheckpointError(f"{OP}: cannot read {place / name}: {error}") from error
            if found != entry["files"][name]:
                raise CheckpointError(
                    f"{OP}: {place / name} is damaged: {found}, wanted {entry['files'][name]}"
                )
