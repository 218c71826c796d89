"""`fusereg verify`: every kernel on every device, instruction set and dtype, against float64."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fusereg.cli.errors import InputError, choose
from fusereg.cli.options import Dtypes, Json, Techniques
from fusereg.cli.output import write_json
from fusereg.core import screen

if TYPE_CHECKING:
    from fusereg.cli.checks import CheckResult, Place

SCHEMA = 1


def choose_places(devices: str | None, isas: str | None) -> list[Place]:
    """Return the places that were named, or all of this machine."""
    from fusereg import _C
    from fusereg.cli.checks import places

    found = places()
    known = dict.fromkeys(name for p in found for name in (p.device.type, str(p.device)))
    if "cuda" in (devices or "") and "cuda" not in known:
        raise InputError(f"--device {devices}: not here ({_C.cuda_error()}); there are: cpu")
    names = choose(devices, known, "--device: no device")
    sets = choose(isas, _C.cpu_isas(), "--isa: no instruction set here that is")
    return [
        place
        for place in found
        if (str(place.device) in names or place.device.type in names)
        and (place.isa is None or place.isa in sets)
    ]


def compare_bits(results: Sequence[CheckResult]) -> list[CheckResult]:
    """Return the results; those whose bits differ from the first CPU instruction set's fail."""
    first: dict[tuple[str, str, str, bool], CheckResult] = {}
    compared = []
    for result in results:
        if result.device == "cpu" and result.bits is not None:
            key = (result.technique, result.kernel, result.dtype, result.large)
            wanted = first.setdefault(key, result)
            if result.ok and result.bits != wanted.bits:
                message = f"other bits than on {wanted.backend}"
                result = replace(result, ok=False, message=message)
        compared.append(result)
    return compared


def why(result: CheckResult) -> str:
    """Return the reason of a failed result."""
    if result.message is not None:
        return result.message
    return f"relative error {result.error:.1e}, allowed {result.tolerance:.0e}"


