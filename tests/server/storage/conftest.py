"""Databases for tests of the storage: SQLite and, where it is installed, PostgreSQL."""

from pathlib import Path

import pytest

from fedprune_server.storage.folder_layout import DATABASE_FILE
from support.processes.postgres import Postgres


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / DATABASE_FILE}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()
