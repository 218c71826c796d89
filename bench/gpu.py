"""Cases, times and counters of the profiler for bench/gpu.sh, and its table.

    python bench/gpu.py versions DEVICE              what is installed; fails without that device
    python bench/gpu.py times DEVICE compile|no-compile FILE.json
    python bench/gpu.py once DEVICE                  one call of each case in COUNTED, for ncu
    python bench/gpu.py metrics                      the metrics that ncu is asked for
    python bench/gpu.py table LOGS --json FILE --markdown FILE

Wants an installed fusereg with its ``fusereg.bench``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "bench" / "gpu_cases.json"
DTYPES = (torch.float32, torch.bfloat16)

#: Metrics of ncu by the name that they have in the table.
METRICS = {
    "us": "gpu__time_duration.sum",
    "read MB": "dram__bytes_read.sum",
    "written MB": "dram__bytes_write.sum",
    "sectors a load": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "sectors a store": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    **{
        f"stall {name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
        for name in (
            "long_scoreboard", "short_scoreboard", "math_pipe_throttle", "lg_throttle", "barrier",
            "wait", "no_instruction", "membar",
        )
    },
}  # fmt: skip


def predictions() -> list[dict[str, Any]]:
    """Return the cases, in order, with the share of a copy that the model predicts for each."""
    content = json.loads(PREDICTED.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def chosen_ids(key: str = "case") -> list[str]:
    """Return the names of the cases; with a key, of those that have it set."""
    return [row["case"] for row in predictions() if row.get(key)]


def cases(device: torch.device, ids: Sequence[str]) -> list[Any]:
    """Return these cases of the benchmarks, in this order.

    Raises:
        ValueError: If there is none of a name.
    """
    from fusereg.bench import collect_cases
    from fusereg.bench.harness import Options

    suites = dict.fromkeys(name.partition("/")[0] for name in ids)
    found = {
        case.id: case for suite in suites for case in collect_cases(suite, Options(device, DTYPES))
    }
    if missing := [name for name in ids if name not in found]:
        raise ValueError(f"the benchmarks have no case {', '.join(missing)}")
    return [found[name] for name in ids]


# --- measuring ------------------------------------------------------------------------------------


def versions(device: torch.device) -> int:
    """Print the versions of what is used; return 1 if torch does not see the device."""
    for name in ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "rich",
                 "pybind11", "scikit-build-core", "apache-tvm-ffi", "cmake", "ninja"):  # fmt: skip
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "missing")
    print("python", sys.version.split()[0])
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device")
        return 1
    print(f"torch {torch.__version__},", torch.cuda.get_device_properties(0)
          if device.type == "cuda" else "CPU")  # fmt: skip
    return 0


def times(device: torch.device, compiled: bool, target: Path) -> int:
    """Measure the cases without providers that compile, or the chosen ones with only these."""
    from rich.console import Console

    from fusereg.bench.harness import Case, Settings, Workload, command, machine, report

    def of_kind(case: Case) -> Case:
        def setup() -> Workload:
            work = case.setup()
            kept = [p for p in work.providers if compiled or not p.compiles]
            return replace(work, providers=kept)

        return replace(case, setup=setup)

    settings = Settings(
        min_time_s=0.05, min_rounds=7, max_rounds=41, min_sample_s=3e-4, max_case_s=3.0,
        compile_limit_s=25.0,
    )  # fmt: skip
    wanted = os.environ.get("CASES", "")
    names = [n for n in chosen_ids("compiled" if compiled else "case") if re.search(wanted, n)]
    facts = machine.describe(device)
    others = machine.OthersMeter()

    def save(rows: list[Any], interrupted: bool) -> None:
        facts["others_cpu_share"] = others.share()
        report.write_json(target, report.document(rows, facts, settings, interrupted))

    rows, interrupted = command.measure(
        [of_kind(case) for case in cases(device, names)],
        settings,
        lambda name: True,
        Console(stderr=True),
        save,
    )
    save(rows, interrupted)
    failed = [row for row in rows if row.provider == "fusereg" and row.failed]
    for row in failed:
        print(f"{row.suite}/{row.op}/{row.mode}/{row.shape}/{row.dtype}: {row.failed}")
    print(f"{len({row.case for row in rows})} of {len(names)} cases measured, {len(failed)} failed")
    return 1 if failed or interrupted else 0


def once(device: torch.device) -> int:
    """Call fusereg's provider of each counted case twice; the profiler looks at the second call."""
    cuda = device.type == "cuda"
    for case in cases(device, chosen_ids("counted")):
        call = next(p for p in case.setup().providers if p.name == "fusereg").make()
        call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            # Of the process, not of this thread: the kernels of backward come from another.
            mark = torch.cuda.nvtx.range_start(case.id)
        call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_end(mark)
            torch.cuda.profiler.stop()
        print(case.id)
    return 0


# --- the table ------------------------------------------------------------------------------------


