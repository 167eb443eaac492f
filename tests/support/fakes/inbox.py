"""A server's connection without a broker: messages that wait to be read, and what is sent, which goes nowhere."""

from collections import deque
from collections.abc import Iterable

from fedprune.wire.queues import ConnectionUp

Received = tuple[str, bytes] | ConnectionUp


class Inbox:
    """A connection that is up."""

    connected, room, unsent = True, True, 0

    def __init__(self, waiting: Iterable[Received] = ()) -> None:
        self.waiting = deque[Received](waiting)
        self.sent: list[str] = []

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        self.sent.append(topic)
        return True

    def get(self, timeout: float | None = 0.0) -> Received | None:
        return self.waiting.popleft() if self.waiting else None

    def flush(self, timeout: float) -> bool:
        return True
