"""The connection to a server's database: SQLite in the state folder, or PostgreSQL by URL.

A PostgreSQL server may be restarted while a server of ours runs: a transaction that was cut off is repeated once the
database is back, and one whose commit was not answered is repeated only if it was not committed.

Locks of other processes are waited for without end (`fedprune.core.lock_wait`). SQLite's locks are taken at the
beginning of a transaction: the write lock by one that may write, only a snapshot by one that reads (WAL), so that
readers wait for nobody. In PostgreSQL a session that stops within a transaction loses it, and with it its locks.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql

from fedprune.core.atomic_file import atomic_write
from fedprune.core.closeable import Closeable
from fedprune.core.errors import BusyError, ConfigError, MissingExtraError, StorageError, StorageFullError, error_reason
from fedprune.core.lock_wait import LockWait, call_wait_hook
from fedprune_server.storage.sqlite_engine import READS_OPTION, SQLITE_RETRY_S, read_only_uri, sqlite_engine
from fedprune_server.storage.sqlite_file import is_sqlite_locked
from fedprune_server.storage.tables import META, put_meta

log = logging.getLogger("fedprune.server")

# Seconds for which a database may be away before a server gives up: long enough for its restart.
MAX_AWAY_S = 60.0

# Row of `meta` in PostgreSQL: a random text that each transaction writes, so that it can be recognised after a commit
# without an answer.
COMMIT_ROW = "commit"

_PAUSE_S = 0.5

_FULL_MESSAGES = ("disk is full", "no space left", "could not extend file", "database or disk is full")
# PostgreSQL's code of a statement that waited for longer than `lock_timeout`.
_LOCK_NOT_AVAILABLE = "55P03"

_Result = TypeVar("_Result")


_CONNECT_OPTIONS = {
    # A machine that vanished is noticed: in half a minute, not in the two hours of TCP's own default.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "fedprune-server",
}

# Seconds after which PostgreSQL ends a session that does nothing within a transaction, because its process is stopped
# or its machine gone. As long as a server's lease: a leader that froze within a transaction keeps it no longer than one
# that froze outside. The pauses between our own statements are milliseconds.
TRANSACTION_IDLE_S = 15

# Seconds for which PostgreSQL itself waits for a lock. Between two such waits the process shows that it is alive, and
# can be stopped.
LOCK_TIMEOUT_S = 2.0

_SESSION_SETTINGS = {
    # The same for the database's side, which may be sending rows to a machine that has vanished.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}

_LOCK_HOLDERS_QUERY = """
SELECT concat('session ', pid, ' of ', application_name, ' from ', coalesce(host(client_addr), 'this machine'))
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND xact_start < clock_timestamp() - make_interval(secs => :seconds)
ORDER BY xact_start
"""


class LostConnectionError(StorageError):
    """The database can't be reached."""


class DatabaseLockedError(BusyError):
    """Another process holds a lock in the database."""


