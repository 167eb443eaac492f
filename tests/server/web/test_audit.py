"""The audit log: strangers who fail to log in don't fill it."""

from pathlib import Path

import pytest

from fedprune.core.errors import StorageError, StorageFullError
from fedprune_server.web.audit import FAILED_INTERVAL_S, MAX_FAILED_BURST, Audit
from fedprune_server.web.database import CONSOLE_FILE, MAX_AUDIT_LINES, ConsoleDatabase


def test_failed_logins_beyond_a_few_are_counted_and_not_listed(tmp_path: Path) -> None:
    now = [0.0]
    with ConsoleDatabase(tmp_path / CONSOLE_FILE) as database:
        audit = Audit(database, monotonic=lambda: now[0])
        for i in range(10 * MAX_FAILED_BURST):
            audit.note_failed_login("ann", f"10.0.{i // 256}.{i % 256}")
        assert audit.page().total == MAX_FAILED_BURST
        audit.note("ann", "10.0.0.1", "login", outcome="done")
        assert audit.page().total == MAX_FAILED_BURST + 1, "what operators do is always listed"
        now[0] += FAILED_INTERVAL_S
        audit.note_failed_login("eve", "10.0.0.1")
        audit.note_failed_login("eve", "10.0.0.1")
        (last, *_) = audit.page().items
        assert (last["operator"], last["outcome"], last["what"]) == (
            "eve",
            "failed",
            {"unlisted before": 9 * MAX_FAILED_BURST},
        )
        assert audit.page().total == MAX_FAILED_BURST + 2


@pytest.mark.parametrize("inserting", ["transaction", "try_to"])
def test_a_full_disk_is_named_as_the_cause(tmp_path: Path, inserting: str) -> None:
    """SQLite ends the transaction itself where the disk is full."""
    insert = "INSERT INTO audit (at, operator, address, action, what, outcome) VALUES (0, ?, 'b', 'c', '{}', '')"
    with ConsoleDatabase(tmp_path / CONSOLE_FILE) as database:
        database._connection.execute("PRAGMA max_page_count=1")  # SQLite then takes the pages that there are

        def write() -> None:
            if inserting == "try_to":
                database.try_execute((insert, ("x" * 10**6,)))
                return
            with database.transaction():
                database.execute(insert, "x" * 10**6)

        with pytest.raises(StorageFullError, match="no room left"):
            write()
        assert Audit(database).page().total == 0


def test_only_lines_before_the_latest_many_are_deleted(tmp_path: Path) -> None:
    with ConsoleDatabase(tmp_path / CONSOLE_FILE) as database:
        audit = Audit(database)
        audit.note("ann", "10.0.0.1", "login")
        audit.note("bob", "10.0.0.1", "login")
        database.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'audit'", MAX_AUDIT_LINES)
        audit.note("eve", "10.0.0.1", "login")
        assert [r["operator"] for r in audit.page().items] == ["eve", "bob"]
        with pytest.raises(StorageError, match="append only"):
            database.execute("DELETE FROM audit WHERE operator = 'bob'")


def test_a_console_database_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    with ConsoleDatabase(tmp_path / CONSOLE_FILE) as database:
        database.execute("PRAGMA user_version=3")
    before = (tmp_path / CONSOLE_FILE).read_bytes()
    with pytest.raises(StorageError, match=r"another version: expected 1, got 3") as caught:
        ConsoleDatabase(tmp_path / CONSOLE_FILE)
    assert caught.value.hint
    assert (tmp_path / CONSOLE_FILE).read_bytes() == before
