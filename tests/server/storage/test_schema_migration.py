"""Databases of older versions: migrated as a whole, with a copy beside them; those of later ones are refused."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sql
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fedprune.coordination import State
from fedprune.core.errors import StorageError, StorageFullError
from fedprune.jobs.state import Device, Task
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.storage import schema_migration
from fedprune_server.storage.migrations import versions
from fedprune_server.storage.storage import FILE, Storage
from fedprune_server.storage.tables import (
    ANSWERS,
    CLAIMS,
    DEVICES,
    EPOCHS,
    MEMBERS,
    META,
    PARTICIPANTS,
    REGISTER,
    ROLLOUT_BOARDS,
    ROLLOUTS,
    ROUNDS,
    TABLES,
    TASKS,
    encoded,
)
from support.fakes.stored_job import filled

STEP = """
import sqlalchemy as sql
from alembic import op

revision = "9999"
down_revision = "{latest}"


def upgrade():
    op.add_column("rounds", sql.Column("colour", sql.String(8), nullable=False, server_default="red"))
"""


COLUMNS = ("kind", "key", "body")
FIRST_NAMES = {
    "last_counted_round": "last",
    "last_offered_round": "asked",
    "missed_rounds": "cut",
    "in_summary": "told",
    "first_report": "begun",
    "latest_report": "heard",
    "target_updates": "wanted",
    "opened_at": "opened",
    "wake_times": "wakes",
    "upload_workers": "receivers",
}


def write_older(folder: Path) -> list[str]:
    """A state folder's database, which is an older one as long as `latest` is patched; returns what is in it."""
    with Storage.at(folder) as storage:
        storage.put_settings({"job": {"name": "job"}})
    return dump(folder / FILE)


def dump(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as connection:
        return list(connection.iterdump())


def differences(url: str) -> list[object]:
    engine = sql.create_engine(url)
    try:
        with engine.connect() as connection:
            return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), TABLES))
    finally:
        engine.dispose()


def test_a_new_database_has_the_tables_that_the_program_knows(url: str) -> None:
    Storage(url).close()
    assert differences(url) == []


def test_the_steps_lead_from_nothing_to_those_tables(url: str) -> None:
    """A new database is made at once; what Alembic would make step by step is the same."""
    config = schema_migration._config()
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()
    assert differences(url) == []


def test_tables_of_another_program_are_let_alone(url: str) -> None:
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE devices (id INTEGER PRIMARY KEY)")
    for _ in range(2):
        with pytest.raises(StorageError):
            Storage(url)
        assert sql.inspect(engine).get_table_names() == ["devices"]
    engine.dispose()


def test_revisions_are_those_that_alembic_walks(url: str) -> None:
    walked = ScriptDirectory.from_config(schema_migration._config()).walk_revisions()
    assert schema_migration._revisions() == tuple(step.revision for step in walked)
    Storage(url).close()
    engine = sql.create_engine(url)
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


def test_a_step_brings_a_database_of_an_older_version_along(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Storage(url) as storage:
        storage.put_settings({"job": {"name": "job"}})
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "revision_9999.py").write_text(STEP.format(latest=schema_migration.latest()))
    folders = [*versions.__path__, str(tmp_path / "steps")]
    config = schema_migration._config()
    config.set_main_option("version_locations", os.pathsep.join(folders))
    monkeypatch.setattr(versions, "__path__", folders)
    monkeypatch.setattr(schema_migration, "_config", lambda: config)
    schema_migration._revisions.cache_clear()
    try:
        with Storage(url) as storage:
            assert storage.settings() == {"job": {"name": "job"}}
            columns = sql.inspect(storage.database.engine).get_columns("rounds")
            assert "colour" in {c["name"] for c in columns}
        Storage(url).close()
    finally:
        schema_migration._revisions.cache_clear()


