"""Results of a path: the choice of a point, tables and files."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..core import screen
from .budget import OP
from .picture import draw_groups, draw_path
from .point import PathPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Mode = Literal["max", "min"]


class RegularizationPath:
    """The networks of a path over strengths; :func:`fusereg.path` makes it.

    Printing it shows its table.

    Attributes:
        points: a :class:`PathPoint` for each strength, in the order they were trained.
        mode: ``"max"`` or ``"min"``: which values of the metric are better.
        names: the names of the penalized groups, if there are any.
        samples: the number of validation samples that the standard error of an accuracy is of.
    """

    def __init__(
        self,
        points: Sequence[PathPoint],
        mode: Mode = "max",
        names: Sequence[str] = (),
        samples: int | None = None,
        load: Callable[[int], nn.Module] | None = None,
    ) -> None:
        self.points = list(points)
        self.mode, self.names, self.samples = mode, list(names), samples
        self._load = load

    # -- the choice --

    @property
    def best(self) -> PathPoint:
        """The point with the best metric, of several the one with the strongest penalty."""
        sign = 1 if self.mode == "max" else -1
        known = [p for p in self.points if not math.isnan(p.value)]
        if not known:
            raise ValueError(f"{OP}: the metric is NaN at every strength")
        return max(known, key=lambda p: (sign * p.value, p.strength))

    @property
    def chosen(self) -> PathPoint:
        r"""The strongest penalty whose metric is within one standard error of the best.

        The one-standard-error rule (Breiman et al. 1984; glmnet's ``lambda.1se``) on one validation
        split: the standard error is that of the best point, :math:`\sqrt{p (1 - p) / n}` for an
        accuracy p on n samples. It has the chance in the choice of these samples, not that of
        another training.

        Raises:
            ValueError: the standard error of the best point is not known.
        """
        best = self.best
        if best.standard_error is None:
            raise ValueError(
                f"{OP}: the one-standard-error rule needs the standard error of the metric: pass "
                "samples= if it is an accuracy, or let evaluate return a mapping with a "
                '"standard_error"; without the rule, take .best'
            )
        # A hair of tolerance, for accuracies that differ by whole samples.
        limit = best.standard_error * (1 + 1e-9)
        near = [p for p in self.points if p is best or abs(p.value - best.value) <= limit]
        return max(near, key=lambda p: p.strength)

    def model_at(self, point: PathPoint) -> nn.Module:
        """Return a new network, from ``make_model``, with the weights of a point.

        Raises:
            ValueError: this is no point of the path, or the path holds no weights.
        """
        self._check(point)
        if self._load is None:
            raise ValueError(f"{OP}: no weights are held of {point!r}")
        return self._load(self.points.index(point))

    def _check(self, point: PathPoint) -> None:
        """Raise unless this is one of the points."""
        if point not in self.points:
            strengths = ", ".join(f"{p.strength:g}" for p in self.points)
            raise ValueError(
                f"{OP}: this must be one of the path's points, such as path.chosen or "
                f"path.points[0], got {point!r}; their strengths are {strengths}"
            )

    # -- groups --

    def leaves_at(self) -> dict[str, float]:
        """Return the strength at which each penalized group leaves the network for good.

        That is the weakest one at which it is unused and remains so at all stronger ones; infinity
        for a group that is still used at the strongest. The last to leave come first; of those that
        leave together, in their own order.
        """
        by_strength = sorted(self.points, key=lambda p: p.strength)
        found = {}
        for i, name in enumerate(self.names):
            left = math.inf
            for point in reversed(by_strength):
                if point.used[i]:
                    break
                left = point.strength
            found[name] = left
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def used_at(self, point: PathPoint) -> list[str]:
        """Return the names of the penalized groups that a point's network uses.

        Raises:
            ValueError: this is no point of the path.
        """
        self._check(point)
        return [name for name, used in zip(self.names, point.used, strict=True) if used]

    # -- tables and files --

    def _rows(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the columns that have figures, and a row for each point."""
        rows = []
        for p in self.points:
            row: dict[str, Any] = {"strength": p.strength, **p.metrics}
            row["standard_error"] = p.standard_error
            row["zeros"] = p.zeros
            row["groups"] = sum(p.used) if p.used else None
            for name in ("parameters", "operations", "milliseconds", "epochs"):
                row[name] = getattr(p, name)
            rows.append(row)
        every = dict.fromkeys(name for row in rows for name in row)
        return [c for c in every if any(row.get(c) is not None for row in rows)], rows

    def _marks(self) -> dict[int, str]:
        """Return a word for the best and the chosen point, by their indices."""
        marks: dict[int, str] = {}
        for word in ("best", "chosen"):
            try:
                index = self.points.index(getattr(self, word))
            except ValueError:
                continue
            marks[index] = f"{marks[index]}, {word}" if index in marks else word
        return marks

    def table(self) -> Table:
        """Return the points as a table of rich, with the best and the chosen one marked."""
        columns, rows = self._rows()
        marks = self._marks()
        lines = (
            [*(_shown(c, row.get(c)) for c in columns), marks.get(i, "")]
            for i, row in enumerate(rows)
        )
        made = screen.table([*(c.replace("_", " ") for c in columns), ""], lines, words=0)
        made.columns[-1].justify = "left"  # of words
        return made

    def groups_table(self) -> Table:
        """Return a table of rich: each penalized group and the strength at which it leaves."""
        leaves = self.leaves_at().items()
        rows = ([name, "stays" if math.isinf(s) else f"{s:.3g}"] for name, s in leaves)
        return screen.table(("group", "leaves at strength"), rows)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def __repr__(self) -> str:
        return f"RegularizationPath({len(self.points)} points)"

    def to_csv(self, file: str | os.PathLike[str]) -> None:
        """Write a row for each point."""
        columns, rows = self._rows()
        with open(file, "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def to_json(self, file: str | os.PathLike[str]) -> None:
        """Write all there is to the path but the weights; :meth:`from_json` reads it."""
        content = {
            "mode": self.mode,
            "names": self.names,
            "samples": self.samples,
            "points": [_plain(asdict(p)) for p in self.points],
        }
        with open(file, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, file: str | os.PathLike[str]) -> RegularizationPath:
        """Return a path that :meth:`to_json` wrote, without its weights."""
        with open(file, encoding="utf-8") as source:
            content = json.load(source)
        points = content.pop("points")
        for p in points:
            p["metrics"] = {name: float(value) for name, value in p["metrics"].items()}
        return cls([PathPoint(**p) for p in points], **content)

    # -- pictures --

    def plot(self, file: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the metric, zeros, operations and time over the strength; write it to a file.

        Needs matplotlib (``pip install "fusereg[demo]"``), as :meth:`plot_groups`.
        """
        best = self.best
        chosen = None if best.standard_error is None else self.chosen
        return _written(draw_path(self.points, best, chosen, self.samples), file)

    def plot_groups(self, file: str | os.PathLike[str] | None = None, most: int = 40) -> Figure:
        """Draw at which strength the penalized groups leave, the last ``most`` of them."""
        return _written(draw_groups(self.points, self.leaves_at(), most), file)


def _written(figure: Figure, file: str | os.PathLike[str] | None) -> Figure:
    if file is not None:
        figure.savefig(file, dpi=150, facecolor="white")
    return figure


def _shown(column: str, value: Any) -> str:
    """Return a number as the table shows it."""
    if value is None:
        return "-"
    if column == "zeros":
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if column in ("strength", "milliseconds") else f"{value:.4g}"


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Return a point's fields with numbers that are not finite as words, which JSON lacks."""
    metrics = content["metrics"].items()
    return {**content, "metrics": {n: v if math.isfinite(v) else str(v) for n, v in metrics}}
