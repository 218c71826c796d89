"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

Techniques = Annotated[
    list[str] | None,
    Argument(metavar="TECHNIQUE", help="Only these, such as penalty dropout; default: all."),
]
Dtypes = Annotated[str | None, Option(metavar="NAMES", help="Such as float32,bfloat16.")]
Json = Annotated[
    str | None,
    Option(
        metavar="[FILE]",
        help="Write everything as JSON to FILE; none or -: print it, in place of the tables.",
    ),
]
