"""The connection to Home Assistant's broker: paho-mqtt, with a will that is retained."""

from __future__ import annotations

import queue
import ssl
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from fedprune.wire.urls import BrokerUrl

_KEEPALIVE_S = 30
_SLOWEST_S = 60
_UNSENT = 5000
_UNREAD = 2000
"""Messages that may wait in each direction; further ones are dropped."""


class Arrival(NamedTuple):
    topic: str
    payload: bytes
    retained: bool


class BrokerClient:
    """A connection that opens itself again, on a thread of paho's.

    Args:
        ca: Authorities that sign the broker's certificate; None for the system's.
        will: Topic and payload that the broker publishes, retained, when the connection is lost.
        topics: What the client subscribes to whenever it is connected.
    """

    def __init__(self, url: str, ca: Path | None, will: tuple[str, str], topics: Iterable[str]) -> None:
        self._url, self._topics = BrokerUrl.parse(url), tuple(topics)
        self._arrivals: queue.Queue[Arrival] = queue.Queue(_UNREAD)
        self._trouble = ""
        self.connections = 0
        """How often it has been connected; what is retained has to be published again each time."""
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self._client.will_set(*will, qos=1, retain=True)
        if self._url.user is not None:
            self._client.username_pw_set(self._url.user, self._url.password)
        if self._url.tls:
            self._client.tls_set_context(ssl.create_default_context(cafile=None if ca is None else str(ca)))
        self._client.max_queued_messages_set(_UNSENT)
        self._client.reconnect_delay_set(1, _SLOWEST_S)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = lambda *_: self._complain(
            "it can't be reached, or its certificate is not trusted"
        )
        self._client.on_message = self._on_message

    @property
    def address(self) -> str:
        """The broker's address, without a password."""
        return self._url.bare

    @property
    def connected(self) -> bool:
        return self._client.is_connected()

    def start(self) -> None:
        self._client.connect_async(self._url.host, self._url.port, _KEEPALIVE_S)
        self._client.loop_start()

    def publish(self, topic: str, payload: str) -> bool:
        """Publish a retained message; returns whether it was queued."""
        return self._client.publish(topic, payload, qos=1, retain=True).rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def unsubscribe(self, topics: Iterable[str]) -> None:
        """Listen to these topics no more, until the next connection."""
        self._client.unsubscribe(list(topics))

    def arrivals(self) -> Iterator[Arrival]:
        """Messages since the last call."""
        with suppress(queue.Empty):
            while True:
                yield self._arrivals.get_nowait()

    def _on_connect(self, client: paho.Client, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._complain(f"it refuses the connection: {str(reason).lower()}")
            return
        self._trouble = ""
        client.subscribe([(topic, 1) for topic in self._topics])
        self.connections += 1

    def _on_message(self, _client: paho.Client, _user: Any, message: paho.MQTTMessage) -> None:
        with suppress(queue.Full):
            self._arrivals.put_nowait(Arrival(message.topic, bytes(message.payload), message.retain))

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            print(f"Home Assistant's broker at {self.address}: {trouble}", file=sys.stderr, flush=True)
