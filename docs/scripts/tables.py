"""Write the measured tables into the Markdown files, from the JSON files in bench/results/.

    python docs/scripts/tables.py            # rewrites tables that are out of date
    python docs/scripts/tables.py --check    # names them, and fails if there are any

A table is between two comments, the first of which says what is in it:

    <!-- measured: suite=dropout op=dropout mode=forward,forward+backward -->
    <!-- end measured -->

`suite` is required; `op`, `mode`, `shape`, `dtype` and `provider` select by comma-separated names,
and `host` selects the rows of tiny tensors. `view=ranges` gives one row for each layout and data
type, with the least and the greatest ratio to eager over all shapes; `view=runs` gives the ratio in
each stored run, those in bench/results/again included, which no other table counts; `view=training`
is for training, with memory and accuracy of both; `suite=all view=predicted` has the cases of
bench/gpu_cases.json, with what was predicted for them, by the model of bench/results/device_code
and by hand, and what was measured on each GPU. If several files have a case, the latest counts. A
suite without results gets a line that says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
AGAIN = RESULTS / "again"
PREDICTED = ROOT / "bench" / "gpu_cases.json"
DEVICE_CODE = ROOT / "bench" / "results" / "device_code" / "sm90-nvcc13.0-after.json"

FILTERS = ("op", "mode", "shape", "dtype", "provider")
OPTIONS = {*FILTERS, "suite", "view", "host"}
COPY = "copy"
EAGER = "eager"
OURS = "fusereg"
#: Earlier names of suites, which stored results and pages may have.
RENAMED = {"optimizer": "optim"}

_BLOCK = re.compile(
    r"(<!-- measured: (?P<request>[^\n]*?) -->\n).*?(<!-- end measured -->)", re.DOTALL
)

Row = dict[str, Any]


def files(root: Path = ROOT) -> list[Path]:
    """Return the Markdown files that may have tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def documents(folder: Path) -> list[dict[str, Any]]:
    """Return the stored runs of a folder, the earliest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("tool") == "fusereg bench":
            found.append(data)
    return sorted(found, key=lambda d: d["machine"]["date"])


def entries(document: dict[str, Any]) -> list[Row]:
    """Return the rows of a run, each with its machine, by the suites' names of today."""
    return [
        {
            **row,
            "suite": RENAMED.get(row["suite"], row["suite"]),
            "machine": document["machine"],
            "interrupted": document["interrupted"],
        }
        for row in document["rows"]
    ]


