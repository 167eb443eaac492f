"""Blobs on their way to devices: one chunk at a time, device by device, so that nobody waits behind a whole model."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from fedprune.wire.chunk import MAX_PACKET
from fedprune.wire.messages import Gone, Want
from fedprune.wire.transfer import Serve

MAX_WAITING = 64
"""Wants of one device that are kept; what is dropped beyond is asked for again."""


class Downloads:
    """Answers to devices' wants, interleaved. Does no network I/O.

    Args:
        serve: Reads blobs.
        max_packet: Bytes of an MQTT packet that the broker lets through.
    """

    def __init__(self, serve: Serve, max_packet: int = MAX_PACKET) -> None:
        self._serve = serve
        self._max_packet = max_packet
        self._wants: OrderedDict[str, deque[Want]] = OrderedDict()
        self._running: dict[str, Iterator[bytes]] = {}

    def __bool__(self) -> bool:
        """Whether something is to be sent."""
        return bool(self._wants) or bool(self._running)

    def add(self, device: str, want: Want) -> None:
        """Take in a want; one that is waiting already is not kept twice."""
        waiting = self._wants.setdefault(device, deque())
        if want not in waiting and len(waiting) < MAX_WAITING:
            waiting.append(want)

    def drop(self, device: str) -> None:
        """Forget what a device wanted."""
        self._wants.pop(device, None)
        self._running.pop(device, None)

    def next(self) -> tuple[str, bytes | Gone] | None:
        """The next chunk to send and to whom; `Gone` for a blob that isn't here.

        Raises:
            StorageError: The disk fails.
        """
        while self._wants:
            device, waiting = next(iter(self._wants.items()))
            running = self._running.get(device)
            if running is None:
                answer = self._serve.answer(waiting.popleft(), self._max_packet)
                if isinstance(answer, Gone):
                    self._turn(device)
                    return device, answer
                running = self._running[device] = iter(answer)
            chunk = next(running, None)
            if chunk is not None:
                self._wants.move_to_end(device)
                return device, chunk
            del self._running[device]
            self._turn(device)
        return None

    def _turn(self, device: str) -> None:
        """Let the next device have its turn; forget this one if it wants nothing more."""
        if self._wants[device]:
            self._wants.move_to_end(device)
        else:
            del self._wants[device]
