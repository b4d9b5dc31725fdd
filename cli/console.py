"""The console every command prints to, tables, progress with ETA, and one-line errors."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from ..calibrate.progress import Progress

# a pipe or a log file has no width of its own: give tables room there
# without markup: names of folders and layers may hold brackets
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
error_console = Console(stderr=True, highlight=False, markup=False)

_QUIET_SECONDS = 5.0


def bold(text: object, color: str = "") -> Text:
    return Text(str(text), style=f"bold {color}".strip())


def show_command(*words: object) -> None:
    """Prints a command that the user may want next, ready for a shell."""
    console.print(f"  {shlex.join(map(str, words))}")


class Reporter(Progress):
    """Draws a run's stages as bars with ETA on a terminal, and as plain lines every few seconds elsewhere.

    `task` is for callers that report (label, done, total).
    """

    def __init__(self, bars: Bars | None) -> None:
        self.bars = bars
        self.current: Any = None
        self.name, self.total, self.started, self.printed = "", 0, time.monotonic(), 0.0

    def stage(self, name: str, total: int) -> None:
        self.name, self.total, self.started, self.printed = name, total, time.monotonic(), time.monotonic()
        if self.bars is None:
            console.print(f"{name} ({total})")
            return
        if self.current is not None:
            self.bars.remove_task(self.current)
        self.current = self.bars.add_task(name, total=total, detail="")

    def advance(self, done: int, detail: str = "") -> None:
        if self.bars is not None and self.current is not None:
            self.bars.update(self.current, completed=done, detail=detail)
            return
        now = time.monotonic()
        if now - self.printed > _QUIET_SECONDS and done:
            left = (now - self.started) * (self.total - done) / done
            console.print(f"  {self.name}: {done}/{self.total}, about {left:.0f} s left  {detail}")
            self.printed = now

    def note(self, message: str) -> None:
        console.print(message)

    def task(self, label: str, done: int, total: int) -> None:
        if label != self.name:
            self.stage(label, total)
        self.advance(done)


@contextmanager
def reporting() -> Iterator[Reporter]:
    """A Reporter for the time of the block."""
    if not console.is_terminal:
        yield Reporter(None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield Reporter(bars)


def table(*columns: str, right: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Table:
    """An empty table; columns named in `right` are right-aligned, those in `fold` (and the first) may wrap."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        # the first column holds names and may fold; the others are short and must stay readable
        first = name == columns[0]
        out.add_column(
            name, justify="right" if name in right else "left", overflow="fold", no_wrap=not (first or name in fold)
        )
    return out


def print_table(rows: Table) -> None:
    """Prints a table; where the terminal is too narrow for it, with the first column on lines of its own."""
    if Measurement.get(console, console.options.update(max_width=1000), rows).maximum <= console.width:
        console.print(rows)
        return
    first, *others = rows.columns
    columns = [[str(column.header), *map(str, column.cells)] for column in others]
    widths = [max(map(len, cells)) for cells in columns]
    for i, name in enumerate([first.header, *first.cells]):
        cells = [
            cells[i].rjust(width) if column.justify == "right" else cells[i].ljust(width)
            for column, cells, width in zip(others, columns, widths, strict=True)
        ]
        for line in (str(name), ("  " + "  ".join(cells)).rstrip()):
            console.print(line if i else bold(line))


def human_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
