"""Operators' orders as rows of the console's database: the console adds them, the server takes them and answers.

An order is carried out at most once: the server takes it in one transaction before it carries it out, and answers one
that an earlier start has taken as failed. The answer and its line of the audit log are one transaction, too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from fedprune.core.errors import FedpruneError, ProtocolError, error_reason
from fedprune.core.records import convert_record, item_count, number_range, printable_text, word_of
from fedprune.core.text import one_line
from fedprune.wire.fields import Device, Job, Name
from fedprune_server.web.auth.roles import ORDER_KINDS, READING_ORDERS
from fedprune_server.web.database import ConsoleDatabase

log = logging.getLogger("fedprune.server")

# How long an order of the console's pages waits for the server: long enough for a restart, and too short for an
# operator to be surprised by an order of yesterday.
ORDER_LIFETIME_S = 600.0

EXPIRED = "expired: the server did not take it in time, and does not carry it out"
WITHDRAWN = "withdrawn: the server had not taken it, and does not carry it out"
INTERRUPTED = "the server ended before it was done: check its effect, and give the order again if necessary"

# The arguments of orders. Each kind has some of them; any other key refuses the order.
ORDER_ARGUMENTS = ("job", "device", "key", "release", "groups", "devices", "reason")

# Notes an order's outcome in the audit log, unless the order only looks. The same condition as in the update of the
# order, so that neither happens twice.
_NOTE_OUTCOME = (
    "INSERT INTO audit (at, operator, address, action, what, outcome) "  # noqa: S608  # nosec B608  # texts of ours
    "SELECT ?, operator, address, kind, json_object('order', number), ? FROM orders "
    f"WHERE number = ? AND state != 'done' AND kind NOT IN {tuple(sorted(READING_ORDERS))}"
)


@dataclass(frozen=True)
class Order:
    """An operator's request to the server.

    Attributes:
        until: When it expires, in seconds since 1970.
        job: For `pause`, `resume` and `coverage`.
        device: For `approve`, `deny`, `revoke`, `look` and `release_quarantine`.
        key: Fingerprint of the key to approve, as the board shows it.
        release: For `rollout_start` one of the server's `console_releases`; for `rollout_back` the number of the
            release that boards leave.
        groups: Shares of the boards for each stage of a rollout; empty for the default: one board, a tenth, all.
        devices: The boards of a rollout; empty for all members.
        reason: For the record.
    """

    number: Annotated[int, number_range(1)]
    operator: Name
    kind: Annotated[str, word_of(tuple(ORDER_KINDS))]
    until: Annotated[float, number_range(0.0)]
    job: Job | None = None
    device: Device | None = None
    key: Annotated[str, printable_text(128)] | None = None
    release: Name | None = None
    groups: Annotated[tuple[Annotated[float, number_range(0.0, 1.0)], ...], item_count(20)] = ()
    devices: Annotated[tuple[Device, ...], item_count(100)] = ()
    reason: Annotated[str, printable_text(500)] = ""


class OrderAnswer(NamedTuple):
    order: int
    ok: bool
    text: str


class OrderQueue:
    """The server's side of the orders: it takes them and answers them.

    Neither waits for the console's process: while the console writes, no order is taken, and answers are kept.
    """

    def __init__(self, database: ConsoleDatabase, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock
        taken_rows = database.rows("SELECT number FROM orders WHERE state = 'taken'")
        self._answers = [OrderAnswer(row["number"], ok=False, text=INTERRUPTED) for row in taken_rows]

    def take(self, max_orders: int) -> list[Order]:
        """The next orders that have not expired; from now on they count as taken."""
        rows = self._database.rows(
            "SELECT number, operator, kind, what, until FROM orders WHERE state = 'waiting' AND until >= ? "
            "ORDER BY number LIMIT ?",
            self._clock(),
            max_orders,
        )
        change = "UPDATE orders SET state = 'taken' WHERE number = ? AND state = 'waiting'"
        if not rows or not self._database.try_execute(*((change, (r["number"],)) for r in rows)):
            return []
        # The console may have answered some as expired or withdrawn since they were read.
        taken_numbers = {r["number"] for r in self._database.rows("SELECT number FROM orders WHERE state = 'taken'")}
        orders = (self._check(row) for row in rows if row["number"] in taken_numbers)
        return [order for order in orders if order is not None]

    def _check(self, row: Mapping[str, Any]) -> Order | None:
        try:
            return read_order(row)
        except ProtocolError as error:
            self.answer(OrderAnswer(row["number"], ok=False, text=str(error)))
            return None

    def answer(self, answer: OrderAnswer) -> None:
        """Keep an answer for the next `flush`; may be called from any thread."""
        self._answers.append(answer)

    def flush(self) -> None:
        """Write the answers; they are kept if the disk fails."""
        now = self._clock()
        answers = list(self._answers)
        statements = [s for answer in answers for s in answer_statements(answer, now)]
        if statements and self._database.try_execute(*statements):
            del self._answers[: len(answers)]


def answer_of(order: Order, carry_out: Callable[[Order], str]) -> OrderAnswer:
    """Carry an order out. An error becomes the answer, because the orders after it must be carried out, too."""
    try:
        return OrderAnswer(order.number, ok=True, text=carry_out(order))
    except FedpruneError as error:
        text = str(error)
    except Exception as error:  # noqa: BLE001 - as above
        log.error("an order of the console failed: %s: %s", type(error).__name__, error_reason(error))
        text = "it failed; see the server's log"
    return OrderAnswer(order.number, ok=False, text=text)


def answer_statements(answer: OrderAnswer, now: float) -> list[tuple[str, tuple[object, ...]]]:
    """Statements that answer an order, unless it is answered already, and note that in the audit log."""
    message = one_line(answer.text, 1500)
    outcome = message if message in (EXPIRED, WITHDRAWN) else f"{'done' if answer.ok else 'failed'}: {message}"
    update = "UPDATE orders SET state = 'done', ok = ?, text = ? WHERE number = ? AND state != 'done'"
    note = (_NOTE_OUTCOME, (now, one_line(outcome, 500), answer.order))
    return [note, (update, (int(answer.ok), message, answer.order))]


def read_order(row: Mapping[str, Any]) -> Order:
    """Check a row, and return its order. Browsers reach the process that writes orders: the server doesn't trust it."""
    try:
        arguments = json.loads(row["what"])
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the order is not JSON") from error
    if not isinstance(arguments, dict) or not arguments.keys() <= set(ORDER_ARGUMENTS):
        raise ProtocolError("what the order is about", expected=f"an object with some of {', '.join(ORDER_ARGUMENTS)}")
    row_fields = {"number": row["number"], "operator": row["operator"], "kind": row["kind"], "until": row["until"]}
    return convert_record(Order, {**arguments, **row_fields}, "order", ProtocolError)
