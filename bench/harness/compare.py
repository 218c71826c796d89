"""Two runs side by side: what moved by more than the noise of both.

A provider's time moved if the ranges from the 20th to the 80th percentile of its samples, old and
new, do not meet: then four fifths of one run's samples lie beyond four fifths of the other's. What
the machine did between the runs (clock, temperature, other programs) is not in these ranges; the
yardsticks tell of it, the providers that are not fusereg's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import machine as machine_facts
from .harness import OWN, Row, Settings, quantile
from .report import time_text

#: Fewer samples than a full run's smallest number tell little about their spread.
FEW_ROUNDS = Settings().min_rounds

#: What makes two runs' times comparable at all.
MACHINE_KEYS = ("cpu", "threads", "isa", "torch", "gpu")


@dataclass(frozen=True)
class Change:
    """A provider of a case in both runs. ``ratio`` is new over old; None if one has no time."""

    old: Row
    new: Row
    ratio: float | None
    moved: bool

    @property
    def own(self) -> bool:
        return self.new.provider in OWN

    @property
    def name(self) -> str:
        row = self.new
        return f"{row.op}, {row.mode}, {row.shape}, {row.dtype}, {row.device}"

    @property
    def broken(self) -> bool:
        """It had a time and has none now."""
        return self.old.p50_us is not None and self.new.p50_us is None


@dataclass(frozen=True)
class Comparison:
    """All changes, and how many rows only one run has."""

    changes: list[Change]
    only_old: int
    only_new: int

    @property
    def moved(self) -> list[Change]:
        """Those beyond the noise, the slowest first; what broke before them."""
        found = [change for change in self.changes if change.moved or change.broken]
        return sorted(found, key=lambda change: -(change.ratio or float("inf")))

    @property
    def yardsticks(self) -> float | None:
        """Median ratio of what is not fusereg's: how much faster or slower the machine was."""
        found = [c.ratio for c in self.changes if not c.own and c.ratio is not None]
        return quantile(found, 0.5) if found else None

    def slower(self, percent: float) -> list[Change]:
        """Fusereg's own that moved to more than so many percent above, or broke."""
        return [
            change
            for change in self.moved
            if change.own and (change.ratio is None or change.ratio > 1.0 + percent / 100.0)
        ]


def _moved(old: Row, new: Row) -> bool:
    if old.p20_us is None or old.p80_us is None or new.p20_us is None or new.p80_us is None:
        return False
    return new.p20_us > old.p80_us or new.p80_us < old.p20_us


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Matches the rows by case and provider."""
    before = {(*row.case, row.provider): row for row in old}
    after = {(*row.case, row.provider): row for row in new}
    changes = []
    for key, row in after.items():
        first = before.get(key)
        if first is None:
            continue
        ratio = None
        if first.p50_us and row.p50_us is not None:
            ratio = row.p50_us / first.p50_us
        changes.append(Change(first, row, ratio, _moved(first, row)))
    return Comparison(changes, len(before.keys() - after.keys()), len(after.keys() - before.keys()))


def percent(change: Change) -> str:
    """How far the time moved."""
    return "failed" if change.ratio is None else f"{100.0 * (change.ratio - 1.0):+.0f} %"


HEADER = (
    "case", "provider", "time", "old p50", "new p50", "old p20 to p80", "new p20 to p80",
)  # fmt: skip
#: The column that says how far the time moved.
MOVED_COLUMN = 2


def cells(change: Change) -> tuple[str, ...]:
    """The line under HEADER."""

    def spread(row: Row) -> str:
        return "-" if row.p20_us is None else f"{time_text(row.p20_us)} to {time_text(row.p80_us)}"

    old, new = change.old, change.new
    return (
        change.name,
        new.provider,
        percent(change),
        time_text(old.p50_us),
        time_text(new.p50_us),
        spread(old),
        spread(new),
    )


def remarks(found: Comparison, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table."""
    lines = []
    for key in MACHINE_KEYS:
        if old.get(key) != new.get(key):
            lines.append(f"not the same {key}: {old.get(key)} before, {new.get(key)} now")
    own = [change for change in found.changes if change.own]
    up = sum(change.moved and (change.ratio or 0.0) > 1.0 for change in own)
    down = sum(change.moved and (change.ratio or 2.0) < 1.0 for change in own)
    broken = sum(change.broken for change in own)
    failed = f", {broken} failed" if broken else ""
    lines.append(
        f"of {len(own)} times of fusereg: {up} slower, {down} faster{failed}, the rest within the "
        "noise (the ranges p20 to p80 of both runs meet)"
    )
    if found.yardsticks is not None:
        lines.append(
            "everything that is not fusereg took "
            f"{100.0 * (found.yardsticks - 1.0):+.1f} % in the median: so much is the machine's"
        )
    if any(0 < row.rounds < FEW_ROUNDS for c in found.changes for row in (c.old, c.new)):
        lines.append(
            f"some times come from fewer than {FEW_ROUNDS} rounds (--quick): their ranges are rough"
        )
    for when, facts in (("before", old), ("now", new)):
        warning = machine_facts.noise_warning(facts)
        if warning:
            lines.append(f"{when}: {warning}")
    if found.only_old or found.only_new:
        lines.append(f"{found.only_old} rows only in the old run, {found.only_new} only in the new")
    return lines


def print_comparison(
    console: Console, found: Comparison, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """The table of what moved, and the remarks."""
    # A log file has no width: what a case is called must not be cut.
    if not console.is_terminal:
        console.width = max(console.width, 160)
    if found.moved:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(HEADER):
            table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
        for change in found.moved:
            texts = [Text(text) for text in cells(change)]
            if change.own:
                texts[MOVED_COLUMN].stylize("green" if (change.ratio or 2.0) < 1.0 else "bold red")
            table.add_row(*texts)
        console.print(table)
    for line in remarks(found, old, new):
        console.print(Text(line), soft_wrap=True)
