"""Print what the package requires, and each of the extras that are named: a line each, for pip."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11; scikit-build-core brings it
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(listed: list[str]) -> Iterator[str]:
    """Yield these requirements; in place of the package's own extras, what they list."""
    for line in listed:
        if own := re.fullmatch(rf"{project['name']}\[(.*)\]", line):
            for extra in own[1].split(","):
                yield from requirements(project["optional-dependencies"][extra])
        else:
            yield line


wanted = [f"{project['name']}[{extra}]" for extra in sys.argv[1:]]
print(*dict.fromkeys(requirements(project["dependencies"] + wanted)), sep="\n")
