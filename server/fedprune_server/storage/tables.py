"""The tables of the server's database, and how devices and rounds become their rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from typing import Any, Generic, TypeVar

import sqlalchemy as sql
from sqlalchemy.dialects import sqlite

from fedprune.core.errors import StorageError
from fedprune.jobs.change_tracking import TrackedDict, TrackedEntry
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import DeviceTask, JobDevice

# Maximum number of profiles whose text is cached: a fleet has few kinds of boards.
_MAX_PROFILE_TEXTS = 256

# Rows that are read at a time: a large fleet's table is more than memory should hold.
_PAGE_ROWS = 1000

TABLES = sql.MetaData()
META = sql.Table(
    "meta", TABLES, sql.Column("key", sql.String(64), primary_key=True), sql.Column("value", sql.Text, nullable=False)
)
EVENTS = sql.Table(
    "events",
    TABLES,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("type", sql.String(64), nullable=False),
    sql.Column("body", sql.Text, nullable=False),
)
DEVICES = sql.Table(
    "devices",
    TABLES,
    sql.Column("name", sql.String(64), primary_key=True),
    sql.Column("online", sql.Boolean, nullable=False),
    sql.Column("profile", sql.String(64), nullable=False),
    sql.Column("samples", sql.BigInteger, nullable=False),
    sql.Column("widths", sql.Text, nullable=False),
    sql.Column("plan", sql.Text, nullable=False),
    sql.Column("excluded", sql.Text, nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("bytes_down", sql.BigInteger, nullable=False, default=0),
    sql.Column("bytes_up", sql.BigInteger, nullable=False, default=0),
)
TASKS = sql.Table(
    "tasks", TABLES, sql.Column("name", sql.String(64), primary_key=True), sql.Column("body", sql.Text, nullable=False)
)
ROUNDS = sql.Table(
    "rounds",
    TABLES,
    sql.Column("round", sql.Integer, primary_key=True),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("model", sql.String(64), nullable=False),
    sql.Column("metrics", sql.Text, nullable=False),
    sql.Column("summary", sql.Text, nullable=False),
    sql.Column("participants", sql.Integer, nullable=False, server_default="0"),
)

# Each device's outcome in the finished rounds.
PARTICIPANTS = sql.Table(
    "participants",
    TABLES,
    sql.Column("round", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("device", sql.String(64), primary_key=True),
    sql.Column("body", sql.Text, nullable=False),
)

# Rollouts of the whole site (`fedprune_server.ota.store`), in the database of a server's first job.
ROLLOUTS = sql.Table(
    "rollouts",
    TABLES,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("release", sql.BigInteger, nullable=False),
    sql.Column("offer", sql.LargeBinary, nullable=False),
    sql.Column("joins", sql.Boolean, nullable=False),
    sql.Column("phase", sql.String(16), nullable=False),
    sql.Column("rollout", sql.Text, nullable=False),
    sql.Column("wish", sql.Text),
    sql.Column("hold", sql.Text),
    sql.Column("prior", sql.Integer),
    sql.Column("leaves", sql.BigInteger),
    sql.Column("changes", sql.Integer, nullable=False, default=1),
)

# Each board's part in a rollout, and its last report: a report changes only its own row.
ROLLOUT_BOARDS = sql.Table(
    "rollout_boards",
    TABLES,
    sql.Column("rollout", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("device", sql.String(64), primary_key=True),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("report", sql.Text),
)

# Keys that asked to be devices of the site (`fedprune_server.enrollment.store`), in the database of a server's first
# job, as are the next four tables.
MEMBERS = sql.Table(
    "members",
    TABLES,
    sql.Column("device", sql.String(64), primary_key=True),
    sql.Column("key", sql.String(64), primary_key=True, index=True),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("asked", sql.BigInteger, nullable=False),
    sql.Column("decided", sql.BigInteger),
)

CLAIMS = sql.Table(
    "claims",
    TABLES,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("key", sql.LargeBinary, nullable=False),
    sql.Column("device", sql.String(64)),
    sql.Column("made", sql.BigInteger, nullable=False),
    sql.Column("expires", sql.BigInteger, nullable=False),
    sql.Column("used", sql.String(64)),
    sql.Column("used_at", sql.BigInteger),
)
ANSWERS = sql.Table(
    "answers",
    TABLES,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("request", sql.String(64), nullable=False, unique=True),
    sql.Column("device", sql.String(64), nullable=False, index=True),
    sql.Column("answer", sql.LargeBinary, nullable=False),
)
EPOCHS = sql.Table(
    "epochs",
    TABLES,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("stream", sql.String(512), primary_key=True),
    sql.Column("epoch", sql.BigInteger, nullable=False),
)

# Certificates of members. They are revoked with the member, by its row. `tls_key` is the sha256 of a
# certificate's public key, `key` the member's verifying key.
CERTIFICATES = sql.Table(
    "certificates",
    TABLES,
    sql.Column("tls_key", sql.String(64), primary_key=True),
    sql.Column("device", sql.String(64), nullable=False),
    sql.Column("key", sql.String(64), nullable=False),
    sql.Column("serial", sql.String(40), nullable=False),
    sql.Column("ends", sql.BigInteger, nullable=False),
    sql.Column("pem", sql.Text, nullable=False),
    sql.Index("certificates_member", "device", "key"),
)


class DeviceRows:
    """Makes devices' rows, except their traffic. Profile, probe and plan are most of a row and change seldom, so that
    their texts are not encoded again for each row."""

    def __init__(self) -> None:
        self._profile_texts: dict[int, tuple[Mapping[str, Any], str]] = {}

    def row(self, name: str, device: JobDevice) -> dict[str, Any]:
        quick_fields = {
            key: getattr(device, key) for key in device.__match_args__ if key not in ("profile", "probe", "plan")
        }
        plan, probe = _json_text(device.plan), _json_text(device.probe)
        slow_fields = f'"plan":{plan},"probe":{probe},"profile":{self._profile_text(device.profile)}'
        return {
            "name": name,
            "online": device.online,
            "profile": str(device.profile.get("name", "")),
            "samples": device.samples,
            "widths": json_column(list(device.widths)),
            "plan": plan,
            "excluded": device.excluded,
            "body": f"{json_column(quick_fields)[:-1]},{slow_fields}}}",
        }

    def _profile_text(self, body: Mapping[str, Any]) -> str:
        """A profile as text, which is cached by the object's id, because boards of one kind share the object."""
        cached = self._profile_texts.get(id(body))
        if cached is None:
            if len(self._profile_texts) >= _MAX_PROFILE_TEXTS:
                self._profile_texts.clear()
            # The entry holds the object, so that its id stays its own.
            cached = self._profile_texts[id(body)] = body, json_column(body)
        return cached[1]


