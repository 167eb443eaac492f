"""Databases of older versions: migrated as a whole, with a copy beside them; those of later ones are refused."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sql
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination import events as on
from fedprune.core.errors import StorageError, StorageFullError
from fedprune_server.storage import schema_migration
from fedprune_server.storage.storage import FILE, FORMAT, Storage
from fedprune_server.storage.tables import TABLES
from support.paths import TESTS
from support.processes.postgres import Postgres

# What the first version made, word for word; never to be changed.
FIRST_TABLES = """
CREATE TABLE meta (key VARCHAR(64) NOT NULL, value TEXT NOT NULL, PRIMARY KEY (key));
CREATE TABLE events (number INTEGER NOT NULL, at FLOAT NOT NULL, type VARCHAR(64) NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (number));
CREATE TABLE devices (name VARCHAR(64) NOT NULL, online BOOLEAN NOT NULL, profile VARCHAR(64) NOT NULL,
    samples BIGINT NOT NULL, widths TEXT NOT NULL, "plan" TEXT NOT NULL, excluded TEXT NOT NULL, body TEXT NOT NULL,
    bytes_down BIGINT NOT NULL, bytes_up BIGINT NOT NULL, PRIMARY KEY (name));
CREATE TABLE rounds (round INTEGER NOT NULL, at FLOAT NOT NULL, model VARCHAR(64) NOT NULL, metrics TEXT NOT NULL,
    summary TEXT NOT NULL, PRIMARY KEY (round));
"""
FIRST_POSTGRESQL = FIRST_TABLES.replace("number INTEGER", "number SERIAL")


def first_rows() -> list[tuple[str, dict[str, object]]]:
    """What it wrote for a job in its first round."""
    return json.loads((TESTS / "server" / "storage" / "first_store.json").read_text())  # type: ignore[no-any-return]


def insert(table: str, row: dict[str, object]) -> sql.TextClause:
    return sql.text(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(f':{n}' for n in row)})")  # noqa: S608


def write_first(folder: Path) -> None:
    """A state folder's database as the first version left it."""
    connection = sqlite3.connect(folder / FILE)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript(FIRST_TABLES)
    for table, row in first_rows():
        connection.execute(str(insert(table, row)), row)
    connection.commit()
    connection.close()


def differences(url: str) -> list[object]:
    engine = sql.create_engine(url)
    try:
        with engine.connect() as connection:
            return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), TABLES))
    finally:
        engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / FILE}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()


@pytest.fixture
def first(empty: str) -> str:
    """The URL of a database that the first version left."""
    if empty.startswith("sqlite"):
        write_first(Path(empty.removeprefix("sqlite:///")).parent)
    else:
        engine = sql.create_engine(empty)
        with engine.begin() as connection:
            for statement in FIRST_POSTGRESQL.split(";"):
                if statement.strip():
                    connection.exec_driver_sql(statement)
            for table, row in first_rows():
                row = row | ({"online": bool(row["online"])} if "online" in row else {})
                connection.execute(insert(table, row), row)
            connection.exec_driver_sql("SELECT setval('events_number_seq', (SELECT max(number) FROM events))")
        engine.dispose()
    return empty


def test_a_new_database_has_the_tables_that_the_program_knows(empty: str) -> None:
    Storage(empty).close()
    assert differences(empty) == []


def test_the_steps_lead_from_nothing_to_those_tables(empty: str) -> None:
    """A new database is made at once; what Alembic would make step by step is the same."""
    config = schema_migration._config()
    engine = sql.create_engine(empty)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()
    assert differences(empty) == []


def test_tables_of_another_program_are_let_alone(empty: str) -> None:
    engine = sql.create_engine(empty)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE devices (id INTEGER PRIMARY KEY)")
    for _ in range(2):
        with pytest.raises(StorageError):
            Storage(empty)
        assert sql.inspect(engine).get_table_names() == ["devices"]
    engine.dispose()


def test_revisions_are_those_that_alembic_walks(empty: str) -> None:
    walked = ScriptDirectory.from_config(schema_migration._config()).walk_revisions()
    assert schema_migration._revisions() == tuple(step.revision for step in walked)
    Storage(empty).close()
    engine = sql.create_engine(empty)
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == schema_migration.latest()
    engine.dispose()


