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
from fedprune.core.closeable import Closeable
from fedprune.core.disk import file_lock
from fedprune.core.errors import ConfigError, ProtocolError, ReleaseError, StorageError
from fedprune.releases.release import MAX_FILE_BYTES, Release
from fedprune.releases.rollout import Rollout, RolloutPhase
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune.wire.messages import parse_message
from fedprune_server.storage.database import Database
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.tables import ROLLOUT_BOARDS, ROLLOUTS, json_column, upsert

FOLDER = "releases"
_START_LOCK = "start.lock"

_COLUMNS = ROLLOUTS.c
_UNDER_WAY = _COLUMNS.phase.in_((RolloutPhase.RUNNING.value, RolloutPhase.PAUSED.value))
_ROLLOUTS_BY_NUMBER = sql.select(ROLLOUTS).order_by(_COLUMNS.number)
_BOARDS_OF_ROLLOUT = sql.select(ROLLOUT_BOARDS).where(ROLLOUT_BOARDS.c.rollout == sql.bindparam("number"))

# By board, its last report, as the command line shows it: state, reason, bytes done and in total, and when it came.
Reports = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RolloutEntry:
    """A rollout of a release.

    Attributes:
        started_at: When it was started, in seconds since 1970.
        offer: The message to its boards.
        includes_newcomers: Whether boards that join the fleet later belong to it.
        reports: Each board's last report.
        stop_reason: The reason of a request to stop; None without one.
        pause_reason: The reason of a request to pause; None without one.
        earlier_rollout: Number of the rollout whose release its boards had before; None if they had none, or it is not
            known.
        left_release: Number of the release from which it takes boards back; None otherwise.
    """

    number: int
    started_at: float
    offer: ReleaseOffer
    includes_newcomers: bool
    rollout: Rollout
    reports: Reports
    stop_reason: str | None
    pause_reason: str | None = None
    earlier_rollout: int | None = None
    left_release: int | None = None

    @property
    def release(self) -> Release:
        return Release.from_bytes(self.offer.manifest.encode())

    @property
    def state(self) -> str:
        """The rollout's phase, or `stopping`, `pausing` or `resuming` if the server hasn't carried that out yet."""
        phase = self.rollout.phase
        if not phase.is_under_way:
            return phase.value
        if self.stop_reason is not None:
            return "stopping"
        if (self.pause_reason is not None) == (phase is RolloutPhase.PAUSED):
            return phase.value
        return "pausing" if self.pause_reason is not None else "resuming"


