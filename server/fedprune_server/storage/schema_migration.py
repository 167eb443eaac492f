"""The revision of a database's schema, and the way from an older one to this version's.

The steps are Alembic's. It is loaded when there is a step to take: most starts find a database of this version, or make
a new one, and loading it takes longer than both.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from typing import TYPE_CHECKING

import sqlalchemy as sql

from fedprune.core.errors import StorageError
from fedprune_server.storage.migrations import versions
from fedprune_server.storage.tables import TABLES

if TYPE_CHECKING:
    from alembic.config import Config

_NUMBERED = sql.Table(
    "alembic_version",
    sql.MetaData(),
    sql.Column("version_num", sql.String(32), nullable=False),
    sql.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""Alembic's own: one row with the database's revision."""

_FILES = "revision_"
"""The prefix of the files of steps, before their revisions."""


def latest() -> str:
    """The revision of this version."""
    return _revisions()[0]


def revision(connection: sql.Connection, url: str) -> str | None:
    """The revision of a database; None for an empty one. Raises `StorageError` if it is of a later version or of
    another program.
    """
    if not sql.inspect(connection).has_table(_NUMBERED.name):
        return None
    number = connection.execute(sql.select(_NUMBERED.c.version_num)).scalar()
    found = None if number is None else str(number)
    if found is not None and found not in _revisions():
        raise StorageError(
            f"{url} was written by a later version",
            expected=f"revision {latest()} of its schema or an older one",
            got=found,
            hint="Install that version again; or, without what happened since, restore the copy that was made next to "
            "the database when it was migrated, or restore a backup.",
        )
    return found


def migrate(connection: sql.Connection, found: str | None) -> None:
    """Migrate a database of the revision `found` to this version's schema within the connection's transaction."""
    if found is None:
        TABLES.create_all(connection, checkfirst=False)  # tables of that name are another program's
        _NUMBERED.create(connection)
        connection.execute(_NUMBERED.insert().values(version_num=latest()))
        return
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "fedprune_server.storage:migrations")
    config.set_main_option("path_separator", "os")
    return config


@cache
def _revisions() -> tuple[str, ...]:
    """All revisions, newest first."""
    names = (m.name for m in pkgutil.iter_modules(versions.__path__))
    return tuple(sorted((n.removeprefix(_FILES) for n in names if n.startswith(_FILES)), reverse=True))
