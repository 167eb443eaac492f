"""Tables of rounds' participants, which were part of the rounds' summaries, and of rollouts' boards, which were part of
the rollouts' records."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

from fedprune_server.storage.tables import decoded, encoded

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    _split_rounds()
    _split_rollouts()


def _split_rounds() -> None:
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


def _split_rollouts() -> None:
    boards = op.create_table(
        "rollout_boards",
        sql.Column("rollout", sql.Integer, primary_key=True, autoincrement=False),
        sql.Column("device", sql.String(64), primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
        sql.Column("report", sql.Text),
    )
    rollouts = sql.table("rollouts", sql.column("number"), sql.column("rollout"), sql.column("reports"))
    connection = op.get_bind()
    url = str(connection.engine.url)
    for number, text, reports_text in connection.execute(sql.select(rollouts)).all():
        head, reports = decoded(str(text), url), decoded(str(reports_text), url)
        rows = [
            {
                "rollout": number,
                "device": name,
                "body": encoded(body),
                "report": encoded(reports[name]) if name in reports else None,
            }
            for name, body in head.pop("boards", {}).items()
        ]
        if rows:
            connection.execute(boards.insert(), rows)
        connection.execute(rollouts.update().where(rollouts.c.number == number).values(rollout=encoded(head)))
    op.drop_column("rollouts", "reports")
