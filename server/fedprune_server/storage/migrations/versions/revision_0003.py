"""Tables of the site's members instead of copies of their rows."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "members",
        sql.Column("device", sql.String(64), primary_key=True),
        sql.Column("key", sql.String(64), primary_key=True, index=True),
        sql.Column("status", sql.String(16), nullable=False),
        sql.Column("asked", sql.BigInteger, nullable=False),
        sql.Column("decided", sql.BigInteger),
        sql.Column("server_key", sql.String(64)),
        sql.Column("authority", sql.String(64)),
    )
    op.create_table(
        "claims",
        sql.Column("id", sql.String(64), primary_key=True),
        sql.Column("key", sql.LargeBinary, nullable=False),
        sql.Column("device", sql.String(64)),
        sql.Column("made", sql.BigInteger, nullable=False),
        sql.Column("expires", sql.BigInteger, nullable=False),
        sql.Column("used", sql.String(64)),
        sql.Column("used_at", sql.BigInteger),
    )
    op.create_table(
        "answers",
        sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("request", sql.String(64), nullable=False, unique=True),
        sql.Column("device", sql.String(64), nullable=False, index=True),
        sql.Column("answer", sql.LargeBinary, nullable=False),
    )
    op.create_table(
        "epochs",
        sql.Column("key", sql.String(64), primary_key=True),
        sql.Column("stream", sql.String(512), primary_key=True),
        sql.Column("epoch", sql.BigInteger, nullable=False),
    )
    op.create_table(
        "register",
        sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("digest", sql.String(64), nullable=False, unique=True),
        sql.Column("line", sql.Text, nullable=False),
    )
    op.drop_table("identity")
