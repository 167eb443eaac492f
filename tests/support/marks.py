"""Marks of single parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def marked(
    rows: Iterable[str | tuple[str, ...]], *, soak: Collection[str] = (), slow: Collection[str] = ()
) -> list[Any]:
    """Parameters of a test: names, or tuples that begin with one. Raises `ValueError` if a name to mark has none."""
    found = [(row,) if isinstance(row, str) else row for row in rows]
    if unknown := {*soak, *slow}.difference(row[0] for row in found):
        raise ValueError(f"no such parameter to mark: {', '.join(sorted(unknown))}")
    chosen = ((pytest.mark.soak, soak), (pytest.mark.slow, slow))
    return [pytest.param(*row, marks=[mark for mark, names in chosen if row[0] in names]) for row in found]
