"""Tables of the site's members instead of copies of their rows, which were in one table of JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import sqlalchemy as sql
from alembic import op

from fedprune.core.errors import StorageError, shown
from fedprune_server.storage.tables import decoded, encoded

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    members = op.create_table(
        "members",
        sql.Column("device", sql.String(64), primary_key=True),
        sql.Column("key", sql.String(64), primary_key=True, index=True),
        sql.Column("status", sql.String(16), nullable=False),
        sql.Column("asked", sql.BigInteger, nullable=False),
        sql.Column("decided", sql.BigInteger),
        sql.Column("server_key", sql.String(64)),
        sql.Column("authority", sql.String(64)),
    )
    claims = op.create_table(
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
    epochs = op.create_table(
        "epochs",
        sql.Column("key", sql.String(64), primary_key=True),
        sql.Column("stream", sql.String(512), primary_key=True),
        sql.Column("epoch", sql.BigInteger, nullable=False),
    )
    register = op.create_table(
        "register",
        sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("digest", sql.String(64), nullable=False, unique=True),
        sql.Column("line", sql.Text, nullable=False),
    )
    connection = op.get_bind()
    shared = _shared(connection)
    for table, kind in ((members, "device"), (claims, "claim"), (epochs, "epoch"), (register, "register")):
        if rows := shared[kind]:
            connection.execute(table.insert(), rows)
    if earlier := shared[_EARLIER]:
        meta = sql.table("meta", sql.column("key"), sql.column("value"))
        found = {name: sorted(row["id"] for row in earlier if row["name"] == name) for name in _NAMES.values()}
        connection.execute(meta.insert().values(key="earlier-keys", value=encoded(found)))
    op.drop_table("identity")


_EARLIER = "earlier"
_NAMES = {"earlier key": "keys", "earlier issuer": "authorities"}

Row = dict[str, Any]


def _shared(connection: sql.Connection) -> dict[str, list[Row]]:
    """Rows that a server has written for its successors; without them revoked boards would become members again."""
    found: dict[str, list[Row]] = {kind: [] for kind in (*_READ, _EARLIER)}
    table = sql.table("identity", sql.column("kind"), sql.column("key"), sql.column("body"))
    for kind, key, body in connection.execute(sql.select(table).order_by(table.c.kind, table.c.key)):
        value = decoded(body, str(connection.engine.url))
        if kind in _NAMES:
            found[_EARLIER].append({"name": _NAMES[kind], "id": key})
            continue
        try:
            found[kind].append(_READ[kind](value))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                "a shared row of the identity is damaged",
                got=f"{shown(kind)} {shown(key)}",
                hint="Restore the server's backup, or the database's.",
            ) from error
    return found


def _device(value: list[Any]) -> Row:
    row = dict(zip(("device", "key", "status", "asked", "decided"), value, strict=True))
    if row["status"] not in ("approved", "waiting", "revoked"):
        raise ValueError(row["status"])
    return row


def _claim(value: list[Any]) -> Row:
    row = dict(zip(("id", "key", "device", "made", "expires", "used", "used_at"), value, strict=True))
    return {**row, "key": bytes.fromhex(row["key"])}


def _epoch(value: list[Any]) -> Row:
    return dict(zip(("key", "stream", "epoch"), value, strict=True))


def _line(value: str) -> Row:
    return {"digest": hashlib.sha256(value.encode()).hexdigest(), "line": value}


_READ: dict[str, Callable[[Any], Row]] = {"device": _device, "claim": _claim, "epoch": _epoch, "register": _line}
