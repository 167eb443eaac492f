"""The connection to a server's database: SQLite in the state folder, or PostgreSQL by URL.

A PostgreSQL server may be started again under a running server of ours: a transaction that was cut off is repeated once
the database is back, and one whose commit was not answered is repeated only if it is not there.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql

from fedprune.core.atomic_file import appearing
from fedprune.core.closing import Closing
from fedprune.core.errors import ConfigError, MissingExtraError, StorageError, StorageFullError
from fedprune_server.storage.tables import META, put_meta

log = logging.getLogger("fedprune.server")

PATIENCE_S = 60.0
"""For how long a database that was reached before may be away."""

MARK = "commit"
"""Row of `meta` in PostgreSQL: a random text that each transaction writes, to know it again."""

_PAUSE_S = 0.5
_BUSY_S = 10
_FULL = ("disk is full", "no space left", "could not extend file", "database or disk is full")
_POSTGRESQL = {
    # A machine that vanished is noticed: in half a minute, not in the two hours of TCP's own default.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "fedprune-server",
}

_Result = TypeVar("_Result")


class LostConnectionError(StorageError):
    """The database can't be reached."""


class Database(Closing):
    """A database connection. Its methods raise `LostConnectionError` if the database is away, `StorageFullError` if it
    has no room, and `StorageError` if it can't be used.

    Attributes:
        url: As it may be shown, without a password.
        fence: Called in each transaction that writes, before anything else; raises if this process may not.
        patience_s: For how long the database may be away.

    Raises:
        ConfigError: The URL names no database that can be used.
        MissingExtraError: The driver isn't installed.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        parsed = check_url(url)
        self.url = shown(parsed)
        self.fence: Callable[[sql.Connection], None] | None = None
        self.patience_s = PATIENCE_S
        self._doubtful: str | None = None
        self._deferred: list[Callable[[sql.Connection], None]] = []
        self.postgresql = parsed.get_backend_name() == "postgresql"
        with translated(self.url):
            if self.postgresql:
                self.engine = _postgresql(parsed, read_only=read_only)
            elif read_only:
                self.engine = _read_only(parsed)
            else:
                self.engine = sql.create_engine(parsed)
                sql.event.listen(self.engine, "connect", _tune_sqlite)
                sql.event.listen(self.engine, "begin", _begin_sqlite)

    @property
    def file(self) -> Path | None:
        """SQLite's file; None for PostgreSQL."""
        return None if self.postgresql else Path(self.engine.url.database or "")

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[sql.Connection]:
        with translated(self.url), self._connection() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction that only the lease's holder may commit.

        If the previous one broke off as it was committed, this one must be the same again: it is rolled back if that
        one is found to be committed.
        """
        with translated(self.url), self._connection() as connection, connection.begin() as transaction:
            if self.fence is not None:
                self.fence(connection)
            there = self._doubtful is not None and mark(connection) == self._doubtful
            for work in self._deferred:
                work(connection)
            yield connection
            if there:
                transaction.rollback()
            elif self.postgresql:
                token = secrets.token_hex(16)
                put_meta(connection, MARK, token)
                self._doubtful = token
                transaction.commit()
        self._doubtful = None
        self._deferred.clear()

    def defer(self, work: Callable[[sql.Connection], None]) -> None:
        """Run `work` in the next transaction of `writing`, before anything else. If that one is repeated, so is it."""
        self._deferred.append(work)

    def flush(self) -> None:
        """Run what was deferred in a transaction of its own, if no other one has run it."""

        def write() -> None:
            with self.writing():
                pass

        if self._deferred:
            self.patiently(write)

    def patiently(self, work: Callable[[], _Result]) -> _Result:
        """Repeat one transaction until the database can be reached, for `patience_s` at most; its effects on memory
        come after that.
        """
        until = None
        while True:
            try:
                result = work()
            except LostConnectionError as error:  # noqa: PERF203 - each turn waits anyway
                now = time.monotonic()
                if until is None:
                    until = now + self.patience_s
                    log.warning("waiting up to %.0f s for the database: %s", self.patience_s, error.what)
                if now >= until:
                    self._doubtful = None
                    raise LostConnectionError(
                        f"{error.what}; it was away for {self.patience_s:.0f} s", hint=error.hint
                    ) from error
                time.sleep(_PAUSE_S)
            except BaseException:
                self._doubtful = None
                raise
            else:
                if until is not None:
                    log.info("the database is back")
                return result

    @contextmanager
    def _connection(self) -> Iterator[sql.Connection]:
        try:
            connection = self.engine.connect()
        except sql.exc.OperationalError as error:
            if self.postgresql:
                raise _lost(self.url, error) from error
            raise
        with connection:
            yield connection


def check_url(url: str) -> sql.URL:
    """Parse a database's URL. Raises `ConfigError` and `MissingExtraError` as `Database`."""
    expected = "postgresql+psycopg://user@host/name or sqlite:////path"
    try:
        parsed = sql.make_url(url)
    except (sql.exc.ArgumentError, ValueError) as error:  # the latter where the port is no number
        raise ConfigError("server: database", expected=expected, got="a text that is no URL") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError("server: database", expected=expected, got=parsed.drivername + "://...")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError("server: database", expected=expected, got=shown(parsed))
    if parsed.drivername != "sqlite":
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("PostgreSQL needs the package psycopg", extra="scale") from error
    return parsed


