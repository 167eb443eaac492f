"""The tables of format `fedprune.server/1`, which were made without Alembic at first."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision: str | None = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "meta",
        sql.Column("key", sql.String(64), primary_key=True),
        sql.Column("value", sql.Text, nullable=False),
    )
    op.create_table(
        "events",
        sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("at", sql.Float, nullable=False),
        sql.Column("type", sql.String(64), nullable=False),
        sql.Column("body", sql.Text, nullable=False),
    )
    op.create_table(
        "devices",
        sql.Column("name", sql.String(64), primary_key=True),
        sql.Column("online", sql.Boolean, nullable=False),
        sql.Column("profile", sql.String(64), nullable=False),
        sql.Column("samples", sql.BigInteger, nullable=False),
        sql.Column("widths", sql.Text, nullable=False),
        sql.Column("plan", sql.Text, nullable=False),
        sql.Column("excluded", sql.Text, nullable=False),
        sql.Column("body", sql.Text, nullable=False),
        sql.Column("bytes_down", sql.BigInteger, nullable=False),
        sql.Column("bytes_up", sql.BigInteger, nullable=False),
    )
    op.create_table(
        "rounds",
        sql.Column("round", sql.Integer, primary_key=True),
        sql.Column("at", sql.Float, nullable=False),
        sql.Column("model", sql.String(64), nullable=False),
        sql.Column("metrics", sql.Text, nullable=False),
        sql.Column("summary", sql.Text, nullable=False),
    )
