"""Rollouts on the disk: the release, its boards, how far each is, and the files of the release that is under way.

They are in `<state>/releases`, not in a job's database, because they belong to the fleet and outlive jobs. The command
line starts rollouts and asks for their end, the daemon runs them: each writes its own columns and reads the other's.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import locked, storage_errors
from fedprune.core.errors import ConfigError, ProtocolError, ReleaseError, StorageError
from fedprune.releases.release import MAX_FILE
from fedprune.releases.rollout import Rollout, RolloutPhase
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune.wire.messages import parse
from fedprune_server.storage.sqlite_errors import sqlite_errors

FOLDER = "releases"
FILE = "rollouts.db"
_LOCK = "start.lock"

_FORMAT = 1
_BUSY_S = 10
_TABLE = """
CREATE TABLE IF NOT EXISTS rollouts (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, release INTEGER NOT NULL, offer BLOB NOT NULL,
    joins INTEGER NOT NULL, phase TEXT NOT NULL, rollout TEXT NOT NULL, reports TEXT NOT NULL, wish TEXT)
"""
_LATER = {"hold": "TEXT", "prior": "INTEGER", "leaves": "INTEGER"}
"""Columns that were added later."""

_ENTRIES = "SELECT number, at, offer, joins, rollout, reports, wish, hold, prior, leaves FROM rollouts"
_LATEST = f"{_ENTRIES} ORDER BY number DESC LIMIT 1"
_UNDER_WAY = f"phase IN ('{RolloutPhase.RUNNING.value}', '{RolloutPhase.PAUSED.value}')"

Reports = dict[str, dict[str, Any]]
"""By board, its last report: state, reason, done, total, and when."""


@dataclass(frozen=True)
class RolloutEntry:
    """A rollout of a release.

    Attributes:
        number: Counts rollouts.
        at: When it was started, in seconds since 1970.
        offer: The message to its boards.
        joins: Whether boards that join the fleet later belong to it.
        rollout: Its state.
        reports: Each board's last report.
        wish: Why it is to stop; None if it isn't.
        hold: Why it is to pause; None if it isn't.
        prior: Number of the rollout whose release its boards had before; None if they had none, or it is not known.
        leaves: Number of the release from which it takes boards back; None otherwise.
    """

    number: int
    at: float
    offer: ReleaseOffer
    joins: bool
    rollout: Rollout
    reports: Reports
    wish: str | None
    hold: str | None = None
    prior: int | None = None
    leaves: int | None = None


class RolloutStore:
    """The rollouts of a fleet. Every method raises `StorageError` if the database is damaged or the disk fails or is
    full.

    Args:
        state: The server's state folder.
        read_only: Change nothing, and don't take the lock of those who write.

    Attributes:
        blobs: The files of the release that is under way; not with `read_only`.

    Raises:
        StorageError: The database is damaged, of another version, or the disk fails.
    """

    def __init__(self, state: Path, *, read_only: bool = False) -> None:
        self._path = state / FOLDER / FILE
        self._begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        if not read_only:
            self.blobs = BlobStore(state / FOLDER, max_size=MAX_FILE)
        with self._translated():
            uri = f"{self._path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._connection = sqlite3.connect(  # of one thread at a time, which needn't be this one
                uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA synchronous=FULL")
        with self._transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in ((_FORMAT,) if read_only else (0, _FORMAT)):
                raise StorageError(f"{self._path} was written by another version", expected=_FORMAT, got=version)
            if read_only:
                return
            connection.execute(_TABLE)
            there = {row[1] for row in connection.execute("PRAGMA table_info(rollouts)")}
            for name, kind in _LATER.items():
                if name not in there:
                    connection.execute(f"ALTER TABLE rollouts ADD COLUMN {name} {kind}")
            connection.execute(f"PRAGMA user_version={_FORMAT}")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def starting(self) -> AbstractContextManager[None]:
        """Keep other starts away, from `check_free` to `begin`, while files are written to `blobs`."""
        return locked(self._path.parent / _LOCK, "another `rollout start` is under way", "Wait until it is done.")

    def check_free(self, release: int, manifest: str) -> None:
        """Make sure that a release could be rolled out now.

        Raises:
            ConfigError: A rollout is under way.
            ReleaseError: Boards would refuse it, because they know a higher number or another release under this
                number.
        """
        with self._transaction() as connection:
            self._check_free(connection, release, manifest)

    def begin(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, joins: bool, prior: int | None = None) -> int:
        """Start a rollout, whose files are in `blobs`; returns its number.

        Raises:
            ConfigError: A rollout is under way.
            ReleaseError: As `check_free`.
        """
        with self._transaction() as connection:
            self._check_free(connection, offer.number, offer.manifest)
            return _insert(connection, offer, rollout, now, joins=joins, prior=prior)

    def begin_back(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, leaves: int, why: str) -> int:
        """Start a rollout that takes boards back, in place of the last one; returns its number.

        Args:
            offer: The earlier release under a new number; its files are in `blobs`.
            rollout: To the boards that have the last release.
            now: Seconds since 1970.
            leaves: The last rollout's number.
            why: Why that one ends.

        Raises:
            ConfigError: Another one was started meanwhile.
            ReleaseError: A number as high as the release's was rolled out.
        """
        with self._transaction() as connection:
            last, highest = connection.execute("SELECT max(number), max(release) FROM rollouts").fetchone()
            if last != leaves:
                raise ConfigError("another rollout was begun meanwhile", hint="See `fedprune-server rollout status`.")
            if offer.number <= highest:
                raise ReleaseError("number of a release", expected=f"above {highest}", got=offer.number)
            subject = connection.execute("SELECT release FROM rollouts WHERE number = ?", (leaves,)).fetchone()[0]
            connection.execute(f"UPDATE rollouts SET wish = ? WHERE {_UNDER_WAY}", (why,))  # noqa: S608  # nosec B608  # ours
            return _insert(connection, offer, rollout, now, joins=False, leaves=subject)

    def save(self, number: int, rollout: Rollout, reports: Mapping[str, Any]) -> None:
        """Save a rollout's state and its boards' reports durably."""
        with self._transaction() as connection:
            change = "UPDATE rollouts SET phase = ?, rollout = ?, reports = ? WHERE number = ?"
            connection.execute(change, (rollout.phase.value, _json(rollout.to_dict()), _json(reports), number))

    def stop(self, reason: str) -> int:
        """Ask for the end of the rollout that is under way, which the daemon carries out; returns its number. Raises
        `ConfigError` if none is under way.
        """
        with self._transaction() as connection:
            number, _ = _running(connection)
            connection.execute("UPDATE rollouts SET wish = ? WHERE number = ?", (reason, number))
            return number

    def pause(self, reason: str) -> int:
        """Ask the daemon to give the release to no further board until `resume`; returns the rollout's number.

        A paused rollout keeps its first reason.

        Raises:
            ConfigError: None is under way, or it is to stop.
        """
        with self._transaction() as connection:
            number, hold = _running(connection)
            connection.execute("UPDATE rollouts SET hold = ? WHERE number = ?", (hold or reason or "-", number))
            return number

    def resume(self) -> int:
        """Ask that a paused rollout goes on; returns its number. Raises `ConfigError` if none is under way, or it isn't
        paused.
        """
        with self._transaction() as connection:
            number, hold = _running(connection)
            if hold is None:
                raise ConfigError(f"rollout {number} isn't paused", hint="See `fedprune-server rollout status`.")
            connection.execute("UPDATE rollouts SET hold = NULL WHERE number = ?", (number,))
            return number

    def entries(self) -> list[RolloutEntry]:
        """All rollouts, the oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(f"{_ENTRIES} ORDER BY number").fetchall()
        return [self._entry(row) for row in rows]

    def under_way(self) -> list[RolloutEntry]:
        """Rollouts that have not ended: the last one, and those that it replaces and that are to stop."""
        with self._transaction() as connection:
            rows = connection.execute(f"{_ENTRIES} WHERE {_UNDER_WAY} ORDER BY number").fetchall()
        return [self._entry(row) for row in rows]

    def offer(self, number: int) -> ReleaseOffer | None:
        """The message to a rollout's boards; None if there is no such rollout."""
        with self._transaction() as connection:
            row = connection.execute(f"{_ENTRIES} WHERE number = ?", (number,)).fetchone()
        return None if row is None else self._entry(row).offer

    def latest(self) -> RolloutEntry | None:
        """The rollout that was started last."""
        with self._transaction() as connection:
            row = connection.execute(_LATEST).fetchone()
        return None if row is None else self._entry(row)

    def releases(self) -> set[int]:
        """The numbers of all releases that were rolled out."""
        with self._transaction() as connection:
            return {int(row[0]) for row in connection.execute("SELECT release FROM rollouts")}

    def version(self) -> int:
        """A number that changes when another connection has changed anything."""
        with self._translated():
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    @staticmethod
    def _check_free(connection: sqlite3.Connection, release: int, manifest: str) -> None:
        under_way = connection.execute(f"SELECT number, release FROM rollouts WHERE {_UNDER_WAY}").fetchone()  # noqa: S608  # nosec B608  # ours
        if under_way is not None:
            raise ConfigError(
                f"rollout {under_way[0]}, of release {under_way[1]}, is under way",
                hint="Wait for its end, or stop it: fedprune-server rollout stop.",
            )
        highest = connection.execute("SELECT max(release) FROM rollouts").fetchone()[0]
        if highest is not None and release < highest:
            raise ReleaseError(
                f"release {release}",
                expected=f"a number of {highest} or more, because boards have seen that one",
                hint="To go back: fedprune-server rollout back. Another old one: fedprune-server release --again.",
            )
        for (offer,) in connection.execute("SELECT offer FROM rollouts WHERE release = ?", (release,)):
            before = parse(bytes(offer))
            if not isinstance(before, ReleaseOffer) or before.manifest != manifest:
                raise ReleaseError(
                    f"another release {release} was rolled out before, and boards that have it would not take this one",
                    hint="Release it under a higher number.",
                )

    def _entry(self, row: tuple[Any, ...]) -> RolloutEntry:
        number, at, offer, joins, rollout, reports, wish, hold, prior, leaves = row
        try:
            message = parse(bytes(offer))
            body, said = json.loads(rollout), json.loads(reports)
            if not isinstance(message, ReleaseOffer) or not isinstance(said, dict):
                raise ValueError("not an offer with reports")
        except (ProtocolError, ValueError, TypeError, RecursionError) as error:
            raise StorageError(f"{self._path}: rollout {number} is damaged ({error})") from error
        made = Rollout.from_dict(body)
        return RolloutEntry(int(number), float(at), message, bool(joins), made, said, wish, hold, prior, leaves)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._translated(), self._connection as connection:  # which commits, or rolls back
            connection.execute(self._begin)
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        hint = "If it is damaged, restore the server's backup, or delete it."
        with storage_errors(f"can't use {self._path}"), sqlite_errors(self._path, hint):
            yield


