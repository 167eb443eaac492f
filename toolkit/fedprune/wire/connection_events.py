"""Events of a connection to the broker, which come in order with its messages."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConnectionUp:
    """The connection is up and all subscriptions are granted, `took` seconds after it was requested: two round trips,
    more where packets were lost."""

    took: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class ConnectionDown:
    """The connection is lost; `reason` says why."""

    reason: str


Event = ConnectionUp | ConnectionDown
