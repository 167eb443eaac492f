"""What a console passes on to its server, an operator's order, and what the server says came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check
from fedprune_server.web.state.row_checks import COUNT, ORDER_KINDS, TEXT, TIME, list_of, truth

EXPIRES_S = 600.0
"""So long an order waits for the server."""

EXPIRED = f"expired: the server did not take it within {EXPIRES_S / 60:.0f} minutes, and does not carry it out"


@dataclass(frozen=True)
class Order(CheckedMessage):
    """What an operator orders.

    Attributes:
        number: The order's, from 1; the answer names it.
        operator: Who orders it.
        order: One of `ORDER_KINDS`.
        job: For `pause`, `resume` and `coverage`.
        device: For `approve`, `deny`, `revoke`, `look` and `release_quarantine`.
        key: Fingerprint of the key to approve, as the board shows it.
        release: Name of the release to roll out, one of the server's `console_releases`.
        groups: Shares of the boards for each stage of a rollout; empty for the default: one board, a tenth, all.
        devices: The boards of a rollout; empty for all that are in.
        reason: Why, for the record.
        until: When it expires, in seconds since 1970: it is not carried out later. None for never.
    """

    number: int
    operator: str
    order: str
    job: str | None = None
    device: str | None = None
    key: str | None = None
    release: str | None = None
    groups: tuple[float, ...] = ()
    devices: tuple[str, ...] = ()
    reason: str = ""
    until: float | None = None

    kind: ClassVar[str] = "order"
    checks: ClassVar[Mapping[str, Check]] = {
        "number": check.whole(1),
        "operator": check.name,
        "order": check.choice(*ORDER_KINDS),
        "job": check.optional(check.job),
        "device": check.optional(check.device),
        "key": check.optional(check.text(128)),
        "release": check.optional(check.name),
        "groups": list_of(check.number(0.0, 1.0), 20),
        "devices": list_of(check.device, 100),
        "reason": check.text(500),
        "until": check.optional(TIME),
    }

    def expired(self, now: float) -> bool:
        """Whether it is too late to carry it out."""
        return self.until is not None and now > self.until


@dataclass(frozen=True)
class Answer(CheckedMessage):
    """What came of an order."""

    order: int
    ok: bool
    text: str

    kind: ClassVar[str] = "answer"
    checks: ClassVar[Mapping[str, Check]] = {"order": COUNT, "ok": truth, "text": TEXT}
