"""Subscriptions of a connection, and how far the broker has granted them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode


class Subscriptions:
    """Required and optional topics of all connections, and the state of this connection's requests; not thread-safe."""

    def __init__(self) -> None:
        self._topics: list[str] = []
        self._requested: set[str] = set()
        self._awaited: dict[int, str] = {}
        self._optional: set[str] = set()
        self._awaited_optional: set[int] = set()

    @property
    def awaited(self) -> bool:
        """Whether the broker still has to answer for a required topic."""
        return bool(self._awaited)

    @property
    def complete(self) -> bool:
        """Whether this connection has requested all required topics."""
        return set(self._topics) <= self._requested

    def add(self, topics: Iterable[str]) -> list[str]:
        """Add required topics; returns the new ones."""
        new = [t for t in topics if t not in self._topics]
        self._topics += new
        return new

    def request(self, client: paho.Client) -> None:
        """Subscribe to the required topics that this connection hasn't requested yet."""
        for topic in self._topics:
            if topic in self._requested:
                continue
            code, mid = client.subscribe(topic, qos=1)
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._requested.add(topic)
                self._awaited[mid] = topic

    def replace_optional(self, topics: Collection[str], client: paho.Client | None) -> None:
        """Replace the optional topics, on this connection or, without one, on the next."""
        before, self._optional = self._optional, set(topics)
        if client is None:
            return
        if gone := sorted(before - self._optional):
            client.unsubscribe(gone)
        self._hear(client, self._optional - before)

    def resume(self, client: paho.Client) -> None:
        """Subscribe a connection that is up to the optional topics."""
        self._hear(client, self._optional)

    def answered(self, mid: int) -> str | None:
        """The broker has answered a request; returns its required topic, or None for optional ones."""
        if mid in self._awaited_optional:
            self._awaited_optional.discard(mid)
            return None
        return self._awaited.pop(mid, "")

    def lost(self) -> None:
        """Forget the requests of a lost connection."""
        self._requested.clear()
        self._awaited.clear()
        self._awaited_optional.clear()

    def _hear(self, client: paho.Client, topics: Collection[str]) -> None:
        if topics:
            code, mid = client.subscribe([(t, 0) for t in sorted(topics)])
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._awaited_optional.add(mid)