def _json_text(body: Mapping[str, Any] | None) -> str:
    return body.text if isinstance(body, PackedJson) else json_column(body)


def task_row(name: str, task: DeviceTask) -> dict[str, Any]:
    return {"name": name, "body": json_column(task.to_dict())}


def finished_round_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A finished round's row, from the coordinator's summary, without its participants."""
    return {
        "round": summary["round"],
        "at": summary["at"],
        "model": summary["model"],
        "metrics": json_column(summary["metrics"]),
        "summary": json_column({key: value for key, value in summary.items() if key != "devices"}),
        "participants": len(summary["devices"]),
    }


def participant_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    outcomes = summary["devices"].items()
    return [{"round": summary["round"], "device": name, "body": json_column(outcome)} for name, outcome in outcomes]


def upsert(connection: sql.Connection, table: sql.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or update those with the same primary key. Columns that the rows don't name stay as they are."""
    if rows:
        connection.execute(_upsert(connection.dialect.name, table, tuple(rows[0])), list(rows))


def insert_new(connection: sql.Connection, table: sql.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, except those whose primary key exists already."""
    if rows:
        connection.execute(_insert(connection.dialect.name, table).on_conflict_do_nothing(), list(rows))


def _insert(dialect: str, table: sql.Table) -> Any:
    """An insert that can have a clause about conflicts."""
    if dialect == "sqlite":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # takes 2 MB, which a server with SQLite does without

    return postgresql.insert(table)


@cache
def _upsert(dialect: str, table: sql.Table, columns: tuple[str, ...]) -> sql.Insert:
    """The statement of `upsert`. Cached, because making it takes five times as long as executing it."""
    query = _insert(dialect, table)
    keys = [c.name for c in table.primary_key]
    other_columns = {name: query.excluded[name] for name in columns if name not in keys}
    statement: sql.Insert = query.on_conflict_do_update(index_elements=keys, set_=other_columns)
    return statement


_SELECT_META = sql.select(META.c.value).where(META.c.key == sql.bindparam("name"))


def read_meta(connection: sql.Connection, key: str) -> str | None:
    """A value of the table `meta`."""
    value = connection.execute(_SELECT_META, {"name": key}).scalar()
    return None if value is None else str(value)


def put_meta(connection: sql.Connection, key: str, value: str) -> None:
    upsert(connection, META, [{"key": key, "value": value}])


def json_column(value: object) -> str:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_json_column(text: str, url: str) -> Any:
    """Read what `json_column` wrote. Raises `StorageError`, which names the database, if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{url}: a row is damaged ({error})", hint="Restore the server's backup.") from error


E = TypeVar("E", bound=TrackedEntry)
Row = dict[str, Any]


class TrackedTable(Generic[E]):
    """Mirrors a `TrackedDict` in a table, whose rows have a column `name` and are compared by their column `body`."""

    def __init__(self, table: sql.Table, row: Callable[[str, E], Row]) -> None:
        self._table = table
        self._row = row

    def load(self, connection: sql.Connection, url: str) -> Generator[tuple[str, Any], None, None]:
        """Names and bodies of all rows, one by one: all of them may be more than memory should hold."""
        with self._rows(connection) as rows:
            for name, body in rows:
                yield name, read_json_column(body, url)

    def changed_rows(self, entries: TrackedDict[E]) -> dict[str, Row | None]:
        """Rows of changed entries that differ from the saved ones; None for rows to delete."""
        rows: dict[str, Row | None] = {}
        for name in entries.changed:
            entry = entries.get(name)
            row = None if entry is None else self._row(name, entry)
            if entry is None or row is None or entry.saved != hash(row["body"]):
                rows[name] = row
        return rows

    def hashes(self, connection: sql.Connection) -> dict[str, int]:
        """Hashes of all rows' bodies, by name."""
        with self._rows(connection) as rows:
            return {name: hash(body) for name, body in rows}

    def differing_rows(self, entries: TrackedDict[E], stored_hashes: Mapping[str, int]) -> dict[str, Row | None]:
        """Rows of all entries that differ from the table, whose `hashes` are given; None for rows to delete."""
        rows: dict[str, Row | None] = dict.fromkeys(stored_hashes.keys() - entries.keys())
        for name, entry in entries.items():
            row = self._row(name, entry)
            entry.note_saved(row["body"])
            if stored_hashes.get(name) != entry.saved:
                rows[name] = row
        return rows

    def write(self, connection: sql.Connection, rows: Mapping[str, Row | None]) -> None:
        """Write rows that `changed_rows` or `differing_rows` returned."""
        upsert(connection, self._table, [row for row in rows.values() if row is not None])
        deleted_names = [{"gone": name} for name, row in rows.items() if row is None]
        if deleted_names:
            connection.execute(self._table.delete().where(self._table.c.name == sql.bindparam("gone")), deleted_names)

    def note_written(self, entries: TrackedDict[E], rows: Mapping[str, Row | None]) -> None:
        """Note that the rows are committed."""
        for name, row in rows.items():
            if row is not None:
                entries[name].note_saved(row["body"])

    def _rows(self, connection: sql.Connection) -> sql.CursorResult[str, str]:
        columns = self._table.c
        return connection.execute(sql.select(columns.name, columns.body).execution_options(yield_per=_PAGE_ROWS))
