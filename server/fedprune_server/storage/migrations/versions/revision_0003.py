"""Members, revocations and replay floors get a table, which servers of one PostgreSQL database share."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    """Make it, empty: the server that has the job fills it at its start."""
    op.create_table(
        "identity",
        sql.Column("kind", sql.String(16), primary_key=True),
        sql.Column("key", sql.String(256), primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
    )
