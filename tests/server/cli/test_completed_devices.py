"""Names of boards are completed from the database of the server's state folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sql

from fedprune_server.storage.state_folder import FILE
from fedprune_server.storage.tables import MEMBERS, TABLES
from support.processes.completed import completed


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    engine = sql.create_engine(f"sqlite:///{folder / FILE}")
    TABLES.create_all(engine)
    with engine.begin() as connection:
        rows = [{"device": name, "key": name, "status": "approved", "asked": 0} for name in ("attic", "aula", "yard")]
        connection.execute(sql.insert(MEMBERS), rows)
    engine.dispose()
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fedprune-server crashes --state state --device a", {"attic", "aula"}),
        ("fedprune-server devices --state state revoke y", {"yard"}),
        ("fedprune-server rollout start r --state state --devices attic,a", {"attic,aula"}),
        ("fedprune-server crashes --state gone --device a", set()),
    ],
)
def test_boards_are_completed(state: Path, line: str, words: set[str]) -> None:
    assert set(completed(line, state.parent).words) == words
    assert not (state.parent / "gone").exists()


def test_the_environments_state_folder_counts_too(state: Path) -> None:
    found = completed("fedprune-server crashes --device y", state.parent, FEDPRUNE_SERVER_STATE=str(state))
    assert found.words == ["yard"]
    assert "sqlalchemy" not in found.imported
