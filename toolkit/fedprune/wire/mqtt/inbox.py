"""Messages that came and wait to be read: bounded, and shared, so that a flood of one sender leaves room for others."""

from __future__ import annotations

import queue
import threading
from typing import Generic, TypeVar

BYTES = 64 * 1024 * 1024
"""Bytes that may wait; transfer windows keep it far below, so that only a flood is dropped."""

MESSAGE_BYTES = 500
"""What a waiting message costs beside its payload."""

_FLOOD = 16
"""The part of the limit, as 1 / `_FLOOD`, that only a flood fills from one sender."""

_KEPT_BYTES = 2 * 1024 * 1024

E = TypeVar("E")


class Inbox(Generic[E]):
    """A queue of messages and events between the network's thread and whoever reads.

    In its first half whoever comes is taken. Beyond it nobody may have more waiting than an equal share of that half:
    who fills the inbox stays below the middle, and the others find the rest free.

    Args:
        limit: Bytes that may wait.
    """

    def __init__(self, limit: int = BYTES) -> None:
        self.limit = limit
        self.size = 0
        """Bytes that wait."""
        # No SimpleQueue: one waits for ever when a signal's handler takes longer than what is left of its timeout.
        self._items: queue.Queue[tuple[str, bytes] | E | None] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting: dict[str, int] = {}
        _keep_freed_memory()

    def offer(self, topic: str, payload: bytes) -> bool:
        """Take in a message, if there is room for it."""
        sender, size = _sender(topic), MESSAGE_BYTES + len(payload)
        with self._lock:
            total, own = self.size + size, self._waiting.get(sender, 0) + size
            senders = len(self._waiting) + (sender not in self._waiting)
            if total > self.limit or (total > self.limit // 2 and own > self.limit // 2 // senders):
                return False
            self.size, self._waiting[sender] = total, own
        self._items.put((topic, payload))
        return True

    def flooder(self) -> str:
        """The topic, as far as the sender in it, that has most bytes waiting; empty unless those are a good part."""
        with self._lock:
            sender = max(self._waiting, key=lambda sender: self._waiting[sender], default="")
            return sender if self._waiting.get(sender, 0) > self.limit // _FLOOD else ""

    def tell(self, event: E) -> None:
        """Take in an event; there is always room for one."""
        self._items.put(event)

    def wake(self) -> None:
        """End a `get` that waits; an inbox in which something waits needs none."""
        if self._items.empty():
            self._items.put(None)

    def get(self, timeout: float | None) -> tuple[str, bytes] | E | None:
        """The oldest message or event; None if none came within `timeout` seconds (None: no end) or before a `wake`."""
        try:
            item = self._items.get(timeout=timeout) if timeout != 0 else self._items.get_nowait()
            while item is None:
                item = self._items.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, tuple):
            self._taken(item[0], MESSAGE_BYTES + len(item[1]))
        return item

    def _taken(self, topic: str, size: int) -> None:
        sender = _sender(topic)
        with self._lock:
            self.size -= size
            left = self._waiting[sender] - size
            if left:
                self._waiting[sender] = left
            else:
                del self._waiting[sender]


def _sender(topic: str) -> str:
    """A topic as far as the device in it: what comes below that is one sender's."""
    return "/".join(topic.split("/", 4)[:4])


def _keep_freed_memory() -> None:
    """Let glibc keep a little of what is freed.

    Chunks take memory and free it again all the time. By default it goes back to the system as soon as 128 KiB are free
    at the end of the heap, and the system clears each page before it gives it out again. A larger block that is freed
    raises that limit to twice its size (mallopt(3), M_MMAP_THRESHOLD); nothing is written to this one.
    """
    bytes(_KEPT_BYTES)
