"""The revision of a database's schema, and the way from an older one to this version's."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sql
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fedprune.errors import StorageError

FIRST = "0001"
"""The revision of databases that were made before revisions were counted."""

_FIRST_FORMAT = "fedprune.server/1"


def latest() -> str:
    """The revision that this version reads and writes."""
    return _revisions()[0]


def revision(connection: sql.Connection, url: str) -> str | None:
    """The revision of a database; None for an empty one.

    Args:
        connection: To the database.
        url: Its name, for errors.

    Raises:
        StorageError: It is of a later version than this one, or of another program.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        return _unnumbered(connection, url)
    if found not in _revisions():
        raise StorageError(
            f"{url} was written by a later version",
            expected=f"revision {latest()} of its schema or an older one",
            got=found,
            hint="Install that version again; or, without what happened since, put the copy back that was laid beside "
            "the database when it was migrated, or restore a backup.",
        )
    return found


def migrate(connection: sql.Connection, found: str | None) -> None:
    """Bring a database to this version's schema, within the connection's transaction: wholly or not at all.

    Args:
        connection: To the database, in a transaction.
        found: What `revision` said.
    """
    config = _config()
    config.attributes["connection"] = connection
    if found == FIRST and MigrationContext.configure(connection).get_current_revision() is None:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")


def _unnumbered(connection: sql.Connection, url: str) -> str | None:
    if not sql.inspect(connection).has_table("meta"):
        return None
    value = connection.execute(sql.text("SELECT value FROM meta WHERE key = 'format'")).scalar()
    if value in (None, _FIRST_FORMAT):  # tables without a format: a crash came between the two
        return FIRST
    raise StorageError(f"{url} was written by another version", expected=_FIRST_FORMAT, got=value)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "fedprune_server.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


@cache
def _revisions() -> tuple[str, ...]:
    """All revisions, latest first."""
    return tuple(s.revision for s in ScriptDirectory.from_config(_config()).walk_revisions())
