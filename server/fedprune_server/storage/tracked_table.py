"""A roll's entries as rows of a table: only those are written that have become others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import sqlalchemy as sql

from fedprune.jobs.change_tracking import TrackedDict, TrackedEntry
from fedprune_server.storage.schema import decoded, upsert

E = TypeVar("E", bound=TrackedEntry)
Row = dict[str, Any]


class TrackedTable(Generic[E]):
    """What of a roll lies in a table.

    Args:
        table: With a column `name` and one `body`, by which rows are compared.
        row: An entry's row.
    """

    def __init__(self, table: sql.Table, row: Callable[[str, E], Row]) -> None:
        self._table = table
        self._row = row
        self._known: dict[str, int] = {}

    def load(self, connection: sql.Connection, url: str) -> dict[str, Any]:
        """All rows' bodies, by name.

        Raises:
            StorageError: One is damaged; the message names the database.
        """
        columns = self._table.c
        rows = connection.execute(sql.select(columns.name, columns.body)).all()
        self._known = {name: hash(body) for name, body in rows}
        return {name: decoded(body, url) for name, body in rows}

    def changes(self, roll: TrackedDict[E], *, anew: bool) -> dict[str, Row | None]:
        """Rows that are not in the table yet as they are now; None for those that are to go.

        Args:
            roll: The entries.
            anew: Look at all of them, not only at those that say that they have changed.
        """
        found: dict[str, Row | None] = {}
        for name in roll.keys() | self._known.keys() if anew else roll.changed:
            entry = roll.get(name)
            row = None if entry is None else self._row(name, entry)
            if self._known.get(name) != (None if row is None else hash(row["body"])):
                found[name] = row
        return found

    def write(self, connection: sql.Connection, rows: Mapping[str, Row | None]) -> None:
        """Write what `changes` gave."""
        upsert(connection, self._table, [row for row in rows.values() if row is not None])
        gone = [{"gone": name} for name, row in rows.items() if row is None]
        if gone:
            connection.execute(self._table.delete().where(self._table.c.name == sql.bindparam("gone")), gone)

    def written(self, rows: Mapping[str, Row | None]) -> None:
        """What was written is committed."""
        for name, row in rows.items():
            if row is None:
                self._known.pop(name, None)
            else:
                self._known[name] = hash(row["body"])
