"""The table of what compaction does to each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..core import screen
from .find import Found
from .parts import CONV
from .plan import Decision


class Row(NamedTuple):
    """One convolution or linear layer."""

    layer: str
    inputs: tuple[int, int]
    """Channels that it reads, before and after."""
    outputs: tuple[int, int]
    """Channels that it writes, before and after."""
    parameters: tuple[int, int]
    operations: tuple[float, float]
    """Multiply-adds of one example, before and after."""
    note: str
    """Why channels stay that cannot be removed, or that are zero."""


class Table(Sequence[Row]):
    """The changes of a model by compaction: a row for each convolution and linear layer.

    ``str()`` and ``rich.print()`` show it.
    """

    def __init__(
        self, rows: Sequence[Row], parameters: tuple[int, int], seconds: float, notes: list[str]
    ) -> None:
        self._rows = tuple(rows)
        #: The model's parameters, before and after.
        self.parameters = parameters
        #: Multiply-adds of one example in convolutions and linear layers, before and after.
        self.operations = (sum(r.operations[0] for r in rows), sum(r.operations[1] for r in rows))
        #: How long it took to find out.
        self.seconds = seconds
        #: What else changes: modules that become identities, biases that are new.
        self.notes = notes

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or a tuple of rows for a slice."""
        return self._rows[index]

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._rows)

    def _cells(self) -> list[list[str]]:
        def change(pair: tuple[float, float]) -> str:
            before, after = (f"{n:,.0f}" for n in pair)
            return before if before == after else f"{before} -> {after}"

        rows = [
            [r.layer, *map(change, (r.inputs, r.outputs, r.parameters, r.operations)), r.note]
            for r in self
        ]
        return [*rows, ["all", "", "", change(self.parameters), change(self.operations), ""]]

    def _last(self) -> str:
        share = self.operations[1] / self.operations[0] if self.operations[0] else 1.0
        return "\n".join(
            [*self.notes, f"{share:.1%} of the operations; found in {self.seconds:.1f} s"]
        )

    def __str__(self) -> str:
        """Return the table as plain text."""
        lines = [[*_HEADS], *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
        text = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines]
        return "\n".join([*(line.rstrip() for line in text), self._last()])

    __repr__ = __str__

    def __rich__(self) -> Any:
        """Return the table for ``rich.print``."""
        made = screen.table(_HEADS, self._cells(), caption=self._last(), caption_justify="left")
        made.columns[-1].justify = "left"
        return made


_HEADS = ("layer", "reads", "writes", "parameters", "multiply-adds", "why")


def make_table(
    found: Found, small: nn.Module, decisions: list[Decision], seconds: float, notes: list[str]
) -> Table:
    """Return the table of a model and its smaller one."""
    why = dict(found.kept)
    for decision in decisions:
        for text in decision.notes:
            said = why.get(decision.found.name)
            why[decision.found.name] = text if said is None else f"{said}; {text}"
    after: dict[str, Any] = dict(small.named_modules())
    rows = []
    for name, layer in found.plain.named_modules():
        if not isinstance(layer, (CONV, nn.Linear)):
            continue
        now = after.get(name)
        now = now if isinstance(now, (CONV, nn.Linear)) else None
        old, new = _widths(layer), (0, 0) if now is None else _widths(now)
        before = found.operations.get(name, 0.0)
        share = 0.0 if now is None else now.weight.numel() / layer.weight.numel()
        rows.append(
            Row(
                name,
                (old[0], new[0]),
                (old[1], new[1]),
                (_count(layer), 0 if now is None else _count(now)),
                (before, before * share),
                why.get(name, ""),
            )
        )
    return Table(rows, (_count(found.plain), _count(small)), seconds, notes)


def _widths(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
