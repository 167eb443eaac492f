"""The first tables."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision: str | None = None


def upgrade() -> None:
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
    op.create_table(
        "tasks",
        sql.Column("name", sql.String(64), primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
    )
    op.create_table(
        "rollouts",
        sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("at", sql.Float, nullable=False),
        sql.Column("release", sql.BigInteger, nullable=False),
        sql.Column("offer", sql.LargeBinary, nullable=False),
        sql.Column("joins", sql.Boolean, nullable=False),
        sql.Column("phase", sql.String(16), nullable=False),
        sql.Column("rollout", sql.Text, nullable=False),
        sql.Column("reports", sql.Text, nullable=False),
        sql.Column("wish", sql.Text),
        sql.Column("hold", sql.Text),
        sql.Column("prior", sql.Integer),
        sql.Column("leaves", sql.BigInteger),
        sql.Column("changes", sql.Integer, nullable=False),
    )
    op.create_table(
        "identity",
        sql.Column("kind", sql.String(16), primary_key=True),
        sql.Column("key", sql.String(256), primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
    )
