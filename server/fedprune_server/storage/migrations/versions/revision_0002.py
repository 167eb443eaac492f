"""Devices' parts in the current round get a table of their own, so that an event doesn't write all of them."""

from __future__ import annotations

import json

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    """Make it, and move there what the state held."""
    tasks = op.create_table(
        "tasks",
        sql.Column("name", sql.String(64), primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
    )
    meta = sql.table("meta", sql.column("key", sql.String), sql.column("value", sql.Text))
    connection = op.get_bind()
    text = connection.execute(sql.select(meta.c.value).where(meta.c.key == "state")).scalar()
    if text is None:
        return
    state = json.loads(text)
    rows = [{"name": name, "body": _encoded(body)} for name, body in state["tasks"].items()]
    if rows:
        op.bulk_insert(tasks, rows)
    value = _encoded({**state, "tasks": {}})
    connection.execute(sql.update(meta).where(meta.c.key == "state").values(value=value))


def _encoded(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
