"""What tests of several parts of the server have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postgres import Postgres


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with small files for pictures: to draw them takes several times as long as a small run."""
    from fedprune_server import pictures

    def save(figure: Any, path: Path) -> Path:
        pictures.plt.close(figure)
        path.write_bytes(b"\x89PNG")
        return path

    monkeypatch.setattr(pictures, "_save", save)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for databases that don't need it to be killed."""
    made = Postgres()
    try:
        made.start()
        yield made
    finally:
        made.close()