class Database(Closeable):
    """A database connection. Its methods raise `LostConnectionError` if the database is away, `StorageFullError` if it
    has no room, and `StorageError` if it can't be used. Raises `ConfigError` if the URL names no database that can be
    used, and `MissingExtraError` if the driver isn't installed.

    `url` has no password, for messages. `fence` is called first in each `fenced_transaction`; it raises if this process
    may no longer write. The database may be away for `max_away_s`."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        parsed = parse_database_url(url)
        self.url = hide_passwords(parsed)
        self.fence: Callable[[sql.Connection], None] | None = None
        self.max_away_s = MAX_AWAY_S
        self._unconfirmed_mark: str | None = None
        self._deferred: list[Callable[[sql.Connection], None]] = []
        self.postgresql = parsed.get_backend_name() == "postgresql"
        with translate_errors(self.url):
            make_engine = postgresql_engine if self.postgresql else sqlite_engine
            self.engine = make_engine(parsed, read_only=read_only)
        self._reading_engine = self.engine.execution_options(**{READS_OPTION: True, "postgresql_readonly": True})

    @property
    def file(self) -> Path | None:
        """SQLite's file; None for PostgreSQL."""
        return None if self.postgresql else Path(self.engine.url.database or "")

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[sql.Connection]:
        """A transaction that may write."""
        with translate_errors(self.url), self._connection(self.engine) as connection, connection.begin():
            yield connection

    @contextmanager
    def read_transaction(self) -> Iterator[sql.Connection]:
        """A transaction that only reads, and waits for no writer."""
        with translate_errors(self.url), self._connection(self._reading_engine) as connection, connection.begin():
            yield connection

    @contextmanager
    def fenced_transaction(self) -> Iterator[sql.Connection]:
        """A transaction that only the lease's holder may commit.

        If the commit of the previous one was not answered, this one must be its repetition: it is rolled back if the
        previous one turns out to be committed.
        """
        with translate_errors(self.url), self._connection(self.engine) as connection, connection.begin() as transaction:
            if self.fence is not None:
                self.fence(connection)
            was_committed = self._unconfirmed_mark is not None and commit_mark(connection) == self._unconfirmed_mark
            for work in self._deferred:
                work(connection)
            yield connection
            if was_committed:
                transaction.rollback()
            elif self.postgresql:
                token = secrets.token_hex(16)
                put_meta(connection, COMMIT_ROW, token)
                self._unconfirmed_mark = token
                transaction.commit()
        self._unconfirmed_mark = None
        self._deferred.clear()

    def defer(self, work: Callable[[sql.Connection], None]) -> None:
        """Run `work` at the beginning of the next `fenced_transaction`, and of each repetition of it."""
        self._deferred.append(work)

    def flush(self) -> None:
        """Run deferred work in a transaction of its own, if no other transaction has run it."""

        def write() -> None:
            with self.fenced_transaction():
                pass

        if self._deferred:
            self.retry_while_away(write)

    def read(self, work: Callable[[sql.Connection], _Result]) -> _Result:
        """The result of one transaction that only reads. It is repeated as by `retry_while_away`."""

        def run() -> _Result:
            with self.read_transaction() as connection:
                return work(connection)

        return self.retry_while_away(run)

    def retry_while_away(self, work: Callable[[], _Result]) -> _Result:
        """Repeat one transaction until the database can be reached, for `max_away_s` at most, and no other process
        holds a lock that it needs. `work` must change nothing in memory before its transaction is committed.
        """
        deadline = None
        try:
            while True:
                try:
                    result = self.retry_while_locked(work)
                    break
                except LostConnectionError as error:
                    now = time.monotonic()
                    if deadline is None:
                        deadline = now + self.max_away_s
                        log.warning("waiting up to %.0f s for the database: %s", self.max_away_s, error.what)
                    if now >= deadline:
                        raise LostConnectionError(
                            f"{error.what}; it was away for {self.max_away_s:.0f} s", hint=error.hint
                        ) from error
                    call_wait_hook(error.what)
                    time.sleep(_PAUSE_S)
        except BaseException:
            self._unconfirmed_mark = None  # the next transaction will be another one, not a repetition
            raise
        if deadline is not None:
            log.info("the database is back")
        return result

    def retry_while_locked(self, work: Callable[[], _Result]) -> _Result:
        """Repeat one transaction without end until no other session of PostgreSQL holds a lock that it needs. For
        SQLite's only lock the transaction itself waits at its beginning.
        """
        wait = LockWait(self.url, self._lock_holders)
        while True:
            try:
                result = work()
            except DatabaseLockedError:  # noqa: PERF203 - each turn waits anyway
                wait.note_failure()
            else:
                wait.note_success()
                return result

    def _lock_holders(self) -> list[str]:
        """PostgreSQL's sessions that have been in a transaction for longer than ours has waited for a lock."""
        if not self.postgresql:
            return []
        with suppress(StorageError), self.read_transaction() as connection:
            return lock_holders(connection)
        return []

    @contextmanager
    def _connection(self, engine: sql.Engine) -> Iterator[sql.Connection]:
        try:
            connection = engine.connect()
        except sql.exc.OperationalError as error:
            if self.postgresql:
                raise _lost_error(self.url, error) from error
            raise
        with connection:
            yield connection


def parse_database_url(url: str) -> sql.URL:
    """Parse a database's URL. Raises `ConfigError` and `MissingExtraError` as `Database`."""
    expected = "postgresql+psycopg://user@host/name or sqlite:////path"
    try:
        parsed = sql.make_url(url)
    except (sql.exc.ArgumentError, ValueError) as error:  # the latter where the port is no number
        raise ConfigError(("server", "database"), expected=expected, got="a text that is no URL") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(("server", "database"), expected=expected, got=parsed.drivername + "://...")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(("server", "database"), expected=expected, got=hide_passwords(parsed))
    if parsed.drivername != "sqlite":
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("PostgreSQL needs the package psycopg", extra="scale") from error
    return parsed