def load(folder: Path = RESULTS) -> list[Row]:
    """Return the latest rows of each case, each with its machine."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for document in documents(folder):
        found: dict[tuple[Any, ...], list[Row]] = {}
        for entry in entries(document):
            found.setdefault(_case(entry), []).append(entry)
        cases.update(found)
    return [row for rows in cases.values() for row in rows]


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("suite", "op", "mode", "shape", "dtype", "device", "host"))


def hardware_text(machine: dict[str, Any], device: str) -> str:
    """Return the device on which a row was measured."""
    if device != "cpu" and machine.get("gpu"):
        gpu = machine["gpu"]
        return str(gpu.get("name", gpu) if isinstance(gpu, dict) else gpu)
    isa = {"avx512": "AVX-512", "avx2": "AVX2"}.get(machine["isa"], machine["isa"])
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['cpu']}, {threads}, {isa}"


# --- figures --------------------------------------------------------------------------------------


def time_text(microseconds: float | None) -> str:
    """Return three significant digits with a unit."""
    if microseconds is None:
        return "–"
    for limit, factor, unit in ((999.5, 1.0, "µs"), (999.5e3, 1e-3, "ms")):
        if microseconds < limit:
            return f"{_digits(microseconds * factor)} {unit}"
    return f"{_digits(microseconds * 1e-6)} s"


def _digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def ratio_text(value: float | None) -> str:
    """Return a ratio to eager; losses are marked."""
    if value is None:
        return "–"
    text = f"{_digits(value) if value < 9.995 else f'{value:.0f}'}x"
    return f"**{text}, slower**" if value < 0.995 else text


# --- tables ---------------------------------------------------------------------------------------


def table(request: str, rows: Sequence[Row]) -> str:
    """Return the Markdown that a comment asks for.

    Raises:
        ValueError: If the comment names something that does not exist.
    """
    options = _options(request)
    if options.get("view") == "predicted":
        return "\n" + "\n".join(_predicted(rows)) + "\n\n"
    suite = RENAMED.get(options["suite"], options["suite"])
    if options.get("view") == "runs":
        return "\n" + "\n".join(_runs(suite)) + "\n\n"
    if all(row["suite"] != suite for row in rows):
        return f"\n*No results are stored yet; `fusereg bench {suite}` measures it.*\n\n"
    kept = [
        row
        for row in rows
        if row["suite"] == suite
        and bool(row["host"]) == ("host" in options)
        and all(str(row[k]) in options[k].split(",") for k in FILTERS if k in options)
    ]
    if not kept:
        raise ValueError(f"no measured row fits: {request}")
    make = {"ranges": _ranges, "training": _training}.get(options.get("view", ""), _cases)
    parts = []
    for hardware in dict.fromkeys(hardware_text(r["machine"], r["device"]) for r in kept):
        own = [r for r in kept if hardware_text(r["machine"], r["device"]) == hardware]
        parts.append("\n".join(make(own)) + f"\n\n{_origin(hardware, own)}\n")
    return "\n" + "\n".join(parts) + "\n"


def _options(request: str) -> dict[str, str]:
    options = {}
    for word in shlex.split(request):
        name, _, value = word.partition("=")
        options[name] = value
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}: {request}")
    if "suite" not in options:
        raise ValueError(f"no suite is named: {request}")
    return options


def _cases(rows: Sequence[Row]) -> list[str]:
    """Return a line for each case: the median time of each provider, and fusereg's ratio."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["provider"]] = row
    providers = [p for p in dict.fromkeys(r["provider"] for r in rows) if p not in (COPY, OURS)]
    providers.sort(key=lambda p: p != EAGER)
    several = len({case[1] for case in cases}) > 1
    with_copy = any(COPY in of_case for of_case in cases.values())
    head = [*(["operation"] if several else []), "size", "data type", "what", *providers, OURS]
    head += ["vs eager", *(["of a copy"] if with_copy else [])]
    lines = [
        _line(head),
        _line(
            ["---"] * (len(head) - len(providers) - 2 - with_copy)
            + ["---:"] * (len(providers) + 2 + with_copy)
        ),
    ]
    for case, of_case in cases.items():
        ours = of_case.get(OURS)
        if ours is None:
            continue
        _, op, mode, shape, dtype, _, _ = case
        cells = [*([op] if several else []), shape.removeprefix("host "), dtype, mode]
        cells += [_cell(of_case.get(p)) for p in providers]
        cells += [_cell(ours), ratio_text(ours["vs_eager"])]
        if with_copy:
            percent = ours["percent_of_copy"]
            cells.append("–" if percent is None else f"{percent:.0f} %")
        lines.append(_line(cells))
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return "failed" if row["failed"] else time_text(row["p50_us"])


def _ranges(rows: Sequence[Row]) -> list[str]:
    """Return a line for each layout and data type: the range of the ratios to eager."""
    ours = [r for r in rows if r["provider"] == OURS and r["vs_eager"] is not None]
    columns = list(dict.fromkeys((r["op"], r["mode"]) for r in ours))
    lines_of = list(dict.fromkeys((_layout(r["shape"]), r["dtype"]) for r in ours))
    head = ["layout, data type", *(f"{op}, {mode}" for op, mode in columns)]
    lines = [_line(head), _line(["---"] + ["---:"] * len(columns))]
    for layout, dtype in lines_of:
        cells = [f"{layout} {dtype}".strip()]
        for op, mode in columns:
            found = [
                r["vs_eager"]
                for r in ours
                if (r["op"], r["mode"]) == (op, mode)
                and (_layout(r["shape"]), r["dtype"]) == (layout, dtype)
            ]
            cells.append(f"{_digits(min(found))} to {_digits(max(found))}" if found else "–")
        lines.append(_line(cells))
    return lines


def _runs(suite: str) -> list[str]:
    """Return a line for each case: fusereg's ratio to eager in each stored run of the suite."""
    runs = sorted(documents(RESULTS) + documents(AGAIN), key=lambda d: d["machine"]["date"])
    ratios: dict[tuple[str, ...], dict[str, str]] = {}
    for run in runs:
        for row in entries(run):
            if row["suite"] == suite and row["provider"] == OURS:
                of_case = ratios.setdefault((row["shape"], row["dtype"], row["mode"]), {})
                of_case[run["machine"]["date"][:16]] = ratio_text(row["vs_eager"])
    dates = sorted({date for of_case in ratios.values() for date in of_case})
    head = ["size", "data type", "what", *(date.replace("T", " ") for date in dates)]
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * len(dates))]
    lines += [_line([*case, *(own.get(d, "–") for d in dates)]) for case, own in ratios.items()]
    return lines