def table(results: Sequence[CheckResult]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a technique on a place, and for each dtype its worst kernel.

    The worst is in percent of what is allowed, which depends on the dtype of the result: sums of
    16-bit tensors are float32.
    """
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    cells: dict[tuple[str, str], dict[str, list[CheckResult]]] = {}
    for result in results:
        row = cells.setdefault((result.technique, result.backend), {})
        row.setdefault(result.dtype, []).append(result)
    rows = []
    for (technique, place), row in sorted(cells.items(), key=lambda item: item[0][0]):
        texts = []
        for dtype in dtypes:
            here = row.get(dtype, [])
            failed = sum(not result.ok for result in here)
            worst = max((100 * (r.error or 0.0) / r.tolerance for r in here), default=0.0)
            if failed:
                texts.append(f"FAILED {failed} of {len(here)}")
            else:
                texts.append(f"ok {worst:.0f} %" if here else "-")
        rows.append([technique, place, *texts])
    return ["technique", "on", *dtypes], rows


def _print_table(results: Sequence[CheckResult]) -> None:
    from rich.console import Console
    from rich.text import Text

    from fusereg.cli.checks import TOLERANCES

    allowed = {str(d).removeprefix("torch."): f"{t:.0e}" for d, t in TOLERANCES.items()}
    header, rows = table(results)
    grid = screen.table(
        [f"{name}\n{allowed[name]}" if name in allowed else name for name in header],
        words=len(header),
        wrap=False,
        title="Worst error against torch in float64, in percent of what is allowed",
        title_justify="left",
        pad_edge=True,
    )
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [Text(cell) for cell in row]
        for cell in cells[2:]:
            style = {"ok": "green", "FAILED": "bold red"}.get(cell.plain.split()[0], "dim")
            cell.stylize(style)
        grid.add_row(*cells, end_section=following is None or following[0] != row[0])
    console = Console(highlight=False)
    screen.at_least(console, 100)
    console.print(grid)


def _follow(
    chosen: Sequence[Place],
    calls: int,
    work: Callable[[Place, Callable[[CheckResult], None]], list[CheckResult]],
) -> tuple[list[CheckResult], bool]:
    """Do the work place by place; show a bar on a terminal, a line for each place elsewhere.

    Returns:
        The results, and whether the work was interrupted before it had all of them.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    results: list[CheckResult] = []
    with screen.progress(console) as p:
        bar = p.add_task("", total=calls * len(chosen))
        for place in chosen:
            start = time.perf_counter()
            p.update(bar, description=f"{place.name}: starting")

            here: list[CheckResult] = []

            def on_result(result: CheckResult, here: list[CheckResult] = here) -> None:
                here.append(result)
                p.update(bar, advance=1, description=f"{result.backend}: {result.kernel}")

            interrupted = False
            try:
                work(place, on_result)
            except KeyboardInterrupt:
                interrupted = True
            failed = sum(not result.ok for result in here)
            verdict = f"{failed} of {len(here)} calls FAILED" if failed else f"{len(here)} calls ok"
            verdict += f", then interrupted, of {calls}" if interrupted else ""
            seconds = time.perf_counter() - start
            console.print(f"{place.name}: {verdict}, {seconds:.1f} s", soft_wrap=True)
            results += here
            if interrupted:
                return results, True
    return results, False


def run(
    technique: Techniques = None,
    device: Annotated[
        str | None, Option(metavar="NAMES", help="Such as cpu or cuda:0,cuda:1; default: all.")
    ] = None,
    isa: Annotated[
        str | None, Option(metavar="NAMES", help="CPU instruction sets, such as avx2,avx512.")
    ] = None,
    dtype: Dtypes = None,
    json: Json = None,
) -> int:
    """Compare every kernel with float64, in every dtype.

    Calls every kernel on this machine's CPU, with each instruction set that it runs, and on each
    CUDA device, in float64, float32, float16 and bfloat16, on small and on larger tensors, and
    compares each result with torch in float64. Each call is made twice, the second time with one
    CPU thread: the bits must be the same, and the same on all instruction sets. Takes less than a
    minute. Exit code 1 if anything fails. Interrupted, it reports what it has.
    """
    from fusereg.cli.checks import TECHNIQUES, TOLERANCES
    from fusereg.cli.checks._process import verify_place
    from fusereg.cli.checks._worker import plan
    from fusereg.cli.machine import read_machine

    techniques = choose(technique, TECHNIQUES, "no technique")
    known = {str(each).removeprefix("torch."): each for each in TOLERANCES}
    dtypes = [known[name] for name in choose(dtype, known, "--dtype: no dtype")]
    chosen = choose_places(device, isa)
    start = time.perf_counter()
    results, interrupted = _follow(
        chosen,
        len(plan(techniques, dtypes)),
        lambda place, on_result: verify_place(place, techniques, dtypes, on_result),
    )
    results = compare_bits(results)
    seconds = time.perf_counter() - start
    failed = [result for result in results if not result.ok]
    machine = read_machine()
    if json != "-" and results:
        _print_table(results)
    sys.stdout.flush()
    for result in failed:
        size = "large" if result.large else "small"
        what = f"{result.kernel}, {result.dtype}, {size}, on {result.backend}"
        print(f"failed: {what}: {why(result)}", file=sys.stderr)
    for warning in machine.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if json:
        content = {
            "schema": SCHEMA,
            "ok": not failed and not interrupted,
            "interrupted": interrupted,
            "seconds": round(seconds, 2),
            **asdict(machine),
            "tolerances": {str(d).removeprefix("torch."): t for d, t in TOLERANCES.items()},
            "places": [place.name for place in chosen],
            "results": [asdict(result) for result in results],
        }
        write_json(json, content)
    if json != "-":
        ok = len(results) - len(failed)
        isas = sum(place.isa is not None for place in chosen)
        same = ", the same bits on each instruction set" if isas > 1 and not failed else ""
        print(f"{ok} of {len(results)} calls ok{same}, {seconds:.0f} s")
    if interrupted:
        raise KeyboardInterrupt
    return 1 if failed else 0
