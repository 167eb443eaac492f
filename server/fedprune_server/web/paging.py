"""Pages of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_SIZE = 500


@dataclass(frozen=True)
class Page:
    """Some of many rows.

    Attributes:
        items: The rows of this page.
        page: Its number, from 1; the last one where a later one was asked for.
        pages: Number of pages, at least 1.
        size: Rows of a page.
        total: Rows of all pages.
    """

    items: list[dict[str, Any]]
    page: int
    pages: int
    size: int
    total: int
