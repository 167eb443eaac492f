"""What was handed to paho and isn't on its way yet: how much it is decides what else may be handed over."""

from __future__ import annotations

from collections import deque
from typing import Protocol

OUTBOX_BYTES = 16 * 1024 * 1024
"""Bytes that may wait to be sent before `publish` declines."""

OUTBOX_MESSAGES = 10_000

HIGH_WATER = 512 * 1024
"""Chunks are held back while so many bytes wait to be sent: a message waits for no more of them, and one chunk."""

LOW_WATER = 256 * 1024
"""Bytes that wait to be sent below which `get` returns at once: who holds chunks back can hand out more."""


class Sending(Protocol):
    """What paho gives for a message; `paho.mqtt.client.MQTTMessageInfo` has it."""

    def is_published(self) -> bool:
        """Whether it is sent and, at QoS 1, acknowledged."""
        ...


class Unsent:
    """Messages that wait to be sent or, at QoS 1, to be acknowledged.

    They are asked, not listened to: for a callback paho makes two large objects for every message, which takes longer
    than all else that a chunk needs. It sends messages in their order, and a broker acknowledges them in theirs, so
    that only the first of each kind has to be asked.
    """

    def __init__(self) -> None:
        self.size = 0
        """Their payload bytes."""
        self._waiting: tuple[deque[tuple[Sending, int]], ...] = (deque(), deque())

    def __len__(self) -> int:
        """Messages."""
        return sum(map(len, self._waiting))

    @property
    def room(self) -> bool:
        """Whether one more may be handed over."""
        return self.size < OUTBOX_BYTES and len(self) < OUTBOX_MESSAGES

    def add(self, message: Sending, size: int, qos: int) -> None:
        """Count a message that was just handed over."""
        self._waiting[qos > 0].append((message, size))
        self.size += size

    def settle(self) -> bool:
        """Take off what is on its way; whether that was anything."""
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
