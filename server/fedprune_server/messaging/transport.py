"""The server's connection as its loop uses it, and the base of the filters in front of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from fedprune.wire.chunk import DEFAULT_MAX_PACKET
from fedprune.wire.queues import Event
from fedprune.wire.topics import Topics
from fedprune_server.devices.quarantine import Quarantine, Quarantined, Released

# Seconds for which messages are handled before their events are saved, in one transaction, and answered: a transaction
# takes milliseconds, so that a turn for each message would be many times slower.
MAX_TURN_S = 0.02

# A turn waits for a tenth of a second and works for some milliseconds. Of a longer one this much counts as listening:
# in the rest the server stood still, suspended or by its disk, and could have heard nobody.
MAX_TURN_LENGTH_S = 5.0


@dataclass(frozen=True)
class DeviceRevoked:
    """A device is no longer a member, or another key has its name: messages to and from it are dropped."""

    device: str


@dataclass(frozen=True)
class DuplicateIdentity:
    """Two boards may be signing with the key of one device. A message that was overtaken by another looks the same."""

    device: str


@dataclass(frozen=True)
class DroppedMessage:
    """A message was dropped or answered at once; more may wait behind it."""


# Events of a device that the connection itself detects, without a message from the device.
DeviceEvent = DeviceRevoked | DuplicateIdentity | Quarantined | Released

# A topic and a payload, or an event of the connection or about a device.
Item = tuple[str, bytes] | Event | DeviceEvent


class Wire(Protocol):
    """The connection as the server's loop uses it; `fedprune.wire.link.BrokerLink` implements it."""

    @property
    def connected(self) -> bool:
        """Whether the connection is up."""

    @property
    def room(self) -> bool:
        """Whether `publish` would accept a message now (if connected)."""

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting."""

    def get(self, timeout: float | None = 0.0) -> Item | DroppedMessage | None:
        """The next message or event; None if nothing waits."""

    def flush(self, timeout: float) -> bool:
        """Wait until what was published is sent."""


class ListeningClock:
    """Counts the seconds in which a server could hear its boards, so that its own lateness is no silence of theirs.

    Time counts once all messages that had come are read, and while the connection is up and takes what is sent.

    Attributes:
        lost_s: Seconds in which the server stood still.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic, self._turned_at = monotonic, monotonic()
        self._listened_s = self._turn_s = self.lost_s = 0.0

    def __call__(self) -> float:
        return self._listened_s

    def begin_turn(self) -> None:
        now = self._monotonic()
        self._turn_s = min(now - self._turned_at, MAX_TURN_LENGTH_S)
        self.lost_s += now - self._turned_at - self._turn_s
        self._turned_at = now

    def note_all_read(self) -> None:
        """Count the time since the turn before: no message of it is unread."""
        self._listened_s, self._turn_s = self._listened_s + self._turn_s, 0.0


class SteadyClock:
    """Seconds since 1970 that pass evenly: the system's at one moment, and what a monotonic clock counts from then.

    Deadlines are kept as times since 1970, so that they mean something after a restart. With the system's clock itself,
    setting it by an hour would close a round at once, or keep it open for an hour.
    """

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self._offset + self._monotonic()

    def follow(self) -> float:
        """Adopt the system clock's present time; returns by how many seconds pending deadlines must move, too."""
        former, self._offset = self._offset, self._wall() - self._monotonic()
        return self._offset - former


@dataclass(frozen=True)
class SiteLink:
    """The server's connection to its site, as the runners of all jobs share it.

    Attributes:
        link: The connection, which need not be up yet.
        quarantine: Decides which devices `link` listens to.
        max_packet: Bytes of an MQTT packet that the broker lets through, if it is known to be less than usual.
        clock: The system's clock, seconds since 1970, as devices are told.
    """

    link: Wire
    topics: Topics
    quarantine: Quarantine = field(default_factory=Quarantine)
    max_packet: int = DEFAULT_MAX_PACKET
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    @cached_property
    def listening(self) -> ListeningClock:
        return ListeningClock(self.monotonic)


class Relay:
    """A connection that passes everything on to another one; subclasses override what they change."""

    def __init__(self, link: Wire) -> None:
        self._link = link

    @property
    def connected(self) -> bool:
        return self._link.connected

    @property
    def room(self) -> bool:
        return self._link.room

    @property
    def unsent(self) -> int:
        return self._link.unsent

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        return self._link.publish(topic, payload, qos)

    def get(self, timeout: float | None = 0.0) -> Item | DroppedMessage | None:
        return self._link.get(timeout)

    def flush(self, timeout: float) -> bool:
        return self._link.flush(timeout)
