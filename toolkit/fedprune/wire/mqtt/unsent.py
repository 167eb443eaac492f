"""Messages that paho hasn't sent yet, whose amount limits how much more it gets."""

from __future__ import annotations

from collections import deque

from paho.mqtt.client import MQTTMessageInfo

OUTBOX_BYTES = 16 * 1024 * 1024
"""Unsent bytes from which `publish` declines."""

OUTBOX_MESSAGES = 10_000

HIGH_WATER = 512 * 1024
"""Unsent bytes from which chunks are held back, so that a message waits for no more than this and one chunk."""

LOW_WATER = 256 * 1024
"""Unsent bytes below which `get` returns at once, so that chunks that were held back can be published."""


class Unsent:
    """Messages that wait to be sent or, at QoS 1, to be acknowledged.

    They are polled: for a callback paho makes two large objects per message, which takes longer than the rest of a
    chunk's handling. Messages are sent and acknowledged in order, so that only the first of each kind is polled.
    """

    def __init__(self) -> None:
        self.size = 0
        """Their payload bytes."""
        self._waiting: tuple[deque[tuple[MQTTMessageInfo, int]], ...] = (deque(), deque())

    def __len__(self) -> int:
        return sum(map(len, self._waiting))

    @property
    def room(self) -> bool:
        """Whether one more message may be published."""
        return self.size < OUTBOX_BYTES and len(self) < OUTBOX_MESSAGES

    def add(self, message: MQTTMessageInfo, size: int, qos: int) -> None:
        """Count a published message."""
        self._waiting[qos > 0].append((message, size))
        self.size += size

    def settle(self) -> bool:
        """Remove what was sent; returns whether that was anything."""
        before = len(self)
        for waiting in self._waiting:
            while waiting and waiting[0][0].is_published():
                self.size -= waiting.popleft()[1]
        return len(self) < before

    def clear(self) -> None:
        """Forget all: the connection is lost."""
        for waiting in self._waiting:
            waiting.clear()
        self.size = 0
