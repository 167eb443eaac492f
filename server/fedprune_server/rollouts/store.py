"""Rollouts on the disk: what goes to which boards, how far it is, and the files of the release that is under way.

`<state>/releases`, apart from the job's database because rollouts are the fleet's, and outlive jobs. The command line
begins rollouts and asks for their end, the daemon runs them: each writes columns of its own, and looks at the other's.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.blobs import BlobStore
from fedprune.coordination.rollout import Rollout, RolloutPhase
from fedprune.disk import locked, storage_errors
from fedprune.errors import ConfigError, ProtocolError, ReleaseError, StorageError
from fedprune.release import MAX_FILE
from fedprune.wire.messages import parse
from fedprune.wire.release_messages import ReleaseOffer
from fedprune_server.sqlite_errors import sqlite_errors

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
_LATEST = "SELECT number, at, offer, joins, rollout, reports, wish FROM rollouts ORDER BY number DESC LIMIT 1"

Reports = dict[str, dict[str, Any]]
"""By board, what it said last: state, reason, done, total, and when."""


@dataclass(frozen=True)
class Entry:
    """A rollout of a release.

    Attributes:
        number: Counts rollouts.
        at: When it was begun, in seconds since 1970.
        offer: What boards are sent.
        joins: Whether boards that come later belong to it.
        rollout: How far it is.
        reports: What boards said last.
        wish: Why somebody wants it stopped; None if nobody does.
    """

    number: int
    at: float
    offer: ReleaseOffer
    joins: bool
    rollout: Rollout
    reports: Reports
    wish: str | None


class RolloutStore:
    """The rollouts of a fleet.

    Args:
        state: The server's state folder.

    Attributes:
        blobs: The files of the release that is under way.

    Raises:
        StorageError: The database is damaged, of another version, or the disk fails.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / FOLDER / FILE
        self.blobs = BlobStore(state / FOLDER, max_size=MAX_FILE)
        with self._translated():
            self._connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            self._connection.execute("PRAGMA synchronous=FULL")
        with self._transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise StorageError(f"{self._path} was written by another version", expected=_FORMAT, got=version)
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version={_FORMAT}")

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def starting(self) -> AbstractContextManager[None]:
        """Hold what a rollout's start needs alone: from `check_free`, over the files in `blobs`, to `begin`.

        Raises:
            StorageError: Another start holds it, or the disk fails.
        """
        return locked(self._path.parent / _LOCK, "another `rollout start` is under way", "Wait until it is done.")

    def check_free(self, release: int) -> None:
        """Make sure that a release could be rolled out now.

        Raises:
            ConfigError: A rollout is under way.
            ReleaseError: A higher number was rolled out before, so that no board would take this one.
            StorageError: The disk fails.
        """
        with self._transaction() as connection:
            self._check_free(connection, release)

    def begin(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, joins: bool) -> int:
        """Begin a rollout, whose files are in `blobs`.

        Returns:
            Its number.

        Raises:
            ConfigError: One is under way.
            ReleaseError: A higher number was rolled out before, so that no board would take this one.
            StorageError: The disk fails or is full.
        """
        with self._transaction() as connection:
            self._check_free(connection, offer.number)
            row = (now, offer.number, offer.to_bytes(), joins, rollout.phase.value, _json(rollout.to_dict()), "{}")
            insert = "INSERT INTO rollouts (at, release, offer, joins, phase, rollout, reports) VALUES (?,?,?,?,?,?,?)"
            return int(connection.execute(insert, row).lastrowid or 0)

    def save(self, number: int, rollout: Rollout, reports: Mapping[str, Any]) -> None:
        """Write down how far a rollout is; it is on the disk when this returns.

        Raises:
            StorageError: The disk fails or is full.
        """
        with self._transaction() as connection:
            change = "UPDATE rollouts SET phase = ?, rollout = ?, reports = ? WHERE number = ?"
            connection.execute(change, (rollout.phase.value, _json(rollout.to_dict()), _json(reports), number))

    def stop(self, reason: str) -> int:
        """Ask for the end of the rollout that is under way; the daemon sees to it.

        Returns:
            The rollout's number.

        Raises:
            ConfigError: None is under way.
            StorageError: The disk fails or is full.
        """
        with self._transaction() as connection:
            running = "SELECT number FROM rollouts WHERE phase = ?"
            found = connection.execute(running, (RolloutPhase.RUNNING.value,)).fetchone()
            if found is None:
                raise ConfigError("no rollout is under way", hint="See `fedprune-server rollout status`.")
            connection.execute("UPDATE rollouts SET wish = ? WHERE number = ?", (reason, found[0]))
            return int(found[0])

    def latest(self) -> Entry | None:
        """The rollout that was begun last.

        Raises:
            StorageError: It is damaged.
        """
        with self._transaction() as connection:
            row = connection.execute(_LATEST).fetchone()
        return None if row is None else self._entry(row)

    def releases(self) -> set[int]:
        """The numbers of all releases that were rolled out."""
        with self._transaction() as connection:
            return {int(row[0]) for row in connection.execute("SELECT release FROM rollouts")}

    def version(self) -> int:
        """A number that is another one after another connection has changed anything."""
        with self._translated():
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    @staticmethod
    def _check_free(connection: sqlite3.Connection, release: int) -> None:
        under_way = connection.execute(
            "SELECT number, release FROM rollouts WHERE phase = ?", (RolloutPhase.RUNNING.value,)
        ).fetchone()
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
                hint="To go back, release the old one again under a new number: fedprune-server release --again.",
            )

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        number, at, offer, joins, rollout, reports, wish = row
        try:
            message = parse(bytes(offer))
            body, said = json.loads(rollout), json.loads(reports)
            if not isinstance(message, ReleaseOffer) or not isinstance(said, dict):
                raise ValueError("not an offer with reports")
        except (ProtocolError, ValueError, TypeError, RecursionError) as error:
            raise StorageError(f"{self._path}: rollout {number} is damaged ({error})") from error
        return Entry(int(number), float(at), message, bool(joins), Rollout.from_dict(body), said, wish)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._translated(), self._connection as connection:  # which commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        hint = "If it is damaged, restore the server's backup, or delete it."
        with storage_errors(f"can't use {self._path}"), sqlite_errors(self._path, hint):
            yield


def _json(body: object) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
