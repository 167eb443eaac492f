"""What a console passes on to its server, an operator's order, and what the server says came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.fields import (
    Count,
    Device,
    Items,
    Job,
    Name,
    choice,
    number,
    text,
    whole,
)
from fedprune_server.web.state.row_types import (
    ORDER_KINDS,
    LongText,
    Time,
)

EXPIRES_S = 600.0
"""So long an order waits for the server."""

EXPIRED = f"expired: the server did not take it within {EXPIRES_S / 60:.0f} minutes, and does not carry it out"


@dataclass(frozen=True)
class Order(CheckedMessage, kind="order"):
    """What an operator orders."""

    number: Annotated[int, whole(1)]
    """The order's, from 1; the answer names it."""
    operator: Name
    """Who orders it."""
    order: Annotated[str, choice(*ORDER_KINDS)]
    """One of `ORDER_KINDS`."""
    job: Job | None = None
    """For `pause`, `resume` and `coverage`."""
    device: Device | None = None
    """For `approve`, `deny`, `revoke`, `look` and `release_quarantine`."""
    key: Annotated[str, text(128)] | None = None
    """Fingerprint of the key to approve, as the board shows it."""
    release: Name | None = None
    """Name of the release to roll out, one of the server's `console_releases`."""
    groups: Annotated[tuple[Annotated[float, number(0.0, 1.0)], ...], Items(20)] = ()
    """Shares of the boards for each stage of a rollout; empty for the default: one board, a tenth, all."""
    devices: Annotated[tuple[Device, ...], Items(100)] = ()
    """The boards of a rollout; empty for all that are in."""
    reason: Annotated[str, text(500)] = ""
    """Why, for the record."""
    until: Time | None = None
    """When it expires, in seconds since 1970: it is not carried out later. None for never."""

    def expired(self, now: float) -> bool:
        """Whether it is too late to carry it out."""
        return self.until is not None and now > self.until


@dataclass(frozen=True)
class Answer(CheckedMessage, kind="answer"):
    """What came of an order."""

    order: Count
    ok: bool
    text: LongText
