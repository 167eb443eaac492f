"""A client of MQTT 3.1.1 of which a process can hold ten thousand: clean sessions, QoS 0 and 1, wills and pings.

paho needs a thread, or two lists and some locks, for each client. This one is a protocol of asyncio; it says nothing
again that gets lost with a connection, as boards say what matters again by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

Heard = Callable[[str, bytes], None]

_CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK, _PINGREQ = 0x10, 0x20, 0x30, 0x40, 0x82, 0x90, 0xC0
KEEPALIVE = 30
"""Seconds of silence that the broker bears."""

_CLEAN, _WILL, _WILL_QOS_1 = 0x02, 0x04, 0x08
_IDS = 65_535


class Session(asyncio.Protocol):
    """One client's connection; whoever holds it calls `ping` more often than every `KEEPALIVE` seconds.

    Args:
        name: Its client id.
        topics: What it subscribes to, at QoS 1.
        hears: Is given topic and payload of every message.
        will: Topic and payload that the broker publishes if the connection is lost.

    Attributes:
        up: Done as soon as the subscriptions are in force; with an error if the connection ends before.
        ended: Called with the error, if any, when the connection ends.
        received: Bytes that came.
        sent: Bytes that went.
    """

    __slots__ = (
        "_hears", "_id", "_name", "_rest", "_topics", "_transport", "_will", "ended", "received", "sent", "up",
    )  # fmt: skip

    def __init__(self, name: str, topics: Sequence[str], hears: Heard, will: tuple[str, bytes] | None = None) -> None:
        self._name, self._topics, self._hears, self._will = name, topics, hears, will
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._id = 0
        self.up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: Callable[[Exception | None], None] | None = None
        self.received = self.sent = 0

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> None:
        """Send a message; while the connection is down it is lost."""
        body = _text(topic) + (self._next_id() if qos else b"") + payload
        self._write(_PUBLISH | qos << 1, body)

    def ping(self) -> None:
        """Show that this client is there."""
        self._write(_PINGREQ, b"")

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        flags, will = _CLEAN, b""
        if self._will is not None:
            flags |= _WILL | _WILL_QOS_1
            will = _text(self._will[0]) + len(self._will[1]).to_bytes(2, "big") + self._will[1]
        head = _text("MQTT") + bytes((4, flags)) + KEEPALIVE.to_bytes(2, "big")
        self._write(_CONNECT, head + _text(self._name) + will)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        data = self._rest + data if self._rest else data
        at = 0
        for body, end in packets(data):
            self._packet(data[at], data[body:end])
            at = end
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self._rest = None, b""
        if not self.up.done():
            self.up.set_exception(exc or ConnectionError(f"the broker closed the connection of {self._name}"))
        if self.ended is not None:
            self.ended(exc)

    # Packets.

    def _packet(self, kind: int, body: bytes) -> None:
        if kind & 0xF0 == _PUBLISH:
            size = int.from_bytes(body[:2], "big")
            topic, at = body[2 : 2 + size].decode(), 2 + size
            if kind & 6:
                self._write(_PUBACK, body[at : at + 2])
                at += 2
            self._hears(topic, body[at:])
        elif kind == _CONNACK:
            if body[1]:
                raise ConnectionError(f"the broker refuses {self._name}: code {body[1]}")
            self._write(_SUBSCRIBE, self._next_id() + b"".join(_text(t) + b"\x01" for t in self._topics))
        elif kind == _SUBACK and not self.up.done():
            self.up.set_result(None)

    def _write(self, kind: int, body: bytes) -> None:
        if self._transport is None:
            return
        size, length = len(body), bytearray()
        while True:
            size, digit = size >> 7, size & 127
            length.append(digit | (128 if size else 0))
            if not size:
                break
        packet = bytes((kind,)) + length + body
        self.sent += len(packet)
        self._transport.write(packet)

    def _next_id(self) -> bytes:
        self._id = self._id % _IDS + 1
        return self._id.to_bytes(2, "big")


def packets(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the bodies of whole packets begin and end; each packet begins where the one before ends."""
    at, end = 0, len(data)
    while end - at >= 2:
        size = shift = 0
        body = at + 1
        while body < end:
            digit = data[body]
            size |= (digit & 127) << shift
            shift, body = shift + 7, body + 1
            if digit < 128:
                break
        else:
            return  # the length itself is not whole yet
        if body + size > end:
            return
        at = body + size
        yield body, at


def _text(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(2, "big") + raw
