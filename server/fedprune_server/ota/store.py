"""Rollouts in the server's database: the release, its boards, how far each is. Their files are in `<state>/releases`.

The command line starts rollouts and asks for their end, the server runs them: each writes its own columns and reads the
other's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.closing import Closing
from fedprune.core.disk import locked
from fedprune.core.errors import ConfigError, ProtocolError, ReleaseError, StorageError
from fedprune.releases.release import MAX_FILE, Release
from fedprune.releases.rollout import Rollout, RolloutPhase
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune.wire.messages import parse
from fedprune_server.storage.database import Database
from fedprune_server.storage.storage import database_of
from fedprune_server.storage.tables import ROLLOUT_BOARDS, ROLLOUTS, encoded, upsert

FOLDER = "releases"
_LOCK = "start.lock"

_C = ROLLOUTS.c
_UNDER_WAY = _C.phase.in_((RolloutPhase.RUNNING.value, RolloutPhase.PAUSED.value))
_IN_ORDER = sql.select(ROLLOUTS).order_by(_C.number)
_BOARDS = sql.select(ROLLOUT_BOARDS).where(ROLLOUT_BOARDS.c.rollout == sql.bindparam("number"))

# By board, its last report, as the command line shows it: state, reason, bytes done and in total, and when it came.
Reports = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RolloutEntry:
    """A rollout of a release.

    Attributes:
        at: When it was started, in seconds since 1970.
        offer: The message to its boards.
        joins: Whether boards that join the fleet later belong to it.
        reports: Each board's last report.
        wish: The reason of a request to stop; None without one.
        hold: The reason of a request to pause; None without one.
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

    @property
    def release(self) -> Release:
        return Release.from_bytes(self.offer.manifest.encode())

    @property
    def state(self) -> str:
        """The rollout's phase, or `stopping`, `pausing` or `resuming` if the server hasn't carried that out yet."""
        phase = self.rollout.phase
        if not phase.under_way:
            return phase.value
        if self.wish is not None:
            return "stopping"
        if (self.hold is not None) == (phase is RolloutPhase.PAUSED):
            return phase.value
        return "pausing" if self.hold is not None else "resuming"


