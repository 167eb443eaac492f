"""Output of commands: tables, colours and progress for people, tab-separated lines for programs.

Only output on a terminal needs the package rich, so boards, which lack it, can import modules that print tables.
Colours follow rich: none with `NO_COLOR`, with `TERM=dumb`, or where the output is not a terminal.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from rich.table import Table

# Styles of states, by rich's names.
GOOD, BUSY, ATTENTION, BAD = "green", "cyan", "yellow", "red"

# Spaces between two columns.
_COLUMN_GAP = 2


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        is_right_aligned: Whether cells are aligned to the right, as numbers are.
        drop_order: Where a terminal is too narrow, columns are kept in ascending order of this number as far as they
            fit; one with 0 always stays.
        min_width: The fewest characters to which a column of longer texts may be wrapped; 0 for one that never wraps.
    """

    title: str
    is_right_aligned: bool = False
    drop_order: int = 0
    min_width: int = 0


# A text, or a text and its style.
Cell = str | tuple[str, str]


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], *, stream: TextIO | None = None) -> None:
    """Print a table on a terminal, and lines of cells separated by tabs elsewhere, for other programs.

    A terminal that is too narrow gets the columns that fit, and a line that names the others.
    """
    stream = stream or sys.stdout
    rows = list(rows)
    if not stream.isatty():
        for row in ([c.title for c in columns], *rows):
            print("\t".join(" ".join(_text(cell).split()) for cell in row), file=stream)
        return
    from rich.console import Console

    console = Console(file=stream)
    table, dropped = fit_table(columns, rows, console.width)
    console.print(table)
    if dropped:
        left_out = ", ".join(dropped)
        console.print(
            f"not shown at {console.width} columns: {left_out} (a wider terminal or a pipe has them)",
            style="dim", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def fit_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> tuple[Table, tuple[str, ...]]:
    """A table no wider than a terminal, and the titles of the columns for which there was no room."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    natural = [max([cell_len(c.title), *(cell_len(_text(row[i])) for row in rows)]) for i, c in enumerate(columns)]
    widths = [min(n, c.min_width or n) for n, c in zip(natural, columns, strict=True)]
    # Every column is followed by a gap of two spaces, of which the last one lacks one at the end of a line.
    spare_width, kept_columns = width + 1, []
    for i in sorted(range(len(columns)), key=lambda i: columns[i].drop_order):
        if not columns[i].drop_order or widths[i] + _COLUMN_GAP <= spare_width:
            kept_columns.append(i)
            spare_width -= widths[i] + _COLUMN_GAP
    kept_columns.sort()
    narrowed_columns = sorted((i for i in kept_columns if widths[i] < natural[i]), key=lambda i: natural[i] - widths[i])
    # The columns that lack least come first, so that what they leave unused goes to the others.
    for count, i in enumerate(narrowed_columns):
        extra_width = min(natural[i] - widths[i], max(0, spare_width) // (len(narrowed_columns) - count))
        widths[i], spare_width = widths[i] + extra_width, spare_width - extra_width
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i in kept_columns:
        table.add_column(
            Text(columns[i].title),
            justify="right" if columns[i].is_right_aligned else "left",
            no_wrap=not columns[i].min_width,
            overflow="fold",
            width=widths[i],
        )
    for row in rows:
        # Texts, not markup: many are devices' own words, and a bracket in them must stay a bracket.
        cells = (row[i] for i in kept_columns)
        table.add_row(*(Text(*(cell if isinstance(cell, tuple) else (cell,))) for cell in cells))
    return table, tuple(c.title for i, c in enumerate(columns) if i not in kept_columns)


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


_VERDICTS = {"PASS": GOOD, "FAIL": BAD, "wrong": BAD, "unknown": ATTENTION, "note": ATTENTION}


def print_verdicts(text: str) -> None:
    """Print lines; on a terminal a verdict at their beginning, such as PASS or `wrong`, is in colour."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout)
    for line in text.splitlines():
        word = line.partition(":")[0]
        styled = Text(line)
        if word in _VERDICTS:
            styled.stylize(_VERDICTS[word], 0, len(word))
        console.print(styled, soft_wrap=True)


@contextlib.contextmanager
def progress(first: str = "starting") -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, on a terminal only; yields a function that shows the next step."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(first)) as status:
        yield lambda text: status.update(escape(text))


# Reports that this many more bytes are done.
AdvanceBar = Callable[[int], None]


@contextlib.contextmanager
def byte_progress(title: str, total: int) -> Iterator[AdvanceBar]:
    """Show a progress bar of `total` bytes on stderr, on a terminal only."""
    if not sys.stderr.isatty():
        yield ignore_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    texts = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    columns = *texts, TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def ignore_progress(count: int) -> None: ...
