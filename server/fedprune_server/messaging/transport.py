"""The server's connection as its loop sees it, and what stands before it: each looks at something of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedprune.wire.connection_events import Event
from fedprune_server.devices.quarantine import Quarantined, Released


@dataclass(frozen=True)
class ShutOut:
    """A device is no member any more, or another key has its name: nothing is said to it, and it is not heard."""

    device: str


@dataclass(frozen=True)
class Doubled:
    """A sign that two boards sign with the key of one device; a message that was overtaken looks the same."""

    device: str


@dataclass(frozen=True)
class Unheard:
    """Something came that doesn't count or was answered at once; more may wait behind it."""


Noticed = ShutOut | Doubled | Quarantined | Released
"""What the connection notices about a device, and nobody said."""

Item = tuple[str, bytes] | Event | Noticed
"""What comes in: a topic and a payload, or something about the connection or a device."""


class Wire(Protocol):
    """What the server needs of its connection; `fedprune.wire.mqtt.link.Link` has it."""

    @property
    def connected(self) -> bool:
        """Whether the connection is up."""
        ...

    @property
    def room(self) -> bool:
        """Whether `publish` would take a message now (if connected)."""
        ...

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        ...

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting."""
        ...

    def get(self, timeout: float | None = 0.0) -> Item | Unheard | None:
        """The next message or event; None if nothing waits."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until what was published is sent."""
        ...


class Relay:
    """A connection that passes all on to another one; who stands before a connection overrides what it changes.

    Args:
        link: The connection behind it.
    """

    def __init__(self, link: Wire) -> None:
        self._link = link

    @property
    def connected(self) -> bool:
        """Whether the connection is up."""
        return self._link.connected

    @property
    def room(self) -> bool:
        """Whether `publish` would take a message now (if connected)."""
        return self._link.room

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        return self._link.unsent

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting."""
        return self._link.publish(topic, payload, qos)

    def get(self, timeout: float | None = 0.0) -> Item | Unheard | None:
        """The next message or event; None if nothing waits."""
        return self._link.get(timeout)

    def flush(self, timeout: float) -> bool:
        """Wait until what was published is sent."""
        return self._link.flush(timeout)
