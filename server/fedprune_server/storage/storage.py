"""A job's database: its state, a log of its events, and tables of devices and rounds to query.

Every event is saved together with the state that it led to, in one transaction, before any of its commands is carried
out. So everything that was done had been saved, and everything that was saved can be done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sql

from fedprune.coordination import State
from fedprune.coordination.events import Event
from fedprune.core.closeable import Closeable
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError, search_location
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import EVICTED_ATTRIBUTES, DeviceTask, JobDevice
from fedprune_device.storage.directory_owner import check_unowned
from fedprune_server.storage.database import Database
from fedprune_server.storage.event_log import MIN_LOGGED_EVENTS, EventLog
from fedprune_server.storage.folder_layout import DATABASE_FILE, URL_FILE, database_url, has_database
from fedprune_server.storage.open_database import has_tables, open_tables, private_url, sqlite_url
from fedprune_server.storage.tables import (
    DEVICES,
    PARTICIPANTS,
    ROUNDS,
    TASKS,
    DeviceRows,
    TrackedTable,
    finished_round_row,
    json_column,
    participant_rows,
    put_meta,
    read_json_column,
    read_meta,
    task_row,
)

_SELECT_DEVICE = sql.select(DEVICES.c.body).where(DEVICES.c.name == sql.bindparam("name"))
_UPDATE_TRAFFIC = (
    DEVICES.update()
    .where(DEVICES.c.name == sql.bindparam("_name"))
    .values(bytes_down=sql.bindparam("_down"), bytes_up=sql.bindparam("_up"))
)


# Maximum number of devices' parts in finished rounds that a running server keeps in memory; all are in the database.
MAX_PARTS_IN_MEMORY = 10_000

# Payload bytes by device: to it and from it.
Traffic = Mapping[str, tuple[int, int]]

# Rows to write by name, or None for those to delete.
Rows = Mapping[str, dict[str, Any] | None]

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


# Number of absent devices that stay in memory, those that left last: most devices that come back do so soon.
MAX_AWAY_IN_MEMORY = 1000


def _retry_while_away(
    method: Callable[Concatenate[Storage, _P], _Result],
) -> Callable[Concatenate[Storage, _P], _Result]:
    """Decorate a method of one transaction: it is repeated while the database is away or locked."""

    @wraps(method)
    def call(self: Storage, /, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
        return self.database.retry_while_away(lambda: method(self, *args, **kwargs))

    return call


class Storage(Closeable):
    """A job's database, given as a URL of SQLAlchemy such as `sqlite:////var/lib/fedprune/server.db`. Raises
    `StorageError` if the database is damaged, of another version or can't be opened, and `StorageFullError` if there is
    no room for it.

    Missing tables are made; without `create` the database is opened read-only. The log keeps at least `logged` events.
    `url` is the file, or the URL without a password, for messages."""

    def __init__(self, url: str, *, create: bool = True, logged: int = MIN_LOGGED_EVENTS) -> None:
        self._saved: State | None = None
        self._saved_state = ""
        self._saved_rounds = 0
        self._devices = TrackedTable[JobDevice](DEVICES, DeviceRows().row)
        self._tasks = TrackedTable[DeviceTask](TASKS, task_row)
        self._devices_away = DevicesAway(self._read_device)
        self._saved_unplanned: dict[str, Any] = {}
        self.database = open_tables(url, create=create, check=True)
        self.url = str(self.database.file or self.database.url)
        self.log = EventLog(self.database, logged)

    @classmethod
    def open_in(cls, folder: Path, database: str | None = None) -> Storage:
        """Open the database of a state folder, or the given one; it is created if it doesn't exist.

        Only its owner may read it, because the broker's address in it may hold a password.
        """
        return cls(private_url(folder, database))

    @classmethod
    def open_existing(cls, folder: Path) -> Storage:
        """Open the database of a state folder that a server has used, for reading. Raises `StorageError` if it is
        missing or this user may not read it, and as the constructor.
        """
        cls.check_existing(folder)
        storage = cls(database_url(folder), create=False)
        if storage.settings() is None:  # commands may have begun the database before the server
            storage.close()
            raise StorageError(f"{storage.url} holds no job yet", hint="Has a server been started on it?")
        return storage

    @classmethod
    def read_settings(cls, folder: Path, database: str | None = None) -> dict[str, Any] | None:
        """The settings of a state folder's job; None if there are none. Raises `StorageError` as `open_database`."""
        url = database_url(folder, database)
        if url == sqlite_url(folder) and not (folder / DATABASE_FILE).is_file():
            return None
        with Database(url, read_only=True) as opened, opened.read_transaction() as connection:
            if not has_tables(connection, opened.url):
                return None
            text = read_meta(connection, "settings")
        return None if text is None else dict(read_json_column(text, opened.url))

    @staticmethod
    def check_existing(folder: Path) -> None:
        """Check that a server has used a folder. Raises `StorageError` if none has, or this user may not read it."""
        path = folder / (URL_FILE if (folder / URL_FILE).is_file() else DATABASE_FILE)
        with storage_errors(f"can't read {path}"):
            is_used = has_database(folder)
        if not is_used:
            check_unowned(folder)  # such a folder has an identity, too: the device's
        if not is_used and (folder / "identity/authority.key").exists():
            raise StorageError(
                f"no job has begun in {folder}: it holds an identity alone",
                hint=f"Begin one: fedprune-server run --state {folder} --model MODEL.",
            )
        if not is_used:
            raise StorageError(
                f"{folder} is no server's state folder",
                expected=f"a file {DATABASE_FILE} in it",
                hint=f"Give the folder that `fedprune-server run --state` used.{search_location(folder)}",
            )
        if not os.access(path, os.R_OK, effective_ids=True):
            raise StorageError(
                f"can't read {path}: permission denied",
                hint="Run the command as the server's user; the database may hold a broker's password.",
            )

    def close(self) -> None:
        self.database.close()

    def settings(self) -> dict[str, Any] | None:
        """The job's settings, or None."""
        with self.database.read_transaction() as connection:
            text = read_meta(connection, "settings")
        return None if text is None else dict(read_json_column(text, self.url))

    @_retry_while_away
    def put_settings(self, body: Mapping[str, Any]) -> None:
        """Store the job's settings, so that a server can continue from only the folder."""
        with self.database.fenced_transaction() as connection:
            put_meta(connection, "settings", json_column(body))

    def unplanned_devices(self) -> dict[str, dict[str, Any]]:
        """Devices that couldn't be planned for, with the reasons, by name."""
        with self.database.read_transaction() as connection:
            text = read_meta(connection, "outsiders")
        outsiders = read_json_column(text or "{}", self.url)
        self._saved_unplanned = outsiders
        return {str(name): dict(body) for name, body in outsiders.items()}

    @_retry_while_away
    def put_unplanned_devices(self, devices: Mapping[str, Mapping[str, Any]]) -> None:
        """Store the devices that can't be planned for, with the reasons, if they have changed."""
        if devices == self._saved_unplanned:
            return
        body = {name: dict(device) for name, device in devices.items()}
        with self.database.fenced_transaction() as connection:
            put_meta(connection, "outsiders", json_column(body))
        self._saved_unplanned = body

    @_retry_while_away
    def save(self, state: State, events: Sequence[Event], now: float, traffic: Traffic | None = None) -> bool:
        """Make events and the state after them durable, all or nothing; returns whether anything was written.

        Events that changed nothing are not written: their commands (another copy of an acknowledgement, say) follow
        from the state that is on the disk already. Traffic without other changes is written with the next change.

        Args:
            state: The state after the events; afterwards its changes count as saved.
            now: Time of the events, in seconds since 1970.
            traffic: Bytes so far by device, at least of those devices for which they have changed.
        """
        # Devices, tasks and finished rounds have tables of their own, so that an event doesn't rewrite all of them.
        body = replace(state, history=[], devices=TrackedDict(), tasks=TrackedDict()).to_json()
        is_unknown = state is not self._saved
        if is_unknown:
            with self.database.read_transaction() as connection:
                hashes = self._devices.hashes(connection), self._tasks.hashes(connection)
            devices = self._devices.differing_rows(state.devices, hashes[0])
            tasks = self._tasks.differing_rows(state.tasks, hashes[1])
        else:
            devices, tasks = self._devices.changed_rows(state.devices), self._tasks.changed_rows(state.tasks)
        new_rounds = state.history[self._saved_rounds :]
        has_changed = body != self._saved_state or bool(devices or tasks or new_rounds)
        if has_changed:
            with self.database.fenced_transaction() as connection:
                if body != self._saved_state:
                    put_meta(connection, "state", body)
                self.log.write(connection, events, now)
                self._devices.write(connection, devices)
                self._tasks.write(connection, tasks)
                traffic_rows = [
                    {"_name": name, "_down": down, "_up": up}
                    for name, (down, up) in (traffic or {}).items()
                    if name in state.devices
                ]
                if traffic_rows:
                    connection.execute(_UPDATE_TRAFFIC, traffic_rows)
                if new_rounds:
                    for table in (ROUNDS, PARTICIPANTS):
                        connection.execute(
                            table.delete().where(table.c.round.in_([summary["round"] for summary in new_rounds]))
                        )
                    connection.execute(ROUNDS.insert(), [finished_round_row(summary) for summary in new_rounds])
                    if participants := [row for summary in new_rounds for row in participant_rows(summary)]:
                        connection.execute(PARTICIPANTS.insert(), participants)
        self._devices.note_written(state.devices, devices)
        self._tasks.note_written(state.tasks, tasks)
        changed = state.devices.keys() if is_unknown else state.devices.changed
        self._devices_away.on_saved(state, changed, round_over=is_unknown or bool(new_rounds))
        self._saved, self._saved_state, self._saved_rounds = state, body, len(state.history)
        state.mark_saved()
        return has_changed

    def load(self) -> State | None:
        """The last saved state, or None for a new database.

        It has the results of all finished rounds, but devices only of the latest rounds, up to `MAX_PARTS_IN_MEMORY`
        parts.
        """
        with self.database.read_transaction() as connection:
            state_text = read_meta(connection, "state")
            if state_text is None:
                return None
            history = self._history(connection, MAX_PARTS_IN_MEMORY)
            with (
                closing(self._devices.load(connection, self.url)) as devices,
                closing(self._tasks.load(connection, self.url)) as tasks,
            ):
                state = State.from_json(state_text, devices, tasks)
        state.history = history
        self._saved_rounds = len(history)
        return state

    def rounds(self) -> list[dict[str, Any]]:
        """Summaries of the finished rounds, in order, as the coordinator wrote them."""
        with self.database.read_transaction() as connection:
            return self._history(connection)

    def incomplete_rounds(self) -> list[int]:
        """Rounds with fewer or more rows of participants than there were participants, as in a damaged database."""
        counts = sql.select(PARTICIPANTS.c.round, sql.func.count().label("n")).group_by(PARTICIPANTS.c.round).subquery()
        query = sql.select(ROUNDS.c.round).outerjoin(counts, counts.c.round == ROUNDS.c.round)
        with self.database.read_transaction() as connection:
            rows = connection.execute(query.where(ROUNDS.c.participants != sql.func.coalesce(counts.c.n, 0)))
            return [int(row.round) for row in rows]

    def devices(self) -> list[dict[str, Any]]:
        """The devices' rows by name, with `widths` and `plan` decoded."""
        with self.database.read_transaction() as connection:
            columns = [c for c in DEVICES.c if c.name != "body"]
            rows = [dict(r) for r in connection.execute(sql.select(*columns).order_by(DEVICES.c.name)).mappings()]
        for row in rows:
            row["widths"] = read_json_column(row["widths"], self.url)
            row["plan"] = read_json_column(row["plan"], self.url)
        return rows

    @_retry_while_away
    def _read_device(self, name: str) -> dict[str, Any]:
        """A device's saved row."""
        with self.database.read_transaction() as connection:
            text = connection.execute(_SELECT_DEVICE, {"name": name}).scalar()
        if text is None:
            raise StorageError(f"{self.url}: the row of device {name} is gone", hint="Restore the server's backup.")
        return dict(read_json_column(text, self.url))

    def traffic(self) -> dict[str, tuple[int, int]]:
        return {r["name"]: (int(r["bytes_down"]), int(r["bytes_up"])) for r in self.devices()}

    def _history(self, connection: sql.Connection, max_parts: int | None = None) -> list[dict[str, Any]]:
        """Summaries of the finished rounds; only the latest include their devices, up to `parts` of them."""
        summaries: dict[int, dict[str, Any]] = {}
        first_with_devices = None
        query = sql.select(ROUNDS.c.round, ROUNDS.c.summary, ROUNDS.c.participants).order_by(ROUNDS.c.round.desc())
        for number, summary_text, count in connection.execute(query):
            summaries[number] = {**read_json_column(summary_text, self.url), "devices": {}}
            if max_parts is not None:
                max_parts -= count
            if max_parts is None or max_parts >= 0:
                first_with_devices = number
        if first_with_devices is not None:
            rows = sql.select(PARTICIPANTS).where(PARTICIPANTS.c.round >= first_with_devices)
            for number, device, body in connection.execute(rows.order_by(PARTICIPANTS.c.round, PARTICIPANTS.c.device)):
                if number in summaries:
                    summaries[number]["devices"][device] = read_json_column(body, self.url)
        return list(summaries.values())[::-1]


