"""The topics that a connection listens to, and which of them the broker has granted."""

from __future__ import annotations

from collections.abc import Iterable

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode


class Subscriptions:
    """The topics to subscribe to, and the state of this connection's requests for them; not thread-safe."""

    def __init__(self, qos: int) -> None:
        self._qos = qos
        self._topics: list[str] = []
        self._requested: set[str] = set()
        self._awaited: dict[int, str] = {}

    @property
    def is_awaiting(self) -> bool:
        """Whether the broker still has to answer for a topic."""
        return bool(self._awaited)

    @property
    def is_complete(self) -> bool:
        """Whether this connection has requested all topics."""
        return set(self._topics) <= self._requested

    def add(self, topics: Iterable[str]) -> list[str]:
        """Add topics; returns the new ones."""
        new_topics = [t for t in topics if t not in self._topics]
        self._topics += new_topics
        return new_topics

    def request(self, client: paho.Client) -> None:
        """Subscribe to the topics that this connection hasn't requested yet."""
        for topic in self._topics:
            if topic in self._requested:
                continue
            code, mid = client.subscribe(topic, qos=self._qos)
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._requested.add(topic)
                self._awaited[mid] = topic

    def note_answer(self, mid: int) -> str:
        """Note the broker's answer to a request; returns the topic."""
        return self._awaited.pop(mid, "")

    def clear(self) -> None:
        self._requested.clear()
        self._awaited.clear()
