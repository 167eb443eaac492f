"""Pages of rows, sorted by a column."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SIZE = 500


@dataclass(frozen=True)
class Page:
    """Some of many rows.

    Attributes:
        items: The rows of this page.
        page: Its number, from 1; the last one where a later one was asked for.
        pages: How many there are, at least 1.
        size: Rows of a page.
        total: Rows of all pages.
    """

    items: list[dict[str, Any]]
    page: int
    pages: int
    size: int
    total: int


def paged(
    rows: Sequence[dict[str, Any]],
    page: int,
    size: int,
    sort: str | None = None,
    sortable: Collection[str] = (),
    tie: str | None = None,
) -> Page:
    """A page of rows.

    Args:
        rows: All of them.
        page: From 1.
        size: Of a page, from 1 to `MAX_SIZE`.
        sort: The column to sort by, with `-` before it for the other direction; None to leave them as they are. Rows
            without a value come last, whatever the direction.
        sortable: Columns that can be sorted by.
        tie: The column that decides among equals.

    Raises:
        ValueError: Page, size or column are none.
    """
    if page < 1 or not 1 <= size <= MAX_SIZE:
        raise ValueError(f"expected a page from 1 on and a size from 1 to {MAX_SIZE}, got {page} and {size}")
    found = list(rows)
    if sort is not None:
        column, backward = sort.removeprefix("-"), sort.startswith("-")
        if column not in sortable:
            raise ValueError(f"no column {column!r} to sort by: expected one of {', '.join(sortable)}")
        if tie is not None and column != tie:
            found.sort(key=lambda r: r[tie])
        there = [r for r in found if r[column] is not None]
        missing = [r for r in found if r[column] is None]
        there.sort(key=lambda r: r[column], reverse=backward)
        found = there + missing
    pages = max(1, -(-len(found) // size))
    page = min(page, pages)
    return Page(found[(page - 1) * size : page * size], page, pages, size, len(found))
