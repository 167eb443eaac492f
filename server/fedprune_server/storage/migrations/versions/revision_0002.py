"""Longer names of fields in the JSON of states and settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sql
from alembic import op

from fedprune_server.storage.tables import decoded, encoded

revision = "0002"
down_revision = "0001"

_PART = {"last": "last_counted_round"}
_DEVICE = {**_PART, "asked": "last_offered_round", "cut": "missed_rounds"}
_TASK = {**_PART, "told": "in_summary", "begun": "first_report", "heard": "latest_report"}
_STATE = {"wanted": "target_updates", "opened": "opened_at", "wakes": "wake_times"}
_SERVER = {"receivers": "upload_workers"}

Body = dict[str, Any]


def upgrade() -> None:
    meta = sql.table("meta", sql.column("key"), sql.column("value"))
    for name, changed in (("devices", _device), ("tasks", lambda body: _renamed(body, _TASK))):
        table = sql.table(name, sql.column("name"), sql.column("body"))
        _rewrite(table, sql.select(table), changed)
    _rewrite(meta, sql.select(meta).where(meta.c.key == "state"), lambda body: _renamed(body, _STATE))
    _rewrite(meta, sql.select(meta).where(meta.c.key == "settings"), _settings)


def _rewrite(table: sql.TableClause, query: sql.Select[Any], changed: Callable[[Body], Body]) -> None:
    connection, (key, column) = op.get_bind(), table.c
    for name, text in connection.execute(query).all():
        body = encoded(changed(decoded(text, str(connection.engine.url))))
        connection.execute(table.update().where(key == name).values({column: body}))


def _renamed(body: Body, names: dict[str, str]) -> Body:
    return {names.get(key, key): value for key, value in body.items()}


def _device(body: Body) -> Body:
    contribution = (body.get("buffer") or {}).get("contribution")
    if contribution is not None:
        contribution["part"] = _renamed(contribution["part"], _PART)
    return _renamed(body, _DEVICE)


def _settings(body: Body) -> Body:
    return {**body, "server": _renamed(body.get("server", {}), _SERVER)}
