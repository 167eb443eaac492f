"""One page of the many rows that a request of the console reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Rows of a page, at most: a request for a larger one would hold a thread and memory for it.
MAX_PAGE_SIZE = 500


@dataclass(frozen=True)
class RecordPage:
    """Some of many rows: page number `page` of `pages`, both from 1, with `size` of `total` rows."""

    items: list[dict[str, Any]]
    page: int
    pages: int
    size: int
    total: int


def read_page(
    page: int, size: int, count: Callable[[], int], read: Callable[[int, int], list[dict[str, Any]]]
) -> RecordPage:
    """Page number `page`, or the last one: `read` returns rows, given how many and how many to skip.

    Raises `ValueError` if page or size are out of range.
    """
    if page < 1 or not 1 <= size <= MAX_PAGE_SIZE:
        raise ValueError(f"expected a page from 1 on and a size from 1 to {MAX_PAGE_SIZE}, got {page} and {size}")
    total = count()
    pages = max(1, -(-total // size))
    page = min(page, pages)
    return RecordPage(read(size, (page - 1) * size), page, pages, size, total)
