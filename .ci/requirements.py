"""Print what the package requires, and each of the extras that are named: a line each, for pip."""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11; scikit-build-core brings it
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str) -> list[str]:
    """Return what an extra lists, with what it includes of the package's other extras."""
    found: list[str] = []
    for line in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
        found += sum(map(requirements, own[1].split(",")), []) if own else [line]
    return found


print(*dict.fromkeys(sum(map(requirements, sys.argv[1:]), project["dependencies"])), sep="\n")
