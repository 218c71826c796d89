"""What a whole run says about each technique, in a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .harness import OWN, Row, quantile
from .report import cases_of, percent_text, ratio_text


@dataclass(frozen=True)
class Overview:
    """One technique on one device: fusereg's own rows, those that have a rival to be compared with.

    ``slower`` counts the cases below 1; ``failed`` those that have no time.
    """

    suite: str
    device: str
    cases: int
    lowest: float | None
    median: float | None
    highest: float | None
    of_copy: float | None
    slower: int
    failed: int


def own_row(case: Sequence[Row]) -> Row | None:
    """Fusereg's row of a case."""
    return next((row for name in OWN for row in case if row.provider == name), None)


def overview(rows: Sequence[Row]) -> list[Overview]:
    """A line for each technique and device, in the order of the rows."""
    groups: dict[tuple[str, str], list[list[Row]]] = {}
    for case in cases_of(rows):
        groups.setdefault((case[0].suite, case[0].device), []).append(case)
    lines = []
    for (suite, device), cases in groups.items():
        own = [own_row(case) for case in cases]
        ratios = [row.vs_eager for row in own if row is not None and row.vs_eager is not None]
        shares = [
            row.percent_of_copy
            for row in own
            if row is not None and row.percent_of_copy is not None
        ]
        lines.append(
            Overview(
                suite=suite,
                device=device,
                cases=len(cases),
                lowest=min(ratios, default=None),
                median=quantile(ratios, 0.5) if ratios else None,
                highest=max(ratios, default=None),
                of_copy=quantile(shares, 0.5) if shares else None,
                slower=sum(value < 1.0 for value in ratios),
                failed=sum(row is None or row.p50_us is None for row in own),
            )
        )
    return lines


HEADER = (
    "technique",
    "on",
    "cases",
    "lowest",
    "median",
    "highest",
    "copy",
    "slower",
    "failed",
)


def cells(line: Overview) -> tuple[str, ...]:
    """The line under HEADER."""
    share = "-" if line.of_copy is None else f"{percent_text(line.of_copy)} %"
    return (
        line.suite,
        line.device,
        str(line.cases),
        ratio_text(line.lowest),
        ratio_text(line.median),
        ratio_text(line.highest),
        share,
        str(line.slower or "-"),
        str(line.failed or "-"),
    )


def print_overview(console: Console, rows: Sequence[Row]) -> None:
    """The lines as a table."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title="Times faster than eager torch, and share of a copy's bandwidth",
        title_justify="left",
    )
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for line in overview(rows):
        texts = [Text(text) for text in cells(line)]
        if line.slower:
            texts[-2].stylize("bold red")
        if line.failed:
            texts[-1].stylize("bold red")
        table.add_row(*texts)
    # A log file has no width.
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(table)
