"""Compare the results of `fusereg verify` on two machines: all right, and the same bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read(path: str) -> dict[str, dict[str, Any]]:
    """Return the results of a worker by their name."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {f"{r['kernel']}, {r['dtype']}, {'large' if r['large'] else 'small'}": r for r in lines}


def main(first: str, second: str) -> int:
    """Print what differs; exit code 1 if anything does."""
    wanted, found = read(first), read(second)
    faults = [f"{name}: not run" for name in wanted.keys() - found.keys()]
    for name, result in found.items():
        if not result["ok"]:
            faults.append(f"{name}: {result['message'] or result['error']}")
        elif result["bits"] != wanted[name]["bits"]:
            faults.append(f"{name}: other bits")
    print("\n".join(sorted(faults)))
    print(f"{len(wanted) - len(faults)} of {len(wanted)} calls right, with the same bits")
    return 1 if faults or not wanted else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
