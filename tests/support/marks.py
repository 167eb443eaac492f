"""Marks of single parameters."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mark_soak(rows: Iterable[str | tuple[str, ...]], *, soak: Collection[str]) -> list[Any]:
    """Parameters of a test: names, or tuples that begin with one. Raises `ValueError` if a name to mark has none."""
    parameters = [(row,) if isinstance(row, str) else row for row in rows]
    if unknown := set(soak).difference(row[0] for row in parameters):
        raise ValueError(f"no such parameter to mark: {', '.join(sorted(unknown))}")
    return [pytest.param(*row, marks=[pytest.mark.soak] if row[0] in soak else []) for row in parameters]