def _running(connection: sqlite3.Connection) -> tuple[int, str | None]:
    """The number of the rollout that is under way and isn't to stop, and why it is to pause."""
    found = connection.execute(f"SELECT number, wish, hold FROM rollouts WHERE {_UNDER_WAY} ORDER BY number DESC")  # noqa: S608  # nosec B608  # ours
    number, wish, hold = found.fetchone() or (None, None, None)
    if number is None:
        raise ConfigError("no rollout is under way", hint="See `fedprune-server rollout status`.")
    if wish is not None:
        raise ConfigError(f"rollout {number} is to stop already", hint="See `fedprune-server rollout status`.")
    return int(number), hold


def _insert(
    connection: sqlite3.Connection,
    offer: ReleaseOffer,
    rollout: Rollout,
    now: float,
    *,
    joins: bool,
    prior: int | None = None,
    leaves: int | None = None,
) -> int:
    row = (now, offer.number, offer.to_bytes(), joins, rollout.phase.value, _json(rollout.to_dict()), prior, leaves)
    insert = (
        "INSERT INTO rollouts (at, release, offer, joins, phase, rollout, reports, prior, leaves) "
        "VALUES (?,?,?,?,?,?,'{}',?,?)"
    )
    return int(connection.execute(insert, row).lastrowid or 0)


def _json(body: object) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