class DevicesAway:
    """Drops fields of saved devices that are needed only when a device comes back (`EVICTED_ATTRIBUTES`) from memory.

    Active devices keep them: a device is active while it is connected, has a part, or was in the latest round. `read`
    returns a device's saved row."""

    def __init__(self, read: Callable[[str], Mapping[str, Any]]) -> None:
        self._read_row = read
        # Absent devices that are complete in memory, the longest absent first.
        self._away_in_memory: dict[str, None] = {}
        self._away_but_active: list[str] = []  # those that stay in memory until the round is over, as they have a part

    def on_saved(self, state: State, changed_names: Iterable[str], *, round_over: bool) -> None:
        """Put away absent devices without a part in this or the latest round, after the state was saved with these
        changed devices. At the end of a round (`round_over`) those of earlier rounds can be put away, too."""
        state.devices.fetch = self._fetch
        if round_over:
            self._away_in_memory = dict.fromkeys([*self._away_but_active, *self._away_in_memory])
            self._away_but_active = []
        for name in changed_names:
            self._away_in_memory.pop(name, None)
            if (device := state.devices.get(name)) is not None and not device.online:
                self._away_in_memory[name] = None
        latest_devices = state.history[-1]["devices"] if state.history else {}
        while len(self._away_in_memory) > MAX_AWAY_IN_MEMORY:
            name = next(iter(self._away_in_memory))
            del self._away_in_memory[name]
            device = state.devices.get(name)
            if name in state.tasks or name in latest_devices:
                self._away_but_active.append(name)
            elif device is not None and not device.online:
                device.evict(EVICTED_ATTRIBUTES)

    def _fetch(self, name: str) -> dict[str, Any]:
        """The dropped fields of a device, from its saved row."""
        row = self._read_row(name)
        self._away_in_memory[name] = None
        return {key: None if row[key] is None else PackedJson(row[key]) for key in EVICTED_ATTRIBUTES}
