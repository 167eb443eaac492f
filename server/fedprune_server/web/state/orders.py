"""Orders of operators: who may give which, which are on their way to the server, and what came of them."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from heapq import nsmallest
from typing import Any

from fedprune.core.errors import ProtocolError, meant
from fedprune_server.web.audit import Audit
from fedprune_server.web.auth.roles import LOOKS, NEEDED, may
from fedprune_server.web.auth.sessions import Session
from fedprune_server.web.state.model import Model
from fedprune_server.web.state.order_messages import EXPIRED, EXPIRES_S, Answer, Order
from fedprune_server.web.state.publisher_messages import MAX_ORDER, line
from fedprune_server.web.state.row_types import ORDER_KINDS

MOST_WAITING = 100
PER_MINUTE = 60
KEPT = 500

_FIELDS = ("job", "device", "key", "release", "groups", "devices", "reason")
_NEWCOMERS = frozenset({"approve", "deny"})
"""Orders about boards that may have asked to be let in a moment ago."""

_GRACE_S = 30.0
"""So long after an order has expired an answer may still be on its way."""

_NAMED = 8
"""Names that a refusal lists."""

_COMPARED = 1000
"""Among more names none is looked for that is near to a wrong one: the loop would wait for that."""

_NEEDS = {
    "pause": ("job",),
    "resume": ("job",),
    "coverage": ("job",),
    "look": ("device",),
    "approve": ("device", "key"),
    "deny": ("device",),
    "revoke": ("device",),
    "release_quarantine": ("device",),
    "rollout_start": ("release",),
    "rollout_back": ("release",),
}


class RefusedError(Exception):
    """An order is not passed on.

    Args:
        status: Of HTTP.
        text: Why.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class OrderDesk:
    """Passes orders on, and remembers what came of them.

    Args:
        model: Hears the server's answers.
        audit: Where all that changes something is noted.
        send: Passes an order on.
        clock: Seconds since 1970.
    """

    def __init__(
        self, model: Model, audit: Audit, send: Callable[[Order], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._model = model
        self._audit = audit
        self._send = send
        self._clock = clock
        # Larger than every number of a console before this one: no answer to that one's orders is taken for one of
        # these, and no two of the audit log's are the same.
        self._number = int(1000 * clock())
        self._orders: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._latest: dict[str, deque[float]] = {}
        model.listen(self._heard)

    def give(self, session: Session, address: str, body: object) -> int:
        """Pass an order on; returns its number.

        Args:
            session: Whose order it is.
            address: From where.
            body: What the browser sent: `order`, and what that needs.

        Raises:
            RefusedError: It is none, or this operator may not give it, or too many wait.
            StorageError: It can't be noted; then it isn't passed on.
        """
        if not isinstance(body, Mapping) or not set(body) <= {"order", *_FIELDS}:
            raise RefusedError(422, f"expected an object with order, and of {', '.join(_FIELDS)} what that needs")
        kind = body.get("order")
        if not isinstance(kind, str) or kind not in ORDER_KINDS:
            raise RefusedError(422, f"expected an order: one of {', '.join(ORDER_KINDS)}")
        given = {k: body[k] for k in _FIELDS if body.get(k) not in (None, "")}
        self._limit(session.operator.name)
        self._check(session, address, kind)
        if missing := [n for n in _NEEDS.get(kind, ()) if n not in given]:
            raise RefusedError(422, f"{kind} needs {' and '.join(missing)}")
        try:
            until = self._clock() + EXPIRES_S
            order = Order(number=self._number + 1, operator=session.operator.name, order=kind, until=until, **given)
        except (ProtocolError, TypeError) as error:
            raise RefusedError(422, str(error)) from error
        if len(line(order)) > MAX_ORDER:
            raise RefusedError(422, f"an order has at most {MAX_ORDER} bytes")
        self._find(order)
        self._number = order.number
        if kind not in LOOKS:
            self._audit.note(session.operator.name, address, kind, {"order": order.number, **given}, "ordered")
        self._orders[order.number] = {
            "order": order.number, "kind": kind, "operator": session.operator.name, "address": address,
            "at": self._clock(), "state": "waiting", "ok": None, "text": "", "what": given,
        }  # fmt: skip
        while len(self._orders) > KEPT:
            self._orders.popitem(last=False)
        self._send(order)
        return order.number

    def get(self, number: int) -> dict[str, Any] | None:
        """An order, and what came of it."""
        return self._orders.get(number)

    def latest(self) -> list[dict[str, Any]]:
        """All orders that are remembered, the latest first."""
        return list(reversed(self._orders.values()))

    def expire(self) -> None:
        """Answer what the server hasn't taken in time: it won't carry that out, though it wakes up later."""
        late = self._clock() - EXPIRES_S - _GRACE_S
        for number, order in list(self._orders.items()):
            if order["state"] == "waiting" and order["at"] < late:
                self._model.answered(Answer(number, False, EXPIRED))

    def _check(self, session: Session, address: str, kind: str) -> None:
        if self._model.orders == "none" or (self._model.orders == "look" and kind not in LOOKS):
            raise RefusedError(403, "this server takes no such orders from the console ([server] console_orders)")
        if not may(session.operator.role, NEEDED[kind]):
            self._audit.note(session.operator.name, address, kind, {}, f"refused: needs the role {NEEDED[kind]}")
            raise RefusedError(403, f"{kind} needs the role {NEEDED[kind]}, yours is {session.operator.role}")
        if not self._model.ready:
            raise RefusedError(503, "the server says nothing just now")

    def _find(self, order: Order) -> None:
        """Refuse an order about what isn't there. What the console may not have heard of yet the server looks up."""
        known: Collection[str] = self._model.job_names
        if order.job is not None and order.job not in known:
            raise RefusedError(404, f"no job {order.job}: {_there_are(known)}")
        if not self._model.whole or order.order in _NEWCOMERS:
            return
        known = self._model.device_names
        for name in (*(() if order.device is None else (order.device,)), *order.devices):
            if name not in known:
                near = meant(name, known) if len(known) <= _COMPARED else ""
                raise RefusedError(404, f"no device {name}{near}: {_there_are(known)}")

    def _limit(self, operator: str) -> None:
        now = self._clock()
        latest = self._latest.setdefault(operator, deque())
        while latest and not 0 <= now - latest[0] < 60:
            latest.popleft()
        if len(latest) >= PER_MINUTE:
            raise RefusedError(429, f"more than {PER_MINUTE} orders in a minute")
        if sum(o["state"] == "waiting" for o in self._orders.values()) >= MOST_WAITING:
            raise RefusedError(429, f"{MOST_WAITING} orders are waiting for the server")
        latest.append(now)

    def _heard(self, kind: str, what: Any) -> None:
        order = self._orders.get(what["order"]) if kind == "answer" else None
        if order is None or (order["state"] != "waiting" and (order["text"] != EXPIRED or what["text"] == EXPIRED)):
            return  # but what the server took just in time, and did slowly, is done or has failed all the same
        order.update(state="done", ok=what["ok"], text=what["text"])
        if order["kind"] not in LOOKS:
            outcome = EXPIRED if what["text"] == EXPIRED else f"{'done' if what['ok'] else 'failed'}: {what['text']}"
            self._audit.note(order["operator"], order["address"], order["kind"], {"order": order["order"]}, outcome)


def _there_are(names: Collection[str]) -> str:
    """What there is, the first few of many by name."""
    shown, more = ", ".join(nsmallest(_NAMED, names)), len(names) - _NAMED
    return f"there {'is' if len(names) == 1 else 'are'} {shown or 'none'}" + (f" and {more} more" if more > 0 else "")