def counters(lines: Iterable[str], ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the kernels of each case, with METRICS by name, from ncu's CSV of raw values.

    The case is the NVTX range that ncu writes beside each kernel. Lines before the header and the
    line of units are passed over; a metric that this ncu does not have is left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        text = "\n".join(value for value in row.values() if isinstance(value, str))
        # The longest: one name may be the beginning of another.
        names = sorted((name for name in ids if name in text), key=len)
        if not names or not row.get("Kernel Name"):
            continue
        kernel: dict[str, Any] = {"kernel": short_name(row["Kernel Name"])}
        for name, metric in METRICS.items():
            try:
                kernel[name] = float(row[metric].replace(",", ""))
            except (KeyError, ValueError):
                continue
        for name, factor in (("us", 1e-3), ("read MB", 1e-6), ("written MB", 1e-6)):
            if name in kernel:  # of nanoseconds and bytes
                kernel[name] *= factor
        found.setdefault(names[-1], []).append(kernel)
    return found


def short_name(kernel: str) -> str:
    """Return a demangled kernel's name with its template arguments, without namespaces."""
    text = re.sub(r"\(anonymous namespace\)::|<unnamed>::|fusereg::|cuda::", "", kernel)
    text = text.removeprefix("void ")
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:i]
    return text


def merged(logs: Path) -> dict[str, Any]:
    """Return the document of all measured rows, with the counters of the kernels."""
    documents = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (logs / "no-compile.json", logs / "compile.json")
        if path.exists()
    ]
    if not documents:
        raise SystemExit("nothing was measured")
    document: dict[str, Any] = documents[0]
    if len(documents) == 2:
        # The chosen cases were measured again, beside torch.compile: those rows count.
        again = {identity(row) for row in documents[1]["rows"]}
        document["rows"] = [r for r in document["rows"] if identity(r) not in again]
        document["rows"] += documents[1]["rows"]
        document["interrupted"] |= documents[1]["interrupted"]
    path = logs / "counters.csv"
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            document["counters"] = counters(file, chosen_ids("counted"))
    return document


def identity(row: dict[str, Any]) -> str:
    """Return the name of a row's case, as ``fusereg bench --list`` prints it."""
    from fusereg.bench.harness.cases import case_id

    return case_id(*(row[key] for key in ("suite", "op", "mode", "shape", "dtype")))


def lines_of(document: dict[str, Any]) -> Iterator[str]:
    """Return the Markdown: shares of a copy, predicted and measured; then the counters."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        rows.setdefault(identity(row), {})[row["provider"]] = row
    counted = document.get("counters", {})
    gpu = document["machine"].get("gpu") or {}
    yield f"# Predicted and measured: {gpu.get('name', 'CPU')}"
    yield ""
    yield (
        "Shares of a copy of as many bytes, in percent: predicted for an H100 and an H200; "
        "measured by events around each call; from the kernels' times in the profiler alone."
    )
    yield ""
    yield "| case | H100 | H200 | measured | kernels alone | us | vs eager | compile us |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for entry in predictions():
        providers = rows.get(entry["case"], {})
        ours = providers.get("fusereg", {})
        alone = _kernel_share(counted.get(entry["case"]), ours, providers.get("copy", {}))
        cells = [
            _number(ours.get("percent_of_copy"), 0),
            _number(alone, 0),
            _number(ours.get("p50_us"), 1),
            _number(ours.get("vs_eager"), 2),
            _number(providers.get("torch.compile", {}).get("p50_us"), 1),
        ]
        yield _line([entry["case"], _range(entry["H100"]), _range(entry["H200"]), *cells])
    if not counted:
        return
    yield ""
    names = [n for n in METRICS if not n.startswith("stall")]
    yield _line(["case: kernel", *names, "most stalls (warps an issue)"])
    yield _line(["---", *("---:" for _ in names), "---"])
    for case, kernels in counted.items():
        for kernel in kernels:
            stalls = sorted(
                ((v, k.removeprefix("stall ")) for k, v in kernel.items() if k.startswith("stall")),
                reverse=True,
            )
            text = ", ".join(f"{name} {value:.1f}" for value, name in stalls[:3])
            values = [_number(kernel.get(name), 1) for name in names]
            yield _line([f"{case}: `{kernel['kernel'][:90]}`", *values, text])


def _kernel_share(
    kernels: list[dict[str, Any]] | None, ours: dict[str, Any], copy: dict[str, Any]
) -> float | None:
    us = sum(kernel.get("us", 0.0) for kernel in kernels or [])
    speed = copy.get("gb_per_s")
    return 100 * ours["bytes"] / us * 1e-3 / speed if us and speed and ours else None


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _range(value: Sequence[int] | None) -> str:
    return "–" if not value else " to ".join(str(v) for v in dict.fromkeys(value))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the parts; return the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("versions", "once"):
        parts.add_parser(name).add_argument("device", type=torch.device)
    part = parts.add_parser("times")
    part.add_argument("device", type=torch.device)
    part.add_argument("kind", choices=("compile", "no-compile"))
    part.add_argument("file", type=Path)
    parts.add_parser("metrics")
    part = parts.add_parser("table")
    part.add_argument("logs", type=Path)
    part.add_argument("--json", type=Path, required=True)
    part.add_argument("--markdown", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.part == "versions":
        return versions(args.device)
    if args.part == "once":
        return once(args.device)
    if args.part == "times":
        return times(args.device, args.kind == "compile", args.file)
    if args.part == "metrics":
        print(",".join(METRICS.values()))
        return 0
    document = merged(args.logs)
    args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    args.markdown.write_text("\n".join(lines_of(document)) + "\n", encoding="utf-8")
    print(f"{len(document['rows'])} rows, {len(document.get('counters', {}))} cases with counters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
