"""Takes operators' orders in the console's process: checks permissions and limits, queues orders, shows answers."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from heapq import nsmallest
from typing import Any

from fedprune.core.errors import ProtocolError, did_you_mean
from fedprune.core.records import convert_record
from fedprune.core.text import one_line
from fedprune_server.web.audit import Audit
from fedprune_server.web.auth.roles import ORDER_KINDS, READING_ORDERS, has_role, is_accepted
from fedprune_server.web.auth.sessions import OperatorSession
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.order_queue import (
    EXPIRED,
    ORDER_ARGUMENTS,
    ORDER_LIFETIME_S,
    WITHDRAWN,
    Order,
    OrderAnswer,
    answer_statements,
)

# Bytes of an order, as stored: a rollout to a hundred named boards has some 7,000.
MAX_ORDER_BYTES = 8192

MAX_WAITING = 100
MAX_PER_MINUTE = 60
# Answered orders that are kept for pages that still show them; the audit log keeps all.
MAX_KEPT_ORDERS = 500

# Orders about boards that may have asked to join a moment ago, and aren't published yet.
_JOINING_ORDERS = frozenset({"approve", "deny"})

# An expired order is answered after this pause: until then the server may be taking it, by a clock that it read before.
_GRACE_S = 30.0

# Characters of each argument of a refused order in the audit log: they were not checked, and may be of any length.
_MAX_NOTED_LENGTH = 128

# Names that a refusal lists as an example.
_MAX_NAMES_LISTED = 8

# Among more names no similar one is looked for: comparing many takes long enough to delay all other requests.
_MAX_NAMES_COMPARED = 1000


class RefusedError(Exception):
    """An order was refused; `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class OrderService:
    """Checks orders, adds them to the database and shows their answers. Threads may share it."""

    def __init__(
        self, view: FleetView, audit: Audit, database: ConsoleDatabase, clock: Callable[[], float] = time.time
    ) -> None:
        self._view = view
        self._audit = audit
        self._database = database
        self._clock = clock
        self._order_times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()  # one order after the other, so that limits hold for all at once

    def give(self, session: OperatorSession, address: str, body: object, expires_s: float = ORDER_LIFETIME_S) -> int:
        """Add an order, which the server may take within `expires_s`; returns its number.

        Raises `RefusedError` if the order is invalid, this operator may not give it, or too many are waiting;
        `StorageError` if the disk fails or is full.
        """
        if not isinstance(body, Mapping) or not set(body) <= {"order", *ORDER_ARGUMENTS}:
            names = ", ".join(ORDER_ARGUMENTS)
            raise RefusedError(422, f"expected an object with order, and of {names} what that needs")
        kind = body.get("order")
        if not isinstance(kind, str) or kind not in ORDER_KINDS:
            raise RefusedError(422, f"expected an order: one of {', '.join(sorted(ORDER_KINDS))}")
        arguments = {k: body[k] for k in ORDER_ARGUMENTS if body.get(k) not in (None, "")}
        with self._lock:
            return self._add(session, address, kind, arguments, expires_s)

    def _add(
        self, session: OperatorSession, address: str, kind: str, arguments: dict[str, Any], expires_s: float
    ) -> int:
        operator = session.operator.name
        self._check_rate(operator)
        self._check(session, address, kind, arguments)
        if missing := [n for n in ORDER_KINDS[kind].arguments if n not in arguments]:
            raise RefusedError(422, f"{kind} needs {' and '.join(missing)}")
        now = self._clock()
        try:
            fields = {"number": 1, "operator": operator, "kind": kind, "until": now + expires_s, **arguments}
            order = convert_record(Order, fields, "order", ProtocolError)
        except ProtocolError as error:
            raise RefusedError(422, str(error)) from error
        body = json.dumps(arguments)
        if len(body) > MAX_ORDER_BYTES:
            raise RefusedError(422, f"an order has at most {MAX_ORDER_BYTES} bytes")
        self._check_subjects(order)
        with self._database.transaction():
            self._database.execute(
                "INSERT INTO orders (at, until, operator, address, kind, what) VALUES (?, ?, ?, ?, ?, ?)",
                now, order.until, operator, address, kind, body,
            )  # fmt: skip
            number = int(self._database.rows("SELECT last_insert_rowid() AS n")[0]["n"])
            if kind not in READING_ORDERS:
                self._audit.note(operator, address, kind, {"order": number, **arguments}, "ordered")
            self._database.execute("DELETE FROM orders WHERE state = 'done' AND number <= ?", number - MAX_KEPT_ORDERS)
        return number

    def get(self, number: int) -> dict[str, Any] | None:
        row = self._database.row("SELECT * FROM orders WHERE number = ?", number)
        return None if row is None else _order_fields(row)

    def latest(self) -> list[dict[str, Any]]:
        """The latest orders, newest first."""
        query = "SELECT * FROM orders ORDER BY number DESC LIMIT ?"
        return [_order_fields(r) for r in self._database.rows(query, MAX_KEPT_ORDERS)]

    def expire(self) -> None:
        """Answer orders that the server has not taken in time, and won't take."""
        now = self._clock()
        rows = self._database.rows("SELECT number FROM orders WHERE state = 'waiting' AND until < ?", now - _GRACE_S)
        if rows:
            answers = (OrderAnswer(row["number"], ok=False, text=EXPIRED) for row in rows)
            self._database.try_execute(*(s for answer in answers for s in answer_statements(answer, now)))

    def withdraw(self, number: int) -> None:
        """Answer an order that the server has not taken, so that it never does; one that it has taken stays."""
        with self._database.transaction():
            if self._database.row("SELECT number FROM orders WHERE number = ? AND state = 'waiting'", number):
                for query, values in answer_statements(OrderAnswer(number, ok=False, text=WITHDRAWN), self._clock()):
                    self._database.execute(query, *values)

    def _check(self, session: OperatorSession, address: str, kind: str, arguments: Mapping[str, Any]) -> None:
        if not is_accepted(kind, self._view.accepted_orders):
            raise RefusedError(403, "this server takes no such orders from the console ([server] console_orders)")
        needed_role = ORDER_KINDS[kind].role
        if not has_role(session.operator.role, needed_role):
            shortened = {key: one_line(str(value), _MAX_NOTED_LENGTH) for key, value in arguments.items()}
            outcome = f"refused: needs the role {needed_role}"
            self._audit.note(session.operator.name, address, kind, shortened, outcome)
            raise RefusedError(403, f"{kind} needs the role {needed_role}, yours is {session.operator.role}")
        if not self._view.is_ready:
            raise RefusedError(503, "the server does not respond at the moment")

    def _check_subjects(self, order: Order) -> None:
        """Refuse an order about an unknown job or device, unless it may just not be published yet."""
        known_names: Collection[str] = self._view.job_names
        if order.job is not None and order.job not in known_names:
            raise RefusedError(404, f"no job {order.job}: {_names_text(known_names)}")
        if not self._view.is_complete or order.kind in _JOINING_ORDERS:
            return
        known_names = self._view.device_names
        for name in (*(() if order.device is None else (order.device,)), *order.devices):
            if name not in known_names:
                suggestion = did_you_mean(name, known_names) if len(known_names) <= _MAX_NAMES_COMPARED else ""
                raise RefusedError(404, f"no device {name}{suggestion}: {_names_text(known_names)}")

    def _check_rate(self, operator: str) -> None:
        now = self._clock()
        latest = self._order_times.setdefault(operator, deque())
        while latest and not 0 <= now - latest[0] < 60:
            latest.popleft()
        if len(latest) >= MAX_PER_MINUTE:
            raise RefusedError(429, f"more than {MAX_PER_MINUTE} orders in a minute")
        if self._database.rows("SELECT count(*) AS n FROM orders WHERE state != 'done'")[0]["n"] >= MAX_WAITING:
            raise RefusedError(429, f"{MAX_WAITING} orders are waiting for the server")
        latest.append(now)


def _order_fields(row: dict[str, Any]) -> dict[str, Any]:
    is_done = row["state"] == "done"
    return {
        "order": row["number"], "kind": row["kind"], "operator": row["operator"], "at": row["at"],
        "state": "done" if is_done else "waiting", "ok": bool(row["ok"]) if is_done else None, "text": row["text"],
        "what": json.loads(row["what"]),
    }  # fmt: skip


def _names_text(names: Collection[str]) -> str:
    first_names, further = ", ".join(nsmallest(_MAX_NAMES_LISTED, names)), len(names) - _MAX_NAMES_LISTED
    return f"there {'is' if len(names) == 1 else 'are'} {first_names or 'none'}" + (
        f" and {further} more" if further > 0 else ""
    )