class RolloutStore(Closeable):
    """The rollouts of a site, in an open database, which stays open, or in that of a URL or, by default, of the folder.
    Every method raises `StorageError` if the database is damaged or away, or the disk fails or is full.

    `blobs` are the files of the release that is under way. A store that is `read_only` has none, changes nothing, and
    doesn't wait for those who write."""

    def __init__(self, state: Path, database: Database | str | None = None, *, read_only: bool = False) -> None:
        self._lock = state / FOLDER / _START_LOCK
        self._is_shared_database = isinstance(database, Database)
        self._database = (
            database if isinstance(database, Database) else open_database(state, database, read_only=read_only)
        )
        if not read_only:  # a store makes its folder
            self.blobs = BlobStore(state / FOLDER, max_size=MAX_FILE_BYTES)

    def close(self) -> None:
        if not self._is_shared_database:
            self._database.close()

    def start_lock(self) -> AbstractContextManager[None]:
        """Lock out other starts, from `check_free` to `begin`, while files are written to `blobs`."""
        return file_lock(self._lock, "another `rollout start` is under way", "Wait until it is done.")

    def check_free(self, release: int, manifest: str) -> None:
        """Make sure that a release could be rolled out now.

        Raises `ConfigError` if a rollout is under way, and `ReleaseError` if boards would refuse the release, because
        they know a higher number or another release under this number.
        """
        with self._database.read_transaction() as connection:
            _check_free(connection, release, manifest)

    def begin(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, joins: bool, prior: int | None = None) -> int:
        """Start a rollout, whose files are in `blobs`; returns its number. Raises as `check_free`."""

        def write(connection: sql.Connection) -> int:
            _check_free(connection, offer.number, offer.manifest)
            return _insert_rollout(connection, offer, rollout, now, joins=joins, prior=prior)

        return self._run_transaction(write)

    def begin_way_back(self, offer: ReleaseOffer, rollout: Rollout, now: float, *, left_rollout: int, why: str) -> int:
        """Start a rollout of an earlier release under a new number to the boards of rollout `left_rollout`, the last
        one, which ends because of `why`; returns its number.

        Raises `ConfigError` if another one was started meanwhile, and `ReleaseError` if a number as high as the
        release's was rolled out.
        """

        def write(connection: sql.Connection) -> int:
            maxima = sql.select(sql.func.max(_COLUMNS.number), sql.func.max(_COLUMNS.release))
            latest, highest = connection.execute(maxima).one()
            if latest != left_rollout:
                raise ConfigError("another rollout was begun meanwhile", hint="See `fedprune-server rollout status`.")
            if offer.number <= highest:
                raise ReleaseError("number of a release", expected=f"above {highest}", got=offer.number)
            release = connection.execute(sql.select(_COLUMNS.release).where(_COLUMNS.number == left_rollout)).scalar()
            _update_rollouts(connection, _UNDER_WAY, wish=why)
            return _insert_rollout(connection, offer, rollout, now, joins=False, leaves=release)

        return self._run_transaction(write)

    def save(self, number: int, rollout: Rollout, reports: Mapping[str, Any], reported: Collection[str] = ()) -> None:
        """Save a rollout's state durably, with the boards that have changed and those that have `reported`."""
        rows = _board_rows(number, rollout, reports, rollout.changed_boards.union(reported))

        # The server's own write, which may be repeated: it sets the state, and adds nothing.
        def write() -> None:
            with self._database.fenced_transaction() as connection:
                _update_rollouts(connection, _COLUMNS.number == number, **_state_columns(rollout))
                upsert(connection, ROLLOUT_BOARDS, rows)

        self._database.retry_while_away(write)
        rollout.mark_saved()

    def stop(self, reason: str) -> int:
        """Ask for the end of the rollout that is under way, which the server carries out; returns its number. Raises
        `ConfigError` if none is under way.
        """

        return self._update_active(lambda number, hold: {"wish": reason})

    def pause(self, reason: str) -> int:
        """Ask the server to give the release to no further board until `resume`; returns the rollout's number.

        A paused rollout keeps its first reason. Raises `ConfigError` if none is under way, or it is to stop.
        """

        # Without any reason a dash: NULL means that nobody asked for a pause.
        return self._update_active(lambda number, hold: {"hold": hold or reason or "-"})

    def resume(self) -> int:
        """Ask that a paused rollout continues; returns its number. Raises `ConfigError` if none is running,
        or it isn't paused."""

        def release(number: int, hold: str | None) -> dict[str, str | None]:
            if hold is None:
                raise ConfigError(f"rollout {number} isn't paused", hint="See `fedprune-server rollout status`.")
            return {"hold": None}

        return self._update_active(release)

    def _update_active(self, changes: Callable[[int, str | None], Mapping[str, str | None]]) -> int:
        """Change columns of the rollout under way, given its number and its `hold`; returns its number."""

        def write(connection: sql.Connection) -> int:
            latest_first = _ROLLOUTS_BY_NUMBER.where(_UNDER_WAY).order_by(None).order_by(_COLUMNS.number.desc())
            row = connection.execute(latest_first).first()
            if row is None or row.wish is not None:
                problem = "no rollout is under way" if row is None else f"rollout {row.number} is to stop already"
                raise ConfigError(problem, hint="See `fedprune-server rollout status`.")
            number = int(row.number)
            _update_rollouts(connection, _COLUMNS.number == number, **changes(number, row.hold))
            return number

        return self._run_transaction(write)

    def entries(self) -> list[RolloutEntry]:
        """All rollouts, the oldest first."""
        return self._read_entries(_ROLLOUTS_BY_NUMBER)

    def entries_under_way(self) -> list[RolloutEntry]:
        """Rollouts that have not ended: the last one, and those that it replaces and that are to stop."""
        return self._read_entries(_ROLLOUTS_BY_NUMBER.where(_UNDER_WAY))

    def requests(self) -> list[tuple[Any, ...]]:
        """Number, `wish` and `hold` of the rollouts that have not ended."""
        query = sql.select(_COLUMNS.number, _COLUMNS.wish, _COLUMNS.hold).where(_UNDER_WAY).order_by(_COLUMNS.number)
        return [tuple(row) for row in self._select(query)]

    def offer_of(self, number: int) -> ReleaseOffer | None:
        """The message to a rollout's boards; None if there is no such rollout."""
        rows = self._select(sql.select(_COLUMNS.number, _COLUMNS.offer).where(_COLUMNS.number == number))
        return self._read_offer(rows[0]) if rows else None

    def latest_entry(self) -> RolloutEntry | None:
        """The rollout that was started last."""
        entries = self._read_entries(sql.select(ROLLOUTS).order_by(_COLUMNS.number.desc()).limit(1))
        return entries[0] if entries else None

    def release_numbers(self) -> set[int]:
        return {int(row.release) for row in self._select(sql.select(_COLUMNS.release))}

    def change_count(self) -> int:
        """A number that grows with each change."""
        return int(self._select(sql.select(sql.func.coalesce(sql.func.sum(_COLUMNS.changes), 0)))[0][0])

    def _run_transaction(self, statements: Callable[[sql.Connection], int]) -> int:
        """Run a command's transaction; not again if the connection is lost, because it may have been committed."""

        def run() -> int:
            with self._database.transaction() as connection:
                return statements(connection)

        return self._database.retry_while_locked(run)

    def _select(self, query: sql.Select[Any]) -> list[Any]:
        return self._database.read(lambda connection: list(connection.execute(query)))

    def _read_entries(self, query: sql.Select[Any]) -> list[RolloutEntry]:
        def read(connection: sql.Connection) -> list[tuple[Any, list[Any]]]:
            rows = list(connection.execute(query))
            return [(row, list(connection.execute(_BOARDS_OF_ROLLOUT, {"number": row.number}))) for row in rows]

        return [self._read_entry(row, boards) for row, boards in self._database.read(read)]

    def _read_entry(self, row: Any, boards: Sequence[Any]) -> RolloutEntry:
        try:
            head = json.loads(row.rollout)
            rollout = Rollout.from_dict({**head, "boards": {board.device: json.loads(board.body) for board in boards}})
            reports = {board.device: json.loads(board.report) for board in boards if board.report is not None}
        except (StorageError, ValueError, TypeError, RecursionError) as error:
            raise self._damage_error(row.number, error) from error
        return RolloutEntry(
            number=row.number,
            started_at=row.at,
            offer=self._read_offer(row),
            includes_newcomers=row.joins,
            rollout=rollout,
            reports=reports,
            stop_reason=row.wish,
            pause_reason=row.hold,
            earlier_rollout=row.prior,
            left_release=row.leaves,
        )

    def _read_offer(self, row: Any) -> ReleaseOffer:
        try:
            message = parse_message(bytes(row.offer))
        except ProtocolError as error:
            raise self._damage_error(row.number, error) from error
        if not isinstance(message, ReleaseOffer):
            raise self._damage_error(row.number, ValueError("no offer"))
        return message

    def _damage_error(self, number: int, error: Exception) -> StorageError:
        return StorageError(f"{self._database.url}: rollout {number} is damaged ({error})")


