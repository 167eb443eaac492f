"""Opens the database of a state folder, or of a URL, and makes its tables if it is empty."""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sql

from fedprune.core.disk import open_own_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune.security.private_file import share_owner
from fedprune_server.storage.database import COMMIT_ROW, Database
from fedprune_server.storage.folder_layout import DATABASE_FILE, database_url
from fedprune_server.storage.tables import META, TABLES, put_meta, read_meta

FORMAT = "fedprune.database/2"

# Row of `meta` with the format of the tables.
_FORMAT_ROW = "format"


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder.resolve() / DATABASE_FILE}"


def private_url(folder: Path, database: str | None) -> str:
    """The URL of a folder's database. A file in the folder is created so that only its owner can read it."""
    url, path = database_url(folder, database), folder / DATABASE_FILE
    if url == sqlite_url(folder):
        with storage_errors(f"can't write {path}"):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                # A claim that root makes before the server's first start must not lock the server out.
                share_owner(path, folder)
            except FileExistsError:
                descriptor = open_own_file(path, os.O_RDWR)
                if os.fstat(descriptor).st_mode & 0o077:
                    os.fchmod(descriptor, 0o600)
                os.close(descriptor)
    return url


def open_database(folder: Path, database: str | None = None, *, read_only: bool = False) -> Database:
    """Open the database of a state folder, for tables that don't belong to a job.

    Its tables are made if it is empty, unless it is only read. Raises `StorageError` if it is damaged, of another
    version or can't be opened.
    """
    url = database_url(folder, database) if read_only else private_url(folder, database)
    return open_tables(url, create=not read_only)


def open_tables(url: str, *, create: bool, check: bool = False) -> Database:
    """Open a database, make its tables if it is empty (`create`), and look for damage (`check`)."""
    database = Database(url, read_only=not create)
    name = str(database.file or database.url)
    try:
        with database.read_transaction() as connection:
            if check and not database.postgresql:
                check_result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if check_result != "ok":
                    raise StorageError(f"{name} is damaged ({check_result})", hint="Restore the server's backup.")
            has_format = has_tables(connection, name)
        if not has_format:
            _make_missing_tables(database, create=create)
    except BaseException:
        database.close()
        raise
    return database


def _make_missing_tables(database: Database, *, create: bool) -> None:
    """Make the tables of an empty database. Raises `StorageError` without `create`."""
    if not create:
        raise StorageError(f"{database.url} holds no job yet", hint="Has a server been started on it?")

    def begin() -> None:
        with database.transaction() as connection:
            if has_tables(connection, database.url):  # another process may have been first
                return
            TABLES.create_all(connection, checkfirst=False)  # tables of that name are another program's
            put_meta(connection, _FORMAT_ROW, FORMAT)
            if database.postgresql:
                put_meta(connection, COMMIT_ROW, "")

    database.retry_while_locked(begin)


def has_tables(connection: sql.Connection, url: str) -> bool:
    """Whether the tables are there; False for an empty database. Raises `StorageError` for another version's."""
    if not sql.inspect(connection).has_table(META.name):
        return False
    stored_format = read_meta(connection, _FORMAT_ROW)
    if stored_format != FORMAT:
        raise StorageError(
            f"{url} is of another version",
            expected=FORMAT,
            got=stored_format or "none",
            hint="Run the version of fedprune that made it, or begin with a new state folder and an empty database.",
        )
    return True