def shown(url: sql.URL) -> str:
    """A URL without passwords."""
    query = {k: "***" if "password" in k else v for k, v in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a SQLite database that may be in use; only the owner can read the copy, which is complete and on the disk,
    or missing. Raises `StorageError` if it can't be read or written.
    """
    with appearing(target, private=True) as partial, translated(str(source)):
        _copy_pages(source, partial)


def _copy_pages(source: Path, target: Path) -> None:
    with (
        closing(sqlite3.connect(reading_uri(source), uri=True, timeout=_BUSY_S)) as reader,
        closing(sqlite3.connect(target)) as writer,
    ):
        reader.backup(writer)
        writer.execute("PRAGMA journal_mode=DELETE")  # one file, without a log


def mark(connection: sql.Connection) -> str | None:
    """The mark of the last committed transaction; waits for one under way."""
    query = sql.select(META.c.value).where(META.c.key == MARK).with_for_update()
    value = connection.execute(query).scalar()
    return None if value is None else str(value)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn errors of SQLAlchemy and SQLite into this project's own, about the database of this name."""
    try:
        yield
    except (sql.exc.SQLAlchemyError, sqlite3.Error) as error:
        if getattr(error, "connection_invalidated", False):
            raise _lost(url, error) from error
        text = _first_line(error)
        if any(words in text.lower() for words in _FULL):
            raise StorageFullError(
                f"no room left for {url.removeprefix('sqlite:///')}",
                hint="Make room on the disk and start the server again; nothing is lost.",
            ) from error
        hint = "Run the command as the server's user; if the file is damaged, restore the server's backup."
        if not url.startswith("sqlite"):
            hint = "Look into the database's own log."
        raise StorageError(f"{url}: {text}", hint=hint) from error


def _lost(url: str, error: Exception) -> LostConnectionError:
    return LostConnectionError(
        f"can't reach {url}: {_first_line(error)}",
        hint="Is the database running, and the URL right? Start the server again once it is there; nothing is lost.",
    )


def _first_line(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


def _postgresql(url: sql.URL, *, read_only: bool) -> sql.Engine:
    options = {k: v for k, v in _POSTGRESQL.items() if k not in url.query}
    engine = sql.create_engine(url, connect_args=options, pool_pre_ping=True)
    if read_only:
        engine = engine.execution_options(postgresql_readonly=True)
    sql.event.listen(engine, "connect", _tune_postgresql)
    return engine


def _tune_postgresql(connection: Any, record: object) -> None:
    with connection.cursor() as cursor:
        # As SQLite's FULL; stricter settings (remote_apply) stay.
        cursor.execute("SELECT set_config('synchronous_commit', 'on', false) "
                       "WHERE current_setting('synchronous_commit') IN ('off', 'local')")  # fmt: skip
    connection.commit()


def _read_only(url: sql.URL) -> sql.Engine:
    path = Path(url.database or "")
    return sql.create_engine(
        url, creator=lambda: sqlite3.connect(reading_uri(path), uri=True, timeout=_BUSY_S, check_same_thread=False)
    )


def reading_uri(path: Path) -> str:
    """URI of a file for reading, also on a read-only disk. Raises `StorageError` if what was written last can't be read
    there.
    """
    _roll_back(path)
    uri = f"file:{urllib.parse.quote(str(path))}?mode=ro"
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    if os.access(path.parent, os.W_OK, effective_ids=True) or not path.exists() or (log.exists() and index.exists()):
        return uri
    if log.exists() and log.stat().st_size:
        raise StorageError(
            f"{path}: {index.name} is missing, which can't be made in a folder that can't be written to",
            hint="Copy the state folder to where it can be written to, and look there.",
        )
    return f"{uri}&immutable=1"  # SQLite would make both files to read it; without a log no process has it open


def _roll_back(path: Path) -> None:
    """Undo a transaction that a crash cut off before the file had its log, which a reader can't."""
    if path.with_name(path.name + "-journal").exists() and os.access(path, os.W_OK, effective_ids=True):
        with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()


def _tune_sqlite(connection: Any, record: object) -> None:
    # Python's own beginning of transactions leaves out changes of the schema: SQLAlchemy begins them, below.
    connection.isolation_level = None
    cursor = connection.cursor()
    # FULL: a commit is on the disk, not only in the system's cache, before anything that follows from it is done.
    for line in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={_BUSY_S * 1000}"):
        cursor.execute(f"PRAGMA {line}")
    cursor.close()


def _begin_sqlite(connection: sql.Connection) -> None:
    # With the write lock at once: a transaction that asks for it later is refused if another one has written meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
