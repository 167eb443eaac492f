"""The audit log: who did what, from where, and with what outcome. Lines are never changed, and the oldest deleted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from fedprune.core.text import one_line
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.state.record_page import RecordPage, read_page

_ORDER_NUMBER = "json_extract(what, '$.order')"
_LAST_OUTCOME = (
    "(SELECT a.outcome FROM audit AS a WHERE json_extract(a.what, '$.order') = json_extract(audit.what, '$.order') "  # nosec B608  # a text of ours
    "AND a.number > audit.number ORDER BY a.number DESC LIMIT 1)"
)

# Failed logins that may be listed in a burst, and the interval after which one more may be. Strangers can make any
# number of them, and must fill neither the disk nor the log, whose oldest lines are deleted for new ones.
MAX_FAILED_BURST, FAILED_INTERVAL_S = 100, 60.0


class Audit:
    """The audit log. Threads may share it. Every method raises `StorageError` if the disk fails or is full."""

    def __init__(
        self,
        database: ConsoleDatabase,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock, self._monotonic = clock, monotonic
        self._failed_allowance, self._failed_at, self._unlisted = float(MAX_FAILED_BURST), monotonic(), 0
        self._failed_lock = threading.Lock()
        self._last_number = self._max_number()

    def note(
        self, operator: str, address: str, action: str, details: dict[str, Any] | None = None, outcome: str = ""
    ) -> None:
        """Add a line. `operator` is the given name where a login failed; `action` is `login` or an order's kind."""
        self._database.execute(
            "INSERT INTO audit (at, operator, address, action, what, outcome) VALUES (?, ?, ?, ?, ?, ?)",
            self._clock(),
            one_line(operator, 64),
            one_line(address, 64),
            one_line(action, 64),
            json.dumps(details or {}, sort_keys=True),
            one_line(outcome, 500),
        )

    def note_failed_login(self, name: str, address: str) -> None:
        """Note a failed login. Of many in a short time some get a line, and the next line counts the others."""
        with self._failed_lock:
            now = self._monotonic()
            allowance = self._failed_allowance + (now - self._failed_at) / FAILED_INTERVAL_S
            self._failed_allowance = min(float(MAX_FAILED_BURST), allowance)
            self._failed_at = now
            if self._failed_allowance < 1:
                self._unlisted += 1
                return
            self._failed_allowance -= 1
            unlisted, self._unlisted = self._unlisted, 0
            self.note(name, address, "login", {"unlisted before": unlisted} if unlisted else None, "failed")

    def changes(self) -> set[str]:
        """The topic `audit` if lines were added since the last call, for live pages."""
        last_number, self._last_number = self._last_number, self._max_number()
        return {"audit"} if self._last_number != last_number else set()

    def _max_number(self) -> int:
        row = self._database.row("SELECT coalesce(max(number), 0) AS n FROM audit")
        return int(row["n"]) if row else 0

    def page(self, page: int = 1, size: int = 50, operator: str | None = None) -> RecordPage:
        """A page of entries of all operators or of one, newest first. An order and its outcome are two lines of the log
        and one entry. Raises `ValueError` if page, from 1, or size are out of range.
        """
        operator_clause, values = ("AND operator = ?", (operator,)) if operator is not None else ("", ())
        where = f"WHERE ({_ORDER_NUMBER} IS NULL OR outcome = 'ordered') {operator_clause}"

        def count() -> int:
            row = self._database.row(f"SELECT count(*) AS n FROM audit {where}", *values)  # noqa: S608  # nosec B608  # two texts of ours
            return int(row["n"]) if row else 0

        def read(max_rows: int, skipped: int) -> list[dict[str, Any]]:
            rows = self._database.rows(
                f"SELECT number, at, operator, address, action, what, coalesce({_LAST_OUTCOME}, outcome) AS outcome "  # noqa: S608  # nosec B608  # as above
                f"FROM audit {where} ORDER BY number DESC LIMIT ? OFFSET ?",
                *values, max_rows, skipped,
            )  # fmt: skip
            return [{**r, "what": json.loads(r["what"])} for r in rows]

        return read_page(page, size, count, read)
