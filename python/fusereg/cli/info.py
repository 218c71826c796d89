"""`fusereg info`: what is installed, what it runs on, and whether every kernel works here."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from fusereg.cli.options import Json
from fusereg.cli.output import write_json

if TYPE_CHECKING:
    from fusereg.cli.checks import CheckResult
    from fusereg.cli.machine import Machine

SCHEMA = 1


def facts(machine: Machine) -> list[tuple[str, str]]:
    """Return the machine as lines (what, value) for people."""
    cpu, cuda = machine.cpu, machine.cuda
    chosen = f"{cpu.isa} (available: {', '.join(cpu.isas_available)}"
    chosen += f"; compiled: {', '.join(cpu.isas_compiled)})" if cpu.isas_compiled else ")"
    if cpu.isa_override:
        chosen += f", set by FUSEREG_CPU_ISA={cpu.isa_override}"
    asks = "asks for them" if cpu.torch_large_pages else "does not ask (THP_MEM_ALLOC_ENABLE=1)"
    pages = f"{cpu.large_pages}; torch {asks}" if cpu.large_pages else "unknown"
    if cuda.built:
        build = f"yes, toolkit {cuda.toolkit or 'unknown'}, architectures {cuda.architectures}"
    else:
        build = "no (CPU only)"
    lines = [(name, version) for name, version in machine.versions.items()]
    lines += [
        ("system", machine.system),
        ("processor", f"{cpu.model} ({cpu.architecture})"),
        ("cores", f"{cpu.usable_cores} usable of {cpu.logical_cores}"),
        ("threads", f"{cpu.torch_threads} (torch.get_num_threads)"),
        ("instruction set", chosen),
        ("large pages", pages),
        ("OpenMP", "\n".join(machine.openmp) or "none seen"),
        ("CUDA kernels", build),
        ("CUDA in torch", cuda.torch_cuda or "no"),
        ("CUDA driver", cuda.driver or "none found"),
    ]
    for index, device in enumerate(cuda.devices):
        details = ", ".join(
            f"{key} {value}" for key, value in device.items() if key not in ("index", "name")
        )
        lines.append((f"device {index}", f"{device.get('name', 'unknown')}: {details}"))
    if not cuda.devices:
        reason = f" ({cuda.error})" if cuda.built and cuda.error else ""
        lines.append(("devices", f"no CUDA device{reason}"))
    return lines


def kernel_rows(results: list[CheckResult]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the kernels' table: a row per kernel, a column per backend."""
    backends = list(dict.fromkeys(result.backend for result in results))
    rows: dict[str, list[str]] = {}
    for result in results:
        row = rows.setdefault(result.kernel, [result.kernel, result.formula])
        error = "-" if result.error is None else f"{result.error:.0e}"
        row.append(f"{'ok' if result.ok else 'FAILED'} {error}")
    return ["kernel", "computes", *backends], list(rows.values())


def _print_tables(machine: Machine, results: list[CheckResult]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    about = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, value in facts(machine):
        about.add_row(name, Text(value))
    console.print(about)
    console.print()
    header, rows = kernel_rows(results)
    table = Table(box=box.SIMPLE_HEAD, title="Kernels, float32 against torch in float64")
    table.title_justify = "left"
    for title in header:
        table.add_column(title, no_wrap=title != "computes")
    for row in rows:
        cells = [Text(cell) for cell in row]
        for cell in cells[2:]:
            cell.stylize("green" if cell.plain.startswith("ok") else "bold red")
        table.add_row(*cells)
    console.print(table)


def run(json: Json = None) -> int:
    """Show versions and devices, and call every kernel.

    Tells which instruction set the kernels use (FUSEREG_CPU_ISA overrides it), the CUDA build and
    devices and the OpenMP runtimes loaded, and calls every kernel on every backend of this machine,
    each result compared with torch in float64. Exit code 1 if a kernel fails.
    """
    from fusereg.cli.checks import run_checks
    from fusereg.cli.machine import read_machine

    # The kernels run first: only then are all the libraries loaded that a program would load.
    results = run_checks()
    machine = read_machine()
    failed = [result for result in results if not result.ok]
    if json:
        content = {
            "schema": SCHEMA,
            "ok": not failed,
            **asdict(machine),
            "kernels": [asdict(result) for result in results],
        }
        write_json(json, content)
    if json == "-":
        return 1 if failed else 0
    _print_tables(machine, results)
    print(
        f"{len(results) - len(failed)} of {len(results)} kernel calls ok "
        "(in float32; `fusereg verify` goes through every dtype, and larger tensors)"
    )
    sys.stdout.flush()
    for warning in machine.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for result in failed:
        reason = result.message or f"relative error {result.error:.1e}"
        print(f"failed: {result.kernel} on {result.backend}: {reason}", file=sys.stderr)
    return 1 if failed else 0
