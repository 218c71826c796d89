"""Comparison of two runs: which times changed by more than the noise of both.

A provider's time moved if the ranges from the 20th to the 80th percentile of its samples, old and
new, do not overlap: four fifths of one run's samples then lie beyond four fifths of the other's.
Changes of the machine between the runs (clock, temperature, other programs) are not in these
ranges; the times of the providers that are not fusereg's, the yardsticks, show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from fusereg.core import screen

from . import machine as machine_facts
from .cases import OWN, Row, Settings, quantile
from .report import time_text

#: Fewer samples than a full run has at least say little about their spread.
FEW_ROUNDS = Settings().min_rounds

#: Share of the CPU time taken by other programs from which on two runs say nothing.
TOO_NOISY = 0.2

#: Facts that must be equal for times to be comparable.
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
        """Return whether the provider is fusereg's."""
        return self.new.provider in OWN

    @property
    def name(self) -> str:
        """Return the case's name."""
        return f"{self.new.name}, {self.new.device}"

    @property
    def broken(self) -> bool:
        """Return whether the provider had a time and has none now."""
        return self.old.p50_us is not None and self.new.p50_us is None


@dataclass(frozen=True)
class Comparison:
    """All changes, and how many rows only one run has."""

    changes: list[Change]
    only_old: int
    only_new: int

    @property
    def moved(self) -> list[Change]:
        """Return the changes beyond the noise, failures first, then the slowest."""
        found = [change for change in self.changes if change.moved or change.broken]
        return sorted(found, key=lambda change: -(change.ratio or float("inf")))

    @property
    def yardsticks(self) -> float | None:
        """Return the median ratio of the other providers: how much slower the machine was."""
        found = [c.ratio for c in self.changes if not c.own and c.ratio is not None]
        return quantile(found, 0.5) if found else None

    def slower(self, percent: float) -> list[Change]:
        """Return those of fusereg that became slower by more than so many percent, or failed."""
        return [
            change
            for change in self.moved
            if change.own and (change.ratio is None or change.ratio > 1.0 + percent / 100.0)
        ]


def _moved(old: Row, new: Row) -> bool:
    if old.p20_us is None or old.p80_us is None or new.p20_us is None or new.p80_us is None:
        return False
    return bool(new.p20_us > old.p80_us or new.p80_us < old.p20_us)


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Match the rows by case and provider."""
    before = {(*row.case, row.provider): row for row in old}
    after = {(*row.case, row.provider): row for row in new}
    changes = []
    for key, row in after.items():
        first = before.get(key)
        if first is None:
            continue
        ratio = row.p50_us / first.p50_us if first.p50_us and row.p50_us is not None else None
        changes.append(Change(first, row, ratio, _moved(first, row)))
    return Comparison(changes, len(before.keys() - after.keys()), len(after.keys() - before.keys()))


def percent(change: Change) -> str:
    """Return how far the time moved."""
    return "failed" if change.ratio is None else f"{100.0 * (change.ratio - 1.0):+.0f} %"


HEADER = (
    "case", "provider", "time", "old p50", "new p50", "old p20 to p80", "new p20 to p80",
)  # fmt: skip
#: The column that says how far the time moved.
MOVED_COLUMN = 2


def cells(change: Change) -> tuple[str, ...]:
    """Return the line under HEADER."""

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


def load(machine: dict[str, Any]) -> float:
    """Return the share of the CPU time that other programs took."""
    return float(machine.get("others_cpu_share") or 0.0)


def unfit(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return why the machine was too busy for a comparison, or an empty text."""
    busy = [
        f"{100 * share:.0f} % of the CPU time during the {when} run"
        for when, share in (("old", load(old)), ("new", load(new)))
        if share >= TOO_NOISY
    ]
    if not busy:
        return ""
    return (
        f"not a fair comparison: other programs took {' and '.join(busy)}, so that what moved may "
        "be their doing; measure again on a quiet machine"
    )


def remarks(found: Comparison, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what a reader must know beside the table."""
    lines = [text] if (text := unfit(old, new)) else []
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
        "noise (the ranges p20 to p80 of both runs overlap)"
    )
    if found.yardsticks is not None:
        lines.append(
            f"everything that is not fusereg took {100.0 * (found.yardsticks - 1.0):+.1f} % in the "
            "median: so much is due to the machine"
        )
    if any(0 < row.rounds < FEW_ROUNDS for c in found.changes for row in (c.old, c.new)):
        lines.append(
            f"some times come from fewer than {FEW_ROUNDS} rounds (--quick): their ranges are rough"
        )
    for when, facts in (("before", old), ("now", new)):
        warning = machine_facts.noise_warning(facts)
        if warning and load(facts) < TOO_NOISY:
            lines.append(f"{when}: {warning}")
    if found.only_old or found.only_new:
        lines.append(f"{found.only_old} rows only in the old run, {found.only_new} only in the new")
    return lines


def print_comparison(
    console: Console, found: Comparison, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """Print the table of what moved, and the remarks."""
    screen.at_least(console, 160)
    if found.moved:
        table = screen.table(HEADER, words=2)
        for column in table.columns:
            column.overflow = "fold"
        for change in found.moved:
            texts = [Text(text) for text in cells(change)]
            if change.own:
                texts[MOVED_COLUMN].stylize("green" if (change.ratio or 2.0) < 1.0 else "bold red")
            table.add_row(*texts)
        console.print(table)
    for line in remarks(found, old, new):
        style = "bold red" if line == unfit(old, new) else ""
        console.print(Text(line, style), soft_wrap=True)