def test_a_server_starts_without_alembic(tmp_path: Path) -> None:
    """Both on a new database and on one that is there."""
    code = f"""
import sys
from fedprune_server.storage.storage import Storage
for _ in range(2):
    Storage("sqlite:///{tmp_path / FILE}").close()
assert "alembic" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_first_versions_database_gets_them_too(first: str) -> None:
    with Storage(first):
        pass
    assert differences(first) == []


def test_a_job_goes_on_where_the_first_version_left_it(first: str) -> None:
    with Storage(first) as storage:
        state, events = storage.load(), list(storage.log.events())
        assert state is not None
        rows = first_rows()
        old = json.loads(str(next(r["value"] for t, r in rows if t == "meta" and r["key"] == "state")))
        assert (state.round, state.phase.value, state.model) == (old["round"], old["phase"], old["model"])
        assert sorted(state.tasks) == sorted(old["tasks"])
        assert state.history == [json.loads(str(r["summary"])) for t, r in rows if t == "rounds"]
        assert {n: d.samples for n, d in state.devices.items()} == {
            r["name"]: r["samples"] for t, r in rows if t == "devices"
        }
        assert [kind for _, _, kind, _ in events] == ["DeviceBorn"]
        assert storage.settings() == {"job": {"name": "job"}}
        assert storage.traffic()["a"] == (7, 8)
        state.round += 1
        storage.save(state, [on.DeviceBorn("z", 1, {"name": "board"}, 10)], 9.0)
        assert storage.load() == state
        assert [n for n, _, _, _ in storage.log.events()] == [1, 2]


def test_the_file_is_laid_aside_before_it_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_first(tmp_path)
    migrate = schema_migration.migrate

    def spoil(connection: sql.Connection, found: str | None) -> None:
        migrate(connection, found)
        connection.exec_driver_sql("DROP TABLE rounds")
        raise StorageError("power cut")

    monkeypatch.setattr("fedprune_server.storage.storage.latest", lambda: "9999")
    monkeypatch.setattr("fedprune_server.storage.storage.migrate", spoil)
    before = list(sqlite3.connect(tmp_path / FILE).iterdump())
    with pytest.raises(StorageError, match="power cut"):
        Storage.at(tmp_path)
    copy = tmp_path / f"{FILE}.revision-0001"
    assert list(sqlite3.connect(copy).iterdump()) == before
    assert list(sqlite3.connect(tmp_path / FILE).iterdump()) == before
    assert copy.stat().st_mode & 0o777 == 0o600


def test_nothing_is_migrated_where_the_copy_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_first(tmp_path)
    before = list(sqlite3.connect(tmp_path / FILE).iterdump())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedprune_server.storage.storage.latest", lambda: "9999")
    monkeypatch.setattr("fedprune_server.storage.database._copy_pages", full)
    with pytest.raises(StorageFullError):
        Storage.at(tmp_path)
    assert list(sqlite3.connect(tmp_path / FILE).iterdump()) == before
    assert not list(tmp_path.glob(".*"))


def test_whoever_only_looks_migrates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_first(tmp_path)
    before = list(sqlite3.connect(tmp_path / FILE).iterdump())
    monkeypatch.setattr("fedprune_server.storage.storage.latest", lambda: "9999")
    with pytest.raises(StorageError, match=r"older version: expected revision 9999.*got 0001\. Start the server"):
        Storage.existing(tmp_path)
    assert Storage.settings_in(tmp_path) == {"job": {"name": "job"}}
    assert list(sqlite3.connect(tmp_path / FILE).iterdump()) == before


def test_a_later_versions_database_is_refused_and_left_alone(empty: str) -> None:
    Storage(empty).close()
    engine = sql.create_engine(empty)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("DROP TABLE events")
    for create in (True, False):
        with pytest.raises(StorageError, match=r"a later version: .*got 9999\. Install that version"):
            Storage(empty, create=create)
    assert "events" not in sql.inspect(engine).get_table_names()
    engine.dispose()


@settings(max_examples=20, deadline=None)
@given(st.text(min_size=1, max_size=20).filter(lambda t: t != FORMAT and "\0" not in t and t.isprintable()))
def test_a_format_that_was_never_written_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("format")
    write_first(folder)
    connection = sqlite3.connect(folder / FILE)
    connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (text,))
    connection.commit()
    connection.close()
    with pytest.raises(StorageError, match="another version"):
        Storage.at(folder)


def test_each_revision_follows_one_other() -> None:
    revisions = schema_migration._revisions()
    assert sorted(revisions, reverse=True) == list(revisions)
    assert revisions[-1] == schema_migration.FIRST