def test_the_file_is_laid_aside_before_it_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, older = write_older(tmp_path), schema_migration.latest()
    migrate = schema_migration.migrate

    def spoil(connection: sql.Connection, found: str | None) -> None:
        migrate(connection, found)
        connection.exec_driver_sql("DROP TABLE rounds")
        raise StorageError("power cut")

    monkeypatch.setattr("fedprune_server.storage.storage.latest", lambda: "9999")
    monkeypatch.setattr("fedprune_server.storage.storage.migrate", spoil)
    with pytest.raises(StorageError, match="power cut"):
        Storage.at(tmp_path)
    copy = tmp_path / f"{FILE}.revision-{older}"
    assert dump(copy) == before
    assert dump(tmp_path / FILE) == before
    assert copy.stat().st_mode & 0o777 == 0o600


def test_nothing_is_migrated_where_the_copy_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_older(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedprune_server.storage.storage.latest", lambda: "9999")
    monkeypatch.setattr("fedprune_server.storage.database._copy_pages", full)
    with pytest.raises(StorageFullError):
        Storage.at(tmp_path)
    assert dump(tmp_path / FILE) == before
    assert not list(tmp_path.glob(".*"))


def test_whoever_only_looks_migrates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_older(tmp_path)
    found = schema_migration.latest()
    monkeypatch.setattr("fedprune_server.storage.storage.latest", lambda: "9999")
    with pytest.raises(StorageError, match=rf"older version: expected revision 9999.*got {found}\. Start the server"):
        Storage.existing(tmp_path)
    assert Storage.settings_in(tmp_path) == {"job": {"name": "job"}}
    assert dump(tmp_path / FILE) == before


def test_a_later_versions_database_is_refused_and_left_alone(url: str) -> None:
    Storage(url).close()
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("DROP TABLE events")
    for create in (True, False):
        with pytest.raises(StorageError, match=r"a later version: .*got 9999\. Install that version"):
            Storage(url, create=create)
    assert "events" not in sql.inspect(engine).get_table_names()
    engine.dispose()


def set_back(connection: sql.Connection, number: str, shared: Sequence[tuple[str, str, str]] = ()) -> None:
    """Give a database the tables of a revision before 0003, with these rows of the table `identity`."""
    connection.exec_driver_sql("ALTER TABLE rounds DROP COLUMN participants")
    for table in (PARTICIPANTS, ROLLOUT_BOARDS, MEMBERS, CLAIMS, ANSWERS, EPOCHS, REGISTER):
        table.drop(connection)
    connection.exec_driver_sql("ALTER TABLE rollouts ADD COLUMN reports TEXT NOT NULL DEFAULT '{}'")
    connection.exec_driver_sql("CREATE TABLE identity (kind VARCHAR(16), key VARCHAR(256), body TEXT)")
    for row in shared:
        connection.execute(
            sql.text("INSERT INTO identity VALUES (:kind, :key, :body)"), dict(zip(COLUMNS, row, strict=True))
        )
    connection.execute(sql.text("UPDATE alembic_version SET version_num = :number"), {"number": number})


def test_what_servers_shared_of_their_members_stays(url: str) -> None:
    claim = ["c1", "0a0b", None, 1, 9, "d1", 4]
    shared = [
        ("device", "pi-1 aa", '["pi-1","aa","revoked",1,2]'),
        ("device", "pi-2 bb", '["pi-2","bb","approved",1,2]'),
        ("device", "pi-3 cc", '["pi-3","cc","waiting",5,null]'),
        ("claim", "c1", json.dumps(claim)),
        ("epoch", "bb up", '["bb","up",1790000000000]'),
        ("register", "e3", '"{\\"line\\":1}"'),
        ("earlier key", "k1", '"0b"'),
        ("earlier issuer", "p1", '""'),
    ]
    with Storage(url) as storage, storage.database.writing() as connection:
        set_back(connection, "0002", shared)
    with Storage(url) as storage:
        store = IdentityStore(storage.database)
        assert [(d.device, d.key, d.status, d.asked) for d in store.devices()] == [
            ("pi-1", "aa", "revoked", 1), ("pi-2", "bb", "approved", 1), ("pi-3", "cc", "waiting", 5),
        ]  # fmt: skip
        assert store.heard() == {"bb": {"up": 1_790_000_000_000}}
        assert store.earlier_keys() == {"keys": ["k1"], "authorities": ["p1"]}
        assert store.exchange(['{"line":1}'], 0) == (['{"line":1}'], 1)
        with storage.database.transaction() as connection:
            assert [tuple(r) for r in connection.execute(sql.select(CLAIMS))] == [("c1", b"\x0a\x0b", *claim[2:])]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("device", '["pi-1","aa","gone",1,2]'),
        ("device", '["pi-1","aa"]'),
        ("claim", '["c1",null,null,1,9,null,null]'),
        ("epoch", "{"),
        ("register", "1"),
        ("strange", "[]"),
    ],
)
def test_a_damaged_row_of_shared_members_is_not_forgotten(tmp_path: Path, kind: str, body: str) -> None:
    with Storage.at(tmp_path) as storage, storage.database.writing() as connection:
        set_back(connection, "0002", [(kind, "k", body)])
    before = dump(tmp_path / FILE)
    with pytest.raises(StorageError, match="damaged"):
        Storage.at(tmp_path)
    assert dump(tmp_path / FILE) == before


