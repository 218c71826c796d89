"""Write the page of models that are converted and folded in the tests.

    python docs/scripts/zoo.py            # writes docs/zoo.md; some minutes
    python docs/scripts/zoo.py --check    # says whether it is out of date, and fails if so

The models are those of tests/zoo.py, which need the extra "zoo". tests/test_zoo.py shows that their
results stay the same, and that the rows are right.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import fusereg  # noqa: E402
import other_libraries  # noqa: E402, F401  # repairs torchvision
import zoo  # noqa: E402

INTRODUCTION = """\
# Models

{count} models of {libraries} are converted, reverted,
folded and trained for one step in the
test suite (`make test-all`; `pip install ".[zoo]"` in a clone for the libraries). In float64,
the results in training and evaluation, the gradients, and all parameters and buffers after the
step are those of the model as it was; and after `revert`, it is what it was. Many are made smaller
by options.

"layers" says how many layers [`convert`](convert.md) converted, "chains" how many chains it fused,
and "folded" how many batch norms [`fold_into_conv`](batch-norm.md) folded. The last column has what
was left as it is, and the reason that the log gives. `docs/scripts/zoo.py` writes this page.

*{versions}*
"""
HEADER = """\
| model | layers | chains | folded | left as it is, and why |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """Return the page's text."""
    count = len(zoo.ENTRIES)
    names = " and ".join((", ".join(zoo.LIBRARIES[:-1]), zoo.LIBRARIES[-1]))
    parts = [INTRODUCTION.format(count=count, libraries=names, versions=zoo.versions())]
    for library in zoo.LIBRARIES:
        rows = []
        for entry in zoo.ENTRIES:
            if entry.library == library:
                print(entry.id, file=sys.stderr)
                plain = entry.build().eval()
                with zoo.log() as converting:
                    fusereg.convert(copy.deepcopy(plain))
                with zoo.log() as folding:
                    fusereg.fold_into_conv(plain)
                rows.append(zoo.row(entry, zoo.outcome(plain, converting, folding)))
        parts.append(f"## {library}: {len(rows)} models\n\n{HEADER}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = page()
    if zoo.PAGE.is_file() and zoo.PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{zoo.PAGE} is out of date")
    if options.check:
        return 1
    zoo.PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
