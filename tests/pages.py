"""The Python examples of README.md and docs/, and each run as if pasted into a new session.

    python tests/pages.py

runs them with the packages of this interpreter, each in a process and an empty folder of its own.
What an example says it needs and is not installed is left out, and so is what wants several ranks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
#: Comments in front of an example.
NEEDS = re.compile(r"<!-- needs: ([\w., ]+) -->")
RANKS = "<!-- ranks: 2 -->"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^ *```", re.M | re.S
)


def examples(page: Path) -> list[tuple[int, str, str]]:
    """(line, code, what stands before it) of the page's Python examples."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == "python":
            line = text.count("\n", 0, match.start()) + 1
            before = text[: match.start()].rstrip().rpartition("\n")[2]
            found.append((line, match["body"], before))
    return found


def lacking(before: str) -> list[str]:
    """What an example needs, by the line in front of it, and is not installed."""
    needed = NEEDS.fullmatch(before.strip())
    names = re.split(r"[, ]+", needed[1]) if needed else []
    return [name for name in names if importlib.util.find_spec(name) is None]


def paste(page: Path, line: int, code: str) -> None:
    """Run an example as the main module, with the line numbers of the page in tracebacks."""
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})


def _apart(page: Path, line: int, code: str) -> bool:
    """Run an example in a child process; whether it came to its end."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                paste(page, line, code)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        done = os.waitpid(child, 0)[1] == 0
        if not done:
            output.seek(0)
            print(output.read().decode(errors="replace"))
        return done


def main() -> int:
    """Run all examples; return 1 if one fails."""
    import torch  # noqa: F401  # once for all children

    import fusereg

    passed, failed, left_out = 0, [], []
    for page in PAGES:
        for line, code, before in examples(page):
            name = f"{page.name}:{line}"
            missing = ["several ranks"] if before.strip() == RANKS else lacking(before)
            if missing:
                left_out.append(f"{name} ({', '.join(missing)})")
            elif _apart(page, line, code):
                passed += 1
            else:
                failed.append(name)
    print(f"{Path(fusereg.__file__).parent}: {passed} examples passed, {len(failed)} failed")
    print("failed:", *failed)
    print("left out, for lack of what they need:", *left_out)
    return bool(failed) or not passed


if __name__ == "__main__":
    sys.exit(main())
