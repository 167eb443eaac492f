"""The lease on a database: only the server that took it last may write, and only while it renews it.

A lease is a row of `meta`: its holder, a token that counts all holders, and its end by the database's clock. Every
transaction of a server compares the token. So a server that was away for too long (stopped, cut off, on a machine that
hung) can write nothing once another one has taken over.

SQLite's database is on one machine, where the state folder's lock shows at once and for sure whether a server is alive.
There a lease doesn't end, and the server with the lock takes it.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sql

from fedprune.core.errors import BusyError, StorageError
from fedprune_server.storage.database import Database, DatabaseLockedError, LostConnectionError
from fedprune_server.storage.folder_layout import database_url, stored_url
from fedprune_server.storage.tables import META, put_meta, read_meta

log = logging.getLogger("fedprune.server")

LEASE_ROW = "lease"

# Row of `meta`: a random id of a PostgreSQL database, which no copy of it in another database has.
DATABASE_ID_ROW = "database-id"

# Seconds of a lease, in which a living server renews it five times: a dead server is replaced in little more.
LEASE_S = 15.0
RENEWAL_INTERVAL_S = 3.0

# Minimum seconds between two queries of `trouble`, which a readiness probe may call often.
_CHECK_INTERVAL_S = 1.0


class LeaseLostError(StorageError):
    """Another server has taken over."""


@dataclass(frozen=True)
class _LeaseRow:
    holder: str = ""
    token: int = 0
    expires: float | None = 0.0


class Lease:
    """A server's lease on a database, for the server that holds the lock of the state folder `folder`.

    `stopping` is set if another server has taken over. `shared` is an id of the database if several servers can share
    it, from when the lease is taken; None for SQLite."""

    def __init__(self, url: str, folder: Path, stopping: threading.Event | None = None) -> None:
        self._stopping = stopping or threading.Event()
        self.shared: str | None = None
        self._url, self._database = url, Database(url)
        self._reader: Database | None = None
        self._last_check: tuple[float, str] | None = None
        self._check_lock = threading.Lock()
        self._holder = _holder_name(folder)
        self._token: int | None = None
        self._is_lost = False
        self._last_row: _LeaseRow | None = None
        self._last_row_expired = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def wait(self, *, standby: bool) -> None:
        """Take PostgreSQL's lease, if the database exists already, once no other server holds it.

        Raises `BusyError` if another server is found to hold it, unless this one stands by: then it waits for as long
        as necessary.
        """
        if not self._database.postgresql:  # the folder's lock, which the caller has, decides instead
            return
        logged_holder = ""
        while not self._database.retry_while_away(lambda: not self._has_table() or self._try_take()):
            holder = self._last_row.holder if self._last_row else ""
            if not standby and not self._last_row_expired:
                raise self._busy_error()
            if standby and holder != logged_holder:
                log.info("standing by: %s has the job", holder.rpartition(":")[0])
                logged_holder = holder
            time.sleep(RENEWAL_INTERVAL_S + 1)
        if logged_holder:
            log.warning("taking over from %s", logged_holder.rpartition(":")[0])

    def take(self) -> None:
        """Take the lease of an existing database, unless `wait` has. Raises `BusyError` if another server holds it."""
        if self._token is None and not self._database.retry_while_away(self._try_take):
            raise self._busy_error()
        if self._database.postgresql:
            self.shared = self._database.retry_while_away(self._database_id)
            self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
            self._thread.start()

    def check(self, connection: sql.Connection) -> None:
        """Raise `LeaseLostError`, within a transaction that is about to write, if another server has taken over."""
        if _read_row(connection, share_lock=True).token != self._token:
            self._is_lost = True
            raise self._lost_error()

    def confirm(self) -> None:
        """Raise `LeaseLostError` if another server was found to have taken over."""
        if self._is_lost:
            raise self._lost_error()

    def trouble(self) -> str:
        """The reason for which this server can't write to its database; empty if it can. May be called often and from
        any thread: it locks nothing in the database, and queries it once a second at most."""
        with self._check_lock:
            now = time.monotonic()
            if self._last_check is None or now - self._last_check[0] >= _CHECK_INTERVAL_S:
                self._last_check = now, self._check_trouble()
            return self._last_check[1]

    def _check_trouble(self) -> str:
        try:
            if self._reader is None:
                self._reader = Database(self._url, read_only=True)
            with self._reader.read_transaction() as connection:
                is_lost = self._is_lost or _read_row(connection, lock=False).token != self._token
        except StorageError as error:
            return str(error)
        return "another server has taken the job over" if is_lost else ""

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(StorageError):  # a lease that can't be given back ends by itself
            # SQLite's lease needn't be given back, and this would wait for a lock that another process may hold.
            if self._token is not None and not self._is_lost and self._database.postgresql:
                with self._database.transaction() as connection:
                    row = _read_row(connection)
                    if row.token == self._token:
                        _write_row(connection, _LeaseRow(row.holder, row.token, 0.0))
        self._database.close()
        with self._check_lock:
            if self._reader is not None:
                self._reader.close()

    def _database_id(self) -> str:
        with self._database.transaction() as connection:
            self.check(connection)
            database_id = read_meta(connection, DATABASE_ID_ROW)
            if database_id is None:
                database_id = secrets.token_hex(16)
                put_meta(connection, DATABASE_ID_ROW, database_id)
        return database_id

    def _has_table(self) -> bool:
        with self._database.read_transaction() as connection:
            return sql.inspect(connection).has_table("meta")

    def _try_take(self) -> bool:
        """Take the lease if it was given back, has expired, or was held from this folder, whose lock this server has.

        A lease counts as expired when two queries find it unchanged and expired, with enough time for a renewal in
        between: the database may have been away from all servers, or its clock been set.
        """
        with self._database.transaction() as connection:
            row, now = _read_row(connection), _database_time(connection)
            has_expired = row.expires is not None and row.expires <= now
            is_free = row.token == 0 or row.expires == 0 or row.holder == self._holder or not self._database.postgresql
            if is_free or (has_expired and row == self._last_row):
                expires = now + LEASE_S if self._database.postgresql else None
                _write_row(connection, _LeaseRow(self._holder, row.token + 1, expires))
                self._token = row.token + 1
                return True
            self._last_row, self._last_row_expired = row, has_expired
        return False

    def _renew(self) -> None:
        """Renew the lease until the end, and stop the server if another one has it."""
        while not self._closed.wait(RENEWAL_INTERVAL_S):
            try:
                with self._database.transaction() as connection:
                    row = _read_row(connection)
                    if row.token != self._token:
                        self._is_lost = True
                        raise self._lost_error()
                    _write_row(connection, _LeaseRow(row.holder, row.token, _database_time(connection) + LEASE_S))
            # The server's transactions decide for how long the database may be away.
            except (LostConnectionError, DatabaseLockedError):  # noqa: PERF203 - each turn waits anyway
                continue
            except StorageError as error:
                log.error("%s", error)
                if self._is_lost:
                    self._stopping.set()
                    return

    def _busy_error(self) -> BusyError:
        holder = self._last_row.holder.rpartition(":")[0] if self._last_row else "another server"
        return BusyError(
            f"{holder} has the job of {self._database.url}",
            hint="Stop it; or start this one with --standby, which takes over when that one ends.",
        )

    def _lost_error(self) -> LeaseLostError:
        return LeaseLostError(
            f"another server has taken the job of {self._database.url} over",
            hint="This one was away for too long. Nothing is lost; start it again with --standby.",
        )


def leader_elsewhere(folder: Path) -> str:
    """Host and folder of the server that runs a folder's job from another folder; empty if there is none.

    Only servers that share a PostgreSQL database have a folder each. Raises `StorageError` if the database can't be
    read.
    """
    url = database_url(folder)
    if stored_url(folder) is None:
        return ""
    with Database(url, read_only=True) as database:
        if not database.postgresql:
            return ""
        with database.read_transaction() as connection:
            row, now = _read_row(connection, lock=False), _database_time(connection)
    is_alive = row.expires is not None and row.expires > now
    return row.holder.rpartition(":")[0] if is_alive and row.holder != _holder_name(folder) else ""


def _holder_name(folder: Path) -> str:
    return f"{socket.gethostname()}:{folder.resolve()}:{folder.stat().st_ino}"


_SELECT_LEASE = sql.select(META.c.value).where(META.c.key == LEASE_ROW)
# Whoever writes the lease locks its row against all others; transactions that only compare the token share it.
_SELECT_LOCKED, _SELECT_SHARED = _SELECT_LEASE.with_for_update(), _SELECT_LEASE.with_for_update(read=True)


def _read_row(connection: sql.Connection, *, share_lock: bool = False, lock: bool = True) -> _LeaseRow:
    text = connection.execute((_SELECT_SHARED if share_lock else _SELECT_LOCKED) if lock else _SELECT_LEASE).scalar()
    try:
        return _LeaseRow() if text is None else _LeaseRow(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise StorageError("the database's lease is damaged", hint="Delete the row `lease` of `meta`.") from error


def _write_row(connection: sql.Connection, row: _LeaseRow) -> None:
    put_meta(connection, LEASE_ROW, json.dumps(vars(row)))


def _database_time(connection: sql.Connection) -> float:
    """Seconds since 1970 by the database's clock, the same for all servers."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar() or 0)
