"""Queues between a connection's network thread and its reader: received messages and events in, unsent messages out."""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from paho.mqtt.client import MQTTMessageInfo

# Limit of an inbox in bytes. Transfer windows keep the queue far below it, so that only a flood is dropped.
INBOX_BYTES = 64 * 1024 * 1024

# Memory of a queued message in addition to its payload: without it a flood of empty messages would be free.
MESSAGE_OVERHEAD_BYTES = 500

# A sender with more than 1 / `_FLOOD_DIVISOR` of the limit is flooding.
_FLOOD_DIVISOR = 16

_KEPT_MEMORY_BYTES = 2 * 1024 * 1024

E = TypeVar("E")


class RetainedMessage(NamedTuple):
    """A message that the broker kept for new subscribers: nobody knows how old it is."""

    topic: str
    payload: bytes


class Inbox(Generic[E]):
    """A queue of messages and events between the network thread and a reader, of at most `limit` bytes.

    The first half accepts every message. Beyond it no sender may have more bytes queued than an equal share of that
    half: a flooding sender stays below the middle, and the rest is free for the others. Retained messages, which come
    all at once after each connection, have a limit of their own, and their place among the others.
    """

    def __init__(self, limit: int = INBOX_BYTES) -> None:
        self.limit = limit
        self.queued_bytes = 0
        # No SimpleQueue: it waits forever if a signal's handler takes longer than what is left of its time-out.
        self._items: queue.Queue[tuple[str, bytes] | E | None] = queue.Queue()
        self._lock = threading.Lock()
        self._retained_bytes = 0
        self._bytes_by_sender: dict[str, int] = {}
        # Freeing a large block raises the size from which glibc returns memory to the kernel to twice that block's
        # (mallopt(3), M_MMAP_THRESHOLD): freed memory isn't cleared anew for each chunk. It is never written to, and
        # so takes no memory itself.
        bytes(_KEPT_MEMORY_BYTES)

    def put_message(self, topic: str, payload: bytes) -> bool:
        """Queue a message; returns whether there was room for it."""
        sender, size = _sender_prefix(topic), MESSAGE_OVERHEAD_BYTES + len(payload)
        with self._lock:
            total_bytes, sender_bytes = self.queued_bytes + size, self._bytes_by_sender.get(sender, 0) + size
            senders = len(self._bytes_by_sender) + (sender not in self._bytes_by_sender)
            if total_bytes > self.limit or (
                total_bytes > self.limit // 2 and sender_bytes > self.limit // 2 // senders
            ):
                return False
            self.queued_bytes, self._bytes_by_sender[sender] = total_bytes, sender_bytes
        self._items.put((topic, payload))
        return True

    def put_retained(self, message: RetainedMessage) -> bool:
        """Queue a retained message; returns whether there was room for it."""
        size = MESSAGE_OVERHEAD_BYTES + len(message.payload)
        with self._lock:
            if self._retained_bytes + size > self.limit:
                return False
            self._retained_bytes += size
        self._items.put(message)
        return True

    def flooding_prefix(self) -> str:
        """Topic prefix of the sender with most bytes queued; empty if no sender is flooding."""
        with self._lock:
            sender = max(self._bytes_by_sender, key=lambda sender: self._bytes_by_sender[sender], default="")
            return sender if self._bytes_by_sender.get(sender, 0) > self.limit // _FLOOD_DIVISOR else ""

    def put_event(self, event: E) -> None:
        """Queue an event; there is always room for one."""
        self._items.put(event)

    def wake(self) -> None:
        if self._items.empty():
            self._items.put(None)

    def get(self, timeout: float | None) -> tuple[str, bytes] | E | None:
        """The oldest message or event; None after `timeout` seconds (None: without limit) or a `wake`."""
        try:
            item = self._items.get(timeout=timeout) if timeout != 0 else self._items.get_nowait()
            while item is None:
                item = self._items.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, RetainedMessage):
            with self._lock:
                self._retained_bytes -= MESSAGE_OVERHEAD_BYTES + len(item.payload)
        elif isinstance(item, tuple):
            self._note_removal(item[0], MESSAGE_OVERHEAD_BYTES + len(item[1]))
        return item

    def _note_removal(self, topic: str, size: int) -> None:
        sender = _sender_prefix(topic)
        with self._lock:
            self.queued_bytes -= size
            remaining = self._bytes_by_sender[sender] - size
            if remaining:
                self._bytes_by_sender[sender] = remaining
            else:
                del self._bytes_by_sender[sender]


def _sender_prefix(topic: str) -> str:
    """The topic's prefix up to the device."""
    return "/".join(topic.split("/", 4)[:4])


# Unsent bytes from which `publish` declines.
OUTBOX_BYTES = 16 * 1024 * 1024

OUTBOX_MESSAGES = 10_000

# Unsent bytes from which chunks are held back, so that a message waits for no more than this and one chunk.
HIGH_WATER = 512 * 1024

# Unsent bytes below which `get` returns at once, so that chunks that were held back can be published.
LOW_WATER = 256 * 1024


class UnsentMessages:
    """Messages that wait to be sent or, at QoS 1, to be acknowledged.

    They are polled: for a callback paho makes two large objects per message, which takes longer than the rest of a
    chunk's handling. Messages are sent and acknowledged in order, so that only the first of each kind is polled.
    """

    def __init__(self) -> None:
        self.payload_bytes = 0
        self._waiting: tuple[deque[tuple[MQTTMessageInfo, int]], ...] = (deque(), deque())

    def __len__(self) -> int:
        return sum(map(len, self._waiting))

    @property
    def has_room(self) -> bool:
        return self.payload_bytes < OUTBOX_BYTES and len(self) < OUTBOX_MESSAGES

    def add(self, message: MQTTMessageInfo, size: int, qos: int) -> None:
        self._waiting[qos > 0].append((message, size))
        self.payload_bytes += size

    def remove_sent(self) -> bool:
        """Remove the messages that were sent; returns whether there were any."""
        count_before = len(self)
        for waiting in self._waiting:
            while waiting and waiting[0][0].is_published():
                self.payload_bytes -= waiting.popleft()[1]
        return len(self) < count_before

    def clear(self) -> None:
        for waiting in self._waiting:
            waiting.clear()
        self.payload_bytes = 0


@dataclass(frozen=True)
class ConnectionUp:
    """The connection is up and all subscriptions are granted, `seconds` seconds after it was requested: two round
    trips, more where packets were lost."""

    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class ConnectionDown:
    """The connection is lost, for this reason."""

    reason: str


Event = ConnectionUp | ConnectionDown