class RolloutStore(Closing):
    """The rollouts of a site. Every method raises `StorageError` if the database is damaged or away, or the disk fails
    or is full.

    Args:
        database: An open database, which stays open, or the URL of one; None for the folder's.
        read_only: Change nothing, and don't wait for those who write.

    Attributes:
        blobs: The files of the release that is under way; not with `read_only`.
    """

    def __init__(
        self,
        state: Path,
        database: Database | str | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        self._lock = state / FOLDER / _LOCK
        self._given = isinstance(database, Database)
        self._database = (
            database if isinstance(database, Database) else database_of(state, database, read_only=read_only)
        )
        if not read_only:  # a store makes its folder
            self.blobs = BlobStore(state / FOLDER, max_size=MAX_FILE)

    def close(self) -> None:
        if not self._given:
            self._database.close()

    def starting(self) -> AbstractContextManager[None]:
        """Lock out other starts, from `check_free` to `begin`, while files are written to `blobs`."""
        return locked(self._lock, "another `rollout start` is under way", "Wait until it is done.")

    def check_free(self, release: int, manifest: str) -> None:
        """Make sure that a release could be rolled out now.

        Raises `ConfigError` if a rollout is under way, and `ReleaseError` if boards would refuse the release, because
        they know a higher number or another release under this number.
        """
        with self._database.reading() as connection:
            _check_free(connection, release, manifest)

    def begin(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, joins: bool, prior: int | None = None) -> int:
        """Start a rollout, whose files are in `blobs`; returns its number. Raises as `check_free`."""

        def write(connection: sql.Connection) -> int:
            _check_free(connection, offer.number, offer.manifest)
            return _insert(connection, offer, rollout, now, joins=joins, prior=prior)

        return self._write(write)

    def begin_back(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, leaves: int, why: str) -> int:
        """Start a rollout of an earlier release under a new number to the boards that have the last one, rollout
        `leaves`, which ends because of `why`; returns its number.

        Raises `ConfigError` if another one was started meanwhile, and `ReleaseError` if a number as high as the
        release's was rolled out.
        """

        def write(connection: sql.Connection) -> int:
            latest, highest = connection.execute(sql.select(sql.func.max(_C.number), sql.func.max(_C.release))).one()
            if latest != leaves:
                raise ConfigError("another rollout was begun meanwhile", hint="See `fedprune-server rollout status`.")
            if offer.number <= highest:
                raise ReleaseError("number of a release", expected=f"above {highest}", got=offer.number)
            left = connection.execute(sql.select(_C.release).where(_C.number == leaves)).scalar()
            _change(connection, _UNDER_WAY, wish=why)
            return _insert(connection, offer, rollout, now, joins=False, leaves=left)

        return self._write(write)

    def save(self, number: int, rollout: Rollout, reports: Mapping[str, Any], reported: Collection[str] = ()) -> None:
        """Save a rollout's state durably, with the boards that have changed and those that have `reported`."""
        rows = _board_rows(number, rollout, reports, rollout.changed.union(reported))

        # The server's own write, which may be repeated: it sets the state, and adds nothing.
        def write() -> None:
            with self._database.writing() as connection:
                _change(connection, _C.number == number, **_state(rollout))
                upsert(connection, ROLLOUT_BOARDS, rows)

        self._database.patiently(write)
        rollout.settle()

    def stop(self, reason: str) -> int:
        """Ask for the end of the rollout that is under way, which the server carries out; returns its number. Raises
        `ConfigError` if none is under way.
        """

        def write(connection: sql.Connection) -> int:
            number, _ = _running(connection)
            _change(connection, _C.number == number, wish=reason)
            return number

        return self._write(write)

    def pause(self, reason: str) -> int:
        """Ask the server to give the release to no further board until `resume`; returns the rollout's number.

        A paused rollout keeps its first reason. Raises `ConfigError` if none is under way, or it is to stop.
        """

        def write(connection: sql.Connection) -> int:
            number, hold = _running(connection)
            # Without any reason a dash: NULL means that nobody asked for a pause.
            _change(connection, _C.number == number, hold=hold or reason or "-")
            return number

        return self._write(write)

    def resume(self) -> int:
        """Ask that a paused rollout continues; returns its number. Raises `ConfigError` if none is running,
        or it isn't paused."""

        def write(connection: sql.Connection) -> int:
            number, hold = _running(connection)
            if hold is None:
                raise ConfigError(f"rollout {number} isn't paused", hint="See `fedprune-server rollout status`.")
            _change(connection, _C.number == number, hold=None)
            return number

        return self._write(write)

    def entries(self) -> list[RolloutEntry]:
        """All rollouts, the oldest first."""
        return self._entries(_IN_ORDER)

    def under_way(self) -> list[RolloutEntry]:
        """Rollouts that have not ended: the last one, and those that it replaces and that are to stop."""
        return self._entries(_IN_ORDER.where(_UNDER_WAY))

    def orders(self) -> list[tuple[Any, ...]]:
        """Number, `wish` and `hold` of the rollouts that have not ended."""
        query = sql.select(_C.number, _C.wish, _C.hold).where(_UNDER_WAY).order_by(_C.number)
        return [tuple(row) for row in self._rows(query)]

    def offer(self, number: int) -> ReleaseOffer | None:
        """The message to a rollout's boards; None if there is no such rollout."""
        rows = self._rows(sql.select(_C.number, _C.offer).where(_C.number == number))
        return self._offer(rows[0]) if rows else None

    def latest(self) -> RolloutEntry | None:
        """The rollout that was started last."""
        entries = self._entries(sql.select(ROLLOUTS).order_by(_C.number.desc()).limit(1))
        return entries[0] if entries else None

    def releases(self) -> set[int]:
        return {int(row.release) for row in self._rows(sql.select(_C.release))}

    def version(self) -> int:
        """A number that grows with each change."""
        return int(self._rows(sql.select(sql.func.coalesce(sql.func.sum(_C.changes), 0)))[0][0])

    def _write(self, statements: Callable[[sql.Connection], int]) -> int:
        """Run a command's transaction; not again if the connection is lost, because it may have been committed."""

        def run() -> int:
            with self._database.transaction() as connection:
                return statements(connection)

        return self._database.when_free(run)

    def _rows(self, query: sql.Select[Any]) -> list[Any]:
        return self._database.read(lambda connection: list(connection.execute(query)))

    def _entries(self, query: sql.Select[Any]) -> list[RolloutEntry]:
        def read(connection: sql.Connection) -> list[tuple[Any, list[Any]]]:
            rows = list(connection.execute(query))
            return [(row, list(connection.execute(_BOARDS, {"number": row.number}))) for row in rows]

        return [self._entry(row, boards) for row, boards in self._database.read(read)]

    def _entry(self, row: Any, boards: Sequence[Any]) -> RolloutEntry:
        try:
            head = json.loads(row.rollout)
            rollout = Rollout.from_dict({**head, "boards": {board.device: json.loads(board.body) for board in boards}})
            reports = {board.device: json.loads(board.report) for board in boards if board.report is not None}
        except (StorageError, ValueError, TypeError, RecursionError) as error:
            raise self._damage(row.number, error) from error
        return RolloutEntry(
            row.number, row.at, self._offer(row), row.joins, rollout, reports, row.wish, row.hold, row.prior, row.leaves
        )

    def _offer(self, row: Any) -> ReleaseOffer:
        try:
            message = parse(bytes(row.offer))
        except ProtocolError as error:
            raise self._damage(row.number, error) from error
        if not isinstance(message, ReleaseOffer):
            raise self._damage(row.number, ValueError("no offer"))
        return message

    def _damage(self, number: int, error: Exception) -> StorageError:
        return StorageError(f"{self._database.url}: rollout {number} is damaged ({error})")


def _check_free(connection: sql.Connection, release: int, manifest: str) -> None:
    under_way = connection.execute(sql.select(_C.number, _C.release).where(_UNDER_WAY)).first()
    if under_way is not None:
        raise ConfigError(
            f"rollout {under_way.number}, of release {under_way.release}, is under way",
            hint="Wait for its end, or stop it: fedprune-server rollout stop.",
        )
    # Boards remember the highest number that they have seen, and refuse lower ones as replays.
    highest = connection.execute(sql.select(sql.func.max(_C.release))).scalar()
    if highest is not None and release < highest:
        raise ReleaseError(
            f"release {release}",
            expected=f"a number of {highest} or more, because boards have seen that one",
            hint="To go back: fedprune-server rollout back. Another old one: fedprune-server release --again.",
        )
    for offer in connection.execute(sql.select(_C.offer).where(_C.release == release)).scalars():
        before = parse(bytes(offer))
        if not isinstance(before, ReleaseOffer) or before.manifest != manifest:
            raise ReleaseError(
                f"another release {release} was rolled out before, and boards that have it would not take this one",
                hint="Release it under a higher number.",
            )


def _running(connection: sql.Connection) -> tuple[int, str | None]:
    """The number of the rollout that is under way and isn't to stop, and why it is to pause."""
    row = connection.execute(_IN_ORDER.where(_UNDER_WAY).order_by(None).order_by(_C.number.desc())).first()
    if row is None:
        raise ConfigError("no rollout is under way", hint="See `fedprune-server rollout status`.")
    if row.wish is not None:
        raise ConfigError(f"rollout {row.number} is to stop already", hint="See `fedprune-server rollout status`.")
    return int(row.number), row.hold


def _insert(connection: sql.Connection, offer: ReleaseOffer, rollout: Rollout, now: float, **values: int | None) -> int:
    row = {"at": now, "release": offer.number, "offer": offer.to_bytes(), **_state(rollout), **values}
    primary_key = connection.execute(ROLLOUTS.insert().values(row)).inserted_primary_key
    number = int(primary_key[0] if primary_key else 0)
    upsert(connection, ROLLOUT_BOARDS, _board_rows(number, rollout, {}, rollout.boards))
    return number


# `changes` counts writes, so that a reader sees that anything has changed without comparing rows.
def _change(connection: sql.Connection, where: sql.ColumnElement[bool], **values: str | None) -> None:
    connection.execute(ROLLOUTS.update().where(where).values(changes=_C.changes + 1, **values))


def _state(rollout: Rollout) -> dict[str, str]:
    return {"phase": rollout.phase.value, "rollout": encoded(rollout.head())}


def _board_rows(
    number: int, rollout: Rollout, reports: Mapping[str, Any], names: Iterable[str]
) -> list[dict[str, Any]]:
    return [
        {
            "rollout": number,
            "device": name,
            "body": encoded(rollout.boards[name].to_dict()),
            "report": encoded(reports[name]) if name in reports else None,
        }
        for name in sorted(names)
    ]
