"""A table of rounds' participants, which were part of the rounds' summaries."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

from fedprune_server.storage.tables import decoded, encoded

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    participants = op.create_table(
        "participants",
        sql.Column("round", sql.Integer, primary_key=True, autoincrement=False),
        sql.Column("device", sql.String(64), primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
    )
    op.add_column("rounds", sql.Column("participants", sql.Integer, nullable=False, server_default="0"))
    rounds = sql.table("rounds", sql.column("round"), sql.column("summary"), sql.column("participants"))
    connection = op.get_bind()
    for number in connection.execute(sql.select(rounds.c.round)).scalars().all():
        this = rounds.c.round == number
        text = connection.execute(sql.select(rounds.c.summary).where(this)).scalar()
        summary = decoded(str(text), str(connection.engine.url))
        devices = summary.pop("devices", {})
        rows = [{"round": number, "device": name, "body": encoded(part)} for name, part in devices.items()]
        if rows:
            connection.execute(participants.insert(), rows)
        change = rounds.update().where(this).values(summary=encoded(summary), participants=len(rows))
        connection.execute(change)
