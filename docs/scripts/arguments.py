"""Write the tables of arguments into the pages, from signatures and docstrings.

A table stands between ``<!-- arguments: fusereg.WeightPenalty -->`` and ``<!-- end arguments -->``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import fusereg

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- arguments: ([\w.]+) -->\n).*?(<!-- end arguments -->)", re.S)
#: In an "Args:" section: an argument, or several that share a text.
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.M)


def described(function: Any) -> dict[str, str]:
    """Return the text of each entry of the docstring's arguments, as Markdown."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.getdoc(function) or "", re.M)
    assert section is not None, function
    _, *parts = ENTRY.split(section[1])
    return {names: as_cell(text) for names, text in zip(parts[::2], parts[1::2], strict=True)}


def as_cell(text: str) -> str:
    """Return a docstring's text as one line of Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


def table(name: str) -> str:
    """Return the table of a function's or class's arguments."""
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(function).parameters
    texts = described(function)
    documented = [n for names in texts for n in names.split(", ")]
    assert documented == list(parameters), set(documented) ^ set(parameters)
    rows = ["| argument | default | meaning |", "| --- | --- | --- |"]
    for names, text in texts.items():
        found = [parameters[n] for n in names.split(", ")]
        shown = ", ".join(f"`{'**' if p.kind is p.VAR_KEYWORD else ''}{p.name}`" for p in found)
        given = [p.default for p in found if p.default is not p.empty]
        default = ", ".join(dict.fromkeys(f"`{round_(v)!r}`" for v in given)) or "–"
        rows.append(f"| {shown} | {default} | {text} |")
    return "\n".join(rows)


def round_(value: Any) -> Any:
    """Return numbers as a reader writes them: 1.3333, not 1.3333333333333333."""
    if isinstance(value, tuple):
        return tuple(round_(v) for v in value)
    return round(value, 4) if isinstance(value, float) else value


def renewed(text: str) -> str:
    """Return a page with its tables made anew."""
    return PLACE.sub(lambda m: f"{m[1]}\n{table(m[2])}\n\n{m[3]}", text)


def out_of_date() -> list[Path]:
    """Return the pages whose tables are not those of the package."""
    return [
        p
        for p in sorted(DOCS.glob("*.md"))
        if renewed(p.read_text("utf-8")) != p.read_text("utf-8")
    ]


if __name__ == "__main__":
    print(f"arguments as in fusereg {fusereg.__version__}")
    for page in out_of_date():
        page.write_text(renewed(page.read_text("utf-8")), encoding="utf-8")
        print(page.name)
