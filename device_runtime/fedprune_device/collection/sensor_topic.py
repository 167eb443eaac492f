"""A sensor's MQTT topic as a source of samples."""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ConfigError, DataError, shown
from fedprune.security.tls import insecure_allowed
from fedprune.wire.link import Link, tls_context
from fedprune.wire.queues import ConnectionDown, Event, Inbox
from fedprune.wire.urls import BrokerUrl
from fedprune_device.collection.collector import Collector
from fedprune_device.collection.windows import FORMATS, Message, Windows, label_of

SCHEMES = ("mqtt://", "mqtts://")

_QUEUED_BYTES = 16 * 2**20
_RECENT = 1000  # samples that a label's message may be about
_MALFORMED = "malformed messages"


@dataclass(frozen=True)
class SensorOptions:
    """How a topic's messages are read; `channels` is None where a message is a row."""

    format: str = FORMATS[0]
    channels: int | None = None
    label_topic: str | None = None
    ca: Path | None = None
    insecure: bool = False


class SensorTopic:
    """Subscribes to `mqtt[s]://[user:password@]host[:port]/TOPIC`, and hands in windows of what arrives.

    Raises `ConfigError` if the address or a topic is none, or a remote broker is to be used without TLS.
    """

    def __init__(self, url: str, options: SensorOptions, collector: Collector) -> None:
        scheme, _, rest = url.partition("://")
        host, _, topic = rest.partition("/")
        broker = f"{scheme}://{host}"
        parsed = BrokerUrl.parse(broker)
        if not parsed.tls and not options.insecure:
            insecure_allowed(parsed.host)
        self._topic, self._labels = _checked(topic), options.label_topic and _checked(options.label_topic)
        if self._labels == self._topic:
            raise ConfigError("the topic of labels", expected="another one than the sensor's", got=shown(topic))
        if options.ca is not None:
            tls_context(options.ca)
        self._options, self._collector = options, collector
        self._windows = Windows()
        self._recent: deque[tuple[float, float, str]] = deque(maxlen=_RECENT)
        self._dropped = 0
        self._link = Link(
            broker,
            f"fedprune-{secrets.token_hex(8)}",
            tls=lambda: tls_context(options.ca),
            inbox=Inbox[Event](_QUEUED_BYTES),
        )
        self._link.subscribe(filter(None, (self._topic, self._labels)))

    def run(self) -> None:
        """Follow the topic until an exception, such as that of a signal, ends it."""
        self._link.start(patient=True)
        try:
            while True:
                self._turn()
        finally:
            self._link.close(0.0)

    def _turn(self) -> None:
        item = self._link.get(1.0)
        if (lost := self._link.dropped - self._dropped) or isinstance(item, ConnectionDown):
            self._dropped += lost
            self._windows.clear()
            if lost:
                self._collector.problem("messages lost", "they arrive faster than they can be stored", lost)
        if isinstance(item, tuple):
            self.take(*item, time.time())

    def take(self, topic: str, payload: bytes, now: float) -> None:
        """One message, which arrived at `now` seconds since 1970."""
        try:
            if topic == self._labels:
                self._label(*label_of(payload))
            else:
                self._add(Message.parse(payload, self._options.format, self._options.channels), now)
        except DataError as error:
            if topic != self._labels:
                self._windows.clear()
            self._collector.problem(_MALFORMED, error)

    def _add(self, message: Message, now: float) -> None:
        shape = self._collector.input()
        if shape is None:
            self._windows.clear()
            self._collector.problem("messages before a model", "the board doesn't know yet what its model takes")
            return
        for window in self._windows.add(message, shape, now):
            name = self._collector.add(window.x, window.label)
            if name is not None:
                self._recent.append((window.begin, window.end, name))

    def _label(self, label: int | str, at: float | None) -> None:
        """Label the newest sample, or that of a time."""
        found = [name for begin, end, name in self._recent if at is None or begin <= at <= end]
        if found:
            self._collector.label(found[-1], label)
        else:
            self._collector.problem("label left out", "there is no sample of that time")


def _checked(topic: str) -> str:
    if not topic or any(c in topic for c in "+#\0") or len(topic.encode()) > 65_535:
        raise ConfigError("an MQTT topic", expected="mqtts://HOST/TOPIC, without + and #", got=shown(topic))
    return topic
