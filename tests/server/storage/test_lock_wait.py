"""Locks that other processes hold: readers wait for none of SQLite's; who has to wait says for whom, and goes on."""

import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.core import lock_holders, lock_wait
from fedprune.core.errors import BusyError
from fedprune.core.lock_holders import command_text, file_lock_holders
from fedprune.core.lock_wait import wait_hook
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage import database, sqlite_engine
from fedprune_server.storage.database import Database, translate_errors
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.storage import Storage
from support.processes.postgres import Postgres

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


class EndedError(Exception):
    """What a hook raises to end a wait."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_engine, "SQLITE_RETRY_S", 0.02)
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(lock_wait, "FIRST_LOG_AFTER_S", 0.0)
    monkeypatch.setattr(lock_wait, "LOOKUP_INTERVAL_S", 0.0)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a database's write lock, as a program of somebody else's does."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


def after(turns: int, act: Callable[[], None]) -> Callable[[], None]:
    """A hook that acts when it is called for the given time."""
    left = [turns]

    def hook() -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return hook


def fail() -> None:
    raise EndedError


def test_readers_wait_for_no_writer(tmp_path: Path) -> None:
    with Storage.open_in(tmp_path) as storage:
        storage.put_settings({"job": {"name": "one"}})
        storage.save(State(model="m" * 64), [on.Scored(1, "r" * 64)], 1.0)
        members, rollouts = IdentityStore(storage.database), RolloutStore(tmp_path, storage.database)
        with exclusive_lock(tmp_path / DATABASE_FILE), wait_hook(fail):
            assert storage.settings() == {"job": {"name": "one"}}
            assert storage.load() == State(model="m" * 64)
            assert [storage.rounds(), storage.devices(), storage.unplanned_devices(), storage.incomplete_rounds()] == [
                [],
                [],
                {},
                [],
            ]
            assert storage.log.last_at() == 1.0
            assert [at for _, at, _, _ in storage.log.events()] == [1.0]
            assert members.is_empty
            assert (members.version(), members.devices(), members.latest_epochs()) == ("", [], {})
            assert (rollouts.entries(), rollouts.change_count()) == ([], 0)
            with Storage.open_existing(tmp_path) as reader, open_database(tmp_path) as further:
                assert reader.settings() is not None
                assert IdentityStore(further).is_empty
            with Storage.open_in(tmp_path) as restarted:  # a start of a server has nothing to write before it begins
                assert restarted.load() is not None


def test_a_reader_sees_one_state_from_its_beginning_on(tmp_path: Path) -> None:
    with Storage.open_in(tmp_path) as storage, Storage.open_in(tmp_path) as writer:
        storage.put_settings({"n": 1})
        query = "SELECT value FROM meta WHERE key = 'settings'"
        with storage.database.read_transaction() as connection:
            writer.put_settings({"n": 2})
            before = connection.exec_driver_sql(query).scalar()
        with storage.database.read_transaction() as connection:
            assert connection.exec_driver_sql(query).scalar() != before


@pytest.mark.usefixtures("quick")
def test_a_writer_waits_for_a_lock_as_long_as_it_takes_and_names_who_holds_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Storage.open_in(tmp_path) as storage:
        command = [sys.executable, "-c", HOLDER, tmp_path / DATABASE_FILE]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            holder.stdout.readline()
            with caplog.at_level(logging.INFO, logger="fedprune"), wait_hook(after(5, holder.stdin.close)):
                storage.save(State(model="m" * 64), [on.Scored(1, "r" * 64)], 1.0)
        assert storage.load() == State(model="m" * 64)
    lines = [r.getMessage() for r in caplog.records]
    assert f"process {holder.pid} " in lines[0]
    assert DATABASE_FILE in lines[0]
    assert len(lines) == 2, "one as it waits, one as it goes on"


@pytest.mark.usefixtures("quick")
def test_who_waits_for_a_lock_can_be_stopped_and_has_written_nothing(tmp_path: Path) -> None:
    with Storage.open_in(tmp_path) as storage:
        with exclusive_lock(tmp_path / DATABASE_FILE), wait_hook(after(3, fail)), pytest.raises(EndedError):
            storage.put_settings({"n": 1})
        assert storage.settings() is None
        storage.put_settings({"n": 2})
        assert storage.settings() == {"n": 2}


@pytest.mark.usefixtures("quick")
def test_a_database_that_another_program_has_for_itself_is_waited_for(tmp_path: Path) -> None:
    with Storage.open_in(tmp_path) as storage:
        storage.put_settings({"n": 1})
    holder = sqlite3.connect(tmp_path / DATABASE_FILE, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")  # not even readers may use it
    with wait_hook(after(4, holder.close)), Storage.open_in(tmp_path) as storage:
        assert storage.settings() == {"n": 1}


def test_a_lock_that_ends_a_statement_is_no_damage(tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / DATABASE_FILE, timeout=0)
    with (
        Storage.open_in(tmp_path),
        exclusive_lock(tmp_path / DATABASE_FILE),
        pytest.raises(BusyError) as raised,
        translate_errors("sqlite:///x"),
    ):
        holder.execute("DELETE FROM meta")
    assert raised.value.hint
    assert "backup" not in raised.value.hint


@pytest.mark.postgresql
@pytest.mark.usefixtures("quick")
def test_a_lock_in_postgresql_is_waited_for_and_its_session_named(
    postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres.database()
    with Storage(url) as storage, Database(url) as database:
        storage.put_settings({"n": 1})
        with database.engine.connect() as holder:
            session = holder.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            holder.exec_driver_sql("SELECT * FROM meta FOR UPDATE")
            with caplog.at_level(logging.WARNING, logger="fedprune"), wait_hook(after(2, holder.rollback)):
                storage.put_settings({"n": 2})
        assert storage.settings() == {"n": 2}
        assert f"session {session} " in caplog.records[0].getMessage()
        with storage.database.read_transaction() as reader, database.read_transaction() as second_reader:
            assert reader.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
            assert second_reader.exec_driver_sql("SHOW lock_timeout").scalar() != "0"


def test_who_waits_for_a_database_that_is_away_shows_that_it_lives_and_can_be_stopped() -> None:
    pytest.importorskip("psycopg")
    with Database("postgresql+psycopg://fedprune@127.0.0.1:1/none") as away, wait_hook(fail), pytest.raises(EndedError):
        away.read(lambda connection: connection.exec_driver_sql("SELECT 1"))


@pytest.mark.parametrize(("device", "sure"), [("own", True), ("another", False)])
def test_a_holder_is_named_for_sure_where_device_and_number_of_the_file_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, sure: bool
) -> None:
    path, locks, parent = tmp_path / "file", tmp_path / "locks", os.getppid()
    path.touch()
    status = path.stat()
    other_device = f"fff:ff:{status.st_ino}"
    own_device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = [f"1: POSIX  ADVISORY  WRITE 1 {other_device} 0 EOF"] if sure else []
    lines.append(f"2: POSIX  ADVISORY  WRITE {parent} {own_device if device == 'own' else other_device} 0 EOF")
    locks.write_text("\n".join(lines))
    monkeypatch.setattr(lock_holders, "LOCK_LIST", locks)
    (holder,) = file_lock_holders(path)
    assert f"process {parent}" in holder
    assert holder.startswith("process") is sure


@pytest.mark.parametrize(
    "secret", ["postgresql://ann:hunter2@db/fleet", "--alert-webhook=https://hooks/hunter2", "host=h password=hunter2"]
)
@pytest.mark.parametrize("before", [[], ["--state", "/deep" * 40]])
def test_a_command_is_shown_without_secrets(before: list[str], secret: str) -> None:
    text = command_text(["psql", *before, secret])
    assert text.startswith("psql ")
    assert "hunter2" not in text