def hide_passwords(url: sql.URL) -> str:
    """A URL with its passwords replaced, for messages."""
    query = {k: "***" if "password" in k else v for k, v in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a SQLite database that may be in use. The copy is complete and on the disk, or missing, and only its owner
    can read it. Raises `StorageError` if a file can't be read or written.
    """
    with (
        atomic_write(target, private=True) as file,
        translate_errors(str(source)),
        closing(sqlite3.connect(read_only_uri(source), uri=True, timeout=SQLITE_RETRY_S)) as reader,
        closing(sqlite3.connect(file.name)) as writer,
    ):
        reader.backup(writer)
        writer.execute("PRAGMA journal_mode=DELETE")  # one file, without a log


def commit_mark(connection: sql.Connection) -> str | None:
    """The mark of the last committed transaction; waits for a transaction under way."""
    query = sql.select(META.c.value).where(META.c.key == COMMIT_ROW).with_for_update()
    value = connection.execute(query).scalar()
    return None if value is None else str(value)


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Turn errors of SQLAlchemy and SQLite into this project's own errors, whose messages name the database."""
    try:
        yield
    except (sql.exc.SQLAlchemyError, sqlite3.Error) as error:
        if getattr(error, "connection_invalidated", False):
            raise _lost_error(url, error) from error
        cause = _cause(error)
        if is_sqlite_locked(cause) or getattr(cause, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            raise DatabaseLockedError(
                f"{url} is locked by another process",
                hint="Wait until that process is done, continue it if it is stopped, or end it; nothing is lost.",
            ) from error
        if any(phrase in str(cause).lower() for phrase in _FULL_MESSAGES):
            raise StorageFullError(
                f"no room left for {url.removeprefix('sqlite:///')}",
                hint="Make room on the disk and start the server again; nothing is lost.",
            ) from error
        hint = "Run the command as the server's user; if the file is damaged, restore the server's backup."
        if not url.startswith("sqlite"):
            hint = "Look into the database's own log."
        raise StorageError(f"{url}: {error_reason(cause)}", hint=hint) from error


def _cause(error: BaseException) -> BaseException:
    """The driver's error behind an error of SQLAlchemy."""
    return getattr(error, "orig", None) or error


def _lost_error(url: str, error: Exception) -> LostConnectionError:
    return LostConnectionError(
        f"can't reach {url}: {error_reason(_cause(error))}",
        hint="Is the database running, and the URL right? Start the server again once it is there; nothing is lost.",
    )


def postgresql_engine(url: sql.URL, *, read_only: bool) -> sql.Engine:
    """An engine whose connections are tested before each use, and get the settings above as they open."""
    options = {k: v for k, v in _CONNECT_OPTIONS.items() if k not in url.query}
    engine = sql.create_engine(url, connect_args=options, pool_pre_ping=True)
    if read_only:
        engine = engine.execution_options(postgresql_readonly=True)
    sql.event.listen(engine, "connect", _tune_postgresql)
    return engine


def lock_holders(connection: sql.Connection) -> list[str]:
    """Descriptions of the sessions that have been in a transaction for longer than ours has waited for a lock."""
    sessions = connection.execute(sql.text(_LOCK_HOLDERS_QUERY), {"seconds": LOCK_TIMEOUT_S})
    return [str(text) for text in sessions.scalars()]


def _tune_postgresql(connection: Any, record: object) -> None:
    with connection.cursor() as cursor:
        # A commit must be on the disk, as with SQLite's FULL. Stricter settings (remote_apply) stay.
        cursor.execute("SELECT set_config('synchronous_commit', 'on', false) "
                       "WHERE current_setting('synchronous_commit') IN ('off', 'local')")  # fmt: skip
        limits = {
            "idle_in_transaction_session_timeout": f"{TRANSACTION_IDLE_S}s",
            "lock_timeout": f"{1000 * LOCK_TIMEOUT_S:.0f}ms",
        }
        for name, value in (_SESSION_SETTINGS | limits).items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.commit()