def _check_free(connection: sql.Connection, release: int, manifest: str) -> None:
    under_way = connection.execute(sql.select(_COLUMNS.number, _COLUMNS.release).where(_UNDER_WAY)).first()
    if under_way is not None:
        raise ConfigError(
            f"rollout {under_way.number}, of release {under_way.release}, is under way",
            hint="Wait for its end, or stop it: fedprune-server rollout stop.",
        )
    # Boards remember the highest number that they have seen, and refuse lower ones as replays.
    highest = connection.execute(sql.select(sql.func.max(_COLUMNS.release))).scalar()
    if highest is not None and release < highest:
        raise ReleaseError(
            f"release {release}",
            expected=f"a number of {highest} or more, because boards have seen that one",
            hint="To go back: fedprune-server rollout back. Another old one: fedprune-server release --again.",
        )
    for offer in connection.execute(sql.select(_COLUMNS.offer).where(_COLUMNS.release == release)).scalars():
        before = parse_message(bytes(offer))
        if not isinstance(before, ReleaseOffer) or before.manifest != manifest:
            raise ReleaseError(
                f"another release {release} was rolled out before, and boards that have it would not take this one",
                hint="Release it under a higher number.",
            )


def _insert_rollout(
    connection: sql.Connection, offer: ReleaseOffer, rollout: Rollout, now: float, **values: int | None
) -> int:
    row = {"at": now, "release": offer.number, "offer": offer.to_bytes(), **_state_columns(rollout), **values}
    primary_key = connection.execute(ROLLOUTS.insert().values(row)).inserted_primary_key
    number = int(primary_key[0] if primary_key else 0)
    upsert(connection, ROLLOUT_BOARDS, _board_rows(number, rollout, {}, rollout.boards))
    return number


# `changes` counts writes, so that a reader sees that anything has changed without comparing rows.
def _update_rollouts(connection: sql.Connection, where: sql.ColumnElement[bool], **values: str | None) -> None:
    connection.execute(ROLLOUTS.update().where(where).values(changes=_COLUMNS.changes + 1, **values))


def _state_columns(rollout: Rollout) -> dict[str, str]:
    return {"phase": rollout.phase.value, "rollout": json_column(rollout.to_dict_without_boards())}


def _board_rows(
    number: int, rollout: Rollout, reports: Mapping[str, Any], names: Iterable[str]
) -> list[dict[str, Any]]:
    return [
        {
            "rollout": number,
            "device": name,
            "body": json_column(rollout.boards[name].to_dict()),
            "report": json_column(reports[name]) if name in reports else None,
        }
        for name in sorted(names)
    ]
