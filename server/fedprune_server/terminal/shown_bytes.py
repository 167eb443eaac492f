"""How many bytes of a long piece of work are done, on a terminal; where there is none, nothing is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]
"""Takes how many more bytes are done."""


@contextmanager
def shown_bytes(title: str, total: int) -> Iterator[Advance]:
    """A bar on standard error.

    Args:
        title: What is being done.
        total: Bytes that there are.

    Yields:
        What is to be told how many more bytes are done.
    """
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda more: bar.advance(task, more)


def silent(more: int) -> None:
    """An `Advance` that shows nothing."""
