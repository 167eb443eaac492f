"""What commands print: tables, JSON, and on a terminal what is being done."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Print JSON, its keys in the order in which they were written."""
    print(json.dumps(value, indent=2))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A framed table on a terminal; columns separated by tabs elsewhere, for other programs."""
    if not sys.stdout.isatty():
        for row in (titles, *rows):
            print("\t".join(" ".join(cell.split()) for cell in row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*titles)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says what is being done, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(escape(text))


def amount(value: float, unit: str) -> str:
    """A quantity for people.

    Args:
        value: How much, in the unit.
        unit: bytes, s, J, or "" for a plain number.
    """
    if unit == "bytes":
        return f"{value / 1e6:,.2f} MB" if abs(value) >= 1e5 else f"{value:,.0f} bytes"
    if unit == "s":
        return f"{value:,.1f} s" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} ms"
    if unit == "J":
        return f"{value:,.1f} J" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} mJ"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