def _training(rows: Sequence[Row]) -> list[str]:
    """Return a line for each case: a step's time, the peak of memory, and the final accuracy."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["provider"]] = row
    rivals = [p for p in dict.fromkeys(r["provider"] for r in rows) if p != OURS]
    rivals.sort(key=lambda p: p != EAGER)
    head = ["network, batch", "data type", *rivals, OURS, "vs eager"]
    head += [f"{what}, {p}" for what in ("memory", "accuracy") for p in (EAGER, OURS)]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for case, of_case in cases.items():
        ours, eager = of_case.get(OURS), of_case.get(EAGER)
        if ours is None or eager is None:
            continue
        cells = [case[3], case[4], *(_cell(of_case.get(p)) for p in rivals), _cell(ours)]
        cells.append(ratio_text(ours["vs_eager"]))
        for key, factor, unit in (("peak_bytes", 1e-6, "MB"), ("test_accuracy", 100.0, "%")):
            for row in (eager, ours):
                value = row.get(key)
                cells.append("–" if value is None else f"{factor * value:.1f} {unit}")
        lines.append(_line(cells))
    return lines


def _predicted(rows: Sequence[Row]) -> list[str]:
    """Return a line for each case: the shares of a copy that were predicted, and those measured."""
    measured: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["device"] == "cuda" and row["provider"] == OURS:
            name = "/".join(row[k] for k in ("suite", *FILTERS[:4])).replace(" ", "-").lower()
            measured.setdefault(hardware_text(row["machine"], "cuda"), {})[name] = row[
                "percent_of_copy"
            ]
    names = sorted(measured)
    head = ["case", "model, H100", "by hand, H100", "by hand, H200", "limited by"]
    head += [f"measured, {name}" for name in names] or ["measured"]
    lines = [
        _line(head),
        _line(["---", "---:", "---:", "---:", "---", *["---:"] * (len(head) - 5)]),
    ]
    compiled = json.loads(DEVICE_CODE.read_text(encoding="utf-8"))["rows"]
    for entry in json.loads(PREDICTED.read_text(encoding="utf-8"))["rows"]:
        ranges = (entry[gpu] for gpu in ("H100", "H200"))
        shares = [r["share"] for r in compiled if re.search(entry["kernels"], r["kernel"])]
        cells = [entry["case"], f"{min(shares):.0f} %"]
        cells += [f"{' to '.join(map(str, share))} %" if share else "–" for share in ranges]
        found = [measured[name].get(entry["case"]) for name in names] or [None]
        cells += [entry["bound"], *("–" if v is None else f"{v:.0f} %" for v in found)]
        lines.append(_line(cells))
    return lines


def _layout(shape: str) -> str:
    if shape.endswith("NHWC"):
        return "channels_last"
    return "NCHW" if shape.count("x") == 3 else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(hardware: str, rows: Sequence[Row]) -> str:
    """Return where and when this was measured, and what disturbed it."""
    machines = {json.dumps(r["machine"], sort_keys=True): r["machine"] for r in rows}.values()
    torches = ", ".join(sorted({m["torch"] for m in machines}))
    dates = ", ".join(sorted({m["date"][:10] for m in machines}))
    noise = max(m["others_cpu_share"] or 0.0 for m in machines)
    text = f"{hardware}; torch {torches}; {dates}. Medians of interleaved rounds"
    if noise > 0.03:
        text += f"; other programs took up to {noise:.0%} of the machine meanwhile"
    if any(r["interrupted"] for r in rows):
        text += "; the run was ended before its last cases"
    return f"*{text}.*"


# --- files ----------------------------------------------------------------------------------------


def renewed(text: str, rows: Sequence[Row]) -> str:
    """Return the text with its tables made anew."""
    return _BLOCK.sub(lambda m: m[1] + table(m["request"], rows) + m[3], text)


def out_of_date(root: Path = ROOT) -> dict[Path, str]:
    """Return the files whose tables differ from the results, with the right text."""
    rows = load(root / "bench" / "results")
    found = {}
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        if (new := renewed(text, rows)) != text:
            found[path] = new
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    check = parser.parse_args(argv).check
    found = out_of_date()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {'is out of date' if check else 'renewed'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
