"""What is told of a connection to the broker, among the messages that come over it: that it is up, or lost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConnectionUp:
    """The broker is there and all subscriptions are in force.

    Attributes:
        took: Seconds from the request for a connection until then: two round trips, and what got lost of them.
    """

    took: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class ConnectionDown:
    """The connection is lost; `reason` says why."""

    reason: str


Event = ConnectionUp | ConnectionDown