def test_a_state_of_the_first_revision_is_read(url: str) -> None:
    kept = {"contribution": {"part": {"last_counted_round": 2}}}
    device = Device(1, True, {"name": "pi"}, None, 5, buffer=kept, last_offered_round=4, missed_rounds=1)
    task = Task(1, (8,), last_counted_round=3, in_summary=True, first_report=[1.0, 0.0], latest_report=[2.0, 0.5])
    state = State("m" * 64, 4, target_updates=2, opened_at=1.0, wake_times=[9.0])
    state.devices["pi"], state.tasks["pi"], state.history = device, task, filled().history
    settings = {"job": {"name": "job"}, "server": {"upload_workers": 2}}
    with Storage(url) as storage:
        storage.put_settings(settings)
        storage.save(state, [], 0.0)
        with storage.database.writing() as connection:
            for new, old in FIRST_NAMES.items():
                for column in (DEVICES.c.body, TASKS.c.body, META.c.value):
                    older = sql.func.replace(column, f'"{new}":', f'"{old}":')
                    connection.execute(sql.update(column.table).values({column: older}))
            for summary in state.history:
                connection.execute(ROUNDS.update().values(summary=encoded(summary)))
            set_back(connection, "0001")
            old = {"number": 1, "at": 1.0, "release": 7, "offer": b"x", "joins": True, "phase": "running", "changes": 1}
            head, boards = {"stage": 0}, {"pi": {"stage": 0}, "quiet": {"stage": 0}}
            connection.execute(ROLLOUTS.insert().values(**old, rollout=encoded(head | {"boards": boards})))
            connection.execute(sql.text("UPDATE rollouts SET reports = :text"), {"text": '{"pi":{"state":"trial"}}'})
    with Storage(url) as storage:
        with storage.database.reading() as connection:
            assert connection.execute(sql.select(ROLLOUTS.c.rollout)).scalar() == encoded(head)
            rows = {row.device: (row.body, row.report) for row in connection.execute(sql.select(ROLLOUT_BOARDS))}
        assert rows == {"pi": ('{"stage":0}', '{"state":"trial"}'), "quiet": ('{"stage":0}', None)}
        assert storage.load() == state
        assert storage.incomplete_rounds() == []
        assert IdentityStore(storage.database).empty
        assert storage.settings() == settings


def test_each_revision_follows_one_other() -> None:
    revisions = schema_migration._revisions()
    assert sorted(revisions, reverse=True) == list(revisions)
