"""Tables and progress bars of the terminal, by rich, which is imported when one is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]] = (),
    *,
    words: int = 1,
    wrap: bool = True,
    **options: Any,
) -> Table:
    """Return a table: the first columns aligned as words, the others as numbers.

    Args:
        heads: of the columns.
        rows: texts of rich, or plain ones.
        words: the number of columns of words.
        wrap: whether cells that are too long are wrapped.
        options: of ``rich.table.Table``.
    """
    from rich import box
    from rich.table import Table

    made = Table(**{"box": box.SIMPLE_HEAD, "pad_edge": False, **options})
    for i, head in enumerate(heads):
        made.add_column(head, justify="left" if i < words else "right", no_wrap=not wrap)
    for row in rows:
        made.add_row(*row)
    return made


def progress(console: Console, *more: str, wanted: bool = True) -> Progress:
    """Return a progress bar that vanishes at its end, and is shown on a terminal alone.

    Args:
        console: where to show it.
        more: texts before the time that is left.
        wanted: whether to show it at all.
    """
    from rich import progress as bars

    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()]
    columns += [*map(bars.TextColumn, more), bars.TimeRemainingColumn()]
    hidden = not console.is_terminal or not wanted
    return bars.Progress(*columns, console=console, transient=True, disable=hidden)


def at_least(console: Console, width: int) -> None:
    """Widen what is no terminal: a log file has no width, and its columns must not be cut."""
    if not console.is_terminal:
        console.width = max(console.width, width)
