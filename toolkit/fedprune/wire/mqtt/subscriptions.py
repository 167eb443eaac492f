"""What a connection to a broker listens to, and how far the broker has granted it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode


class Subscriptions:
    """Topics over all connections, and what this connection has asked for. Whoever has it keeps threads apart.

    There are topics without which a connection is of no use, and others beside them that the broker may refuse.
    """

    def __init__(self) -> None:
        self._topics: list[str] = []
        self._requested: set[str] = set()
        self._awaited: dict[int, str] = {}
        self._beside: set[str] = set()
        self._awaited_beside: set[int] = set()

    @property
    def awaited(self) -> bool:
        """Whether the broker still has to answer for a topic that is needed."""
        return bool(self._awaited)

    @property
    def complete(self) -> bool:
        """Whether this connection has asked for all topics that are needed."""
        return set(self._topics) <= self._requested

    def add(self, topics: Iterable[str]) -> list[str]:
        """Need these, too; returns those that are new."""
        new = [t for t in topics if t not in self._topics]
        self._topics += new
        return new

    def request(self, client: paho.Client) -> None:
        """Subscribe to what is needed and this connection hasn't asked for yet."""
        for topic in self._topics:
            if topic in self._requested:
                continue
            code, mid = client.subscribe(topic, qos=1)
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._requested.add(topic)
                self._awaited[mid] = topic

    def beside(self, topics: Collection[str], client: paho.Client | None) -> None:
        """Listen to exactly these beside those that are needed.

        Args:
            topics: They.
            client: The connection; None for the next one.
        """
        before, self._beside = self._beside, set(topics)
        if client is None:
            return
        if gone := sorted(before - self._beside):
            client.unsubscribe(gone)
        self._hear(client, self._beside - before)

    def resume(self, client: paho.Client) -> None:
        """Let a connection that is up listen to what it may listen to beside what is needed."""
        self._hear(client, self._beside)

    def answered(self, mid: int) -> str | None:
        """The broker has answered; returns the topic that it was asked for, None for one beside those needed."""
        if mid in self._awaited_beside:
            self._awaited_beside.discard(mid)
            return None
        return self._awaited.pop(mid, "")

    def lost(self) -> None:
        """The connection is gone; the next one begins from nothing."""
        self._requested.clear()
        self._awaited.clear()
        self._awaited_beside.clear()

    def _hear(self, client: paho.Client, topics: Collection[str]) -> None:
        if topics:
            code, mid = client.subscribe([(t, 0) for t in sorted(topics)])
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._awaited_beside.add(mid)
