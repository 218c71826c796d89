"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fusereg.cli.output import check_writable

Techniques = Annotated[
    list[str] | None,
    Argument(metavar="TECHNIQUE", help="Only these, such as penalty dropout; default: all."),
]
Dtypes = Annotated[str | None, Option(metavar="NAMES", help="Such as float32,bfloat16.")]


def _json_file(target: str | None) -> str | None:
    if target not in (None, "-"):
        check_writable("--json", Path(target))
    return target


Json = Annotated[
    str | None,
    Option(
        callback=_json_file,
        metavar="[FILE]",
        help="Write everything as JSON to FILE; none or -: print it, in place of the tables.",
    ),
]
