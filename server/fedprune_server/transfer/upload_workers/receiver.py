"""One receiver as the server sees it: a process, what it was told, and what it says."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator

from fedprune_server.process.line_process import ChildProcess
from fedprune_server.transfer.upload_workers.messages import Beat, Begin, ToReceiver, ToServer, line, read

SILENT_S = 30.0
"""A receiver that has said for so long nothing, or that it has no connection, is ended and started again."""

_END_S = 5.0


class Receiver:
    """A receiver's process. A new one has a tag of its own: what was meant for the last one reaches nobody.

    Args:
        begin: The first word to a process with a tag.
        wake: Called from another thread when it has said something.
    """

    def __init__(self, begin: Callable[[str], Begin], wake: Callable[[], None]) -> None:
        self._begin = begin
        self._child: ChildProcess[ToReceiver | ToServer] = ChildProcess(
            [sys.executable, "-m", "fedprune_server.transfer.upload_workers.child"],
            "a receiver",
            read,
            end_s=_END_S,
            wake=wake,
        )
        self.tag = ""
        self.load = 0
        """Bytes of updates that it was told to fetch and hasn't."""
        self._heard = 0.0

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._child.alive

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._child.pid

    def start(self, now: float) -> bool:
        """Start a process, unless it has been tried too often lately; returns whether there is a new one."""
        started = self._child.start(self._first, now)
        if started:
            self._heard = now
        return started

    def say(self, word: ToReceiver) -> None:
        """Tell it something, without waiting."""
        self._child.tell(line(word))

    def words(self, now: float) -> Iterator[ToReceiver | ToServer]:
        """What it has said since the last call; at its end, and when it was silent for too long, it is ended."""
        for word in self._child.words(now):
            if not isinstance(word, Beat) or word.up:
                self._heard = now
            yield word
        if self.alive and now - self._heard > SILENT_S:
            why = f"it said nothing, or had no connection to the broker, for {SILENT_S:.0f} s"
            self._child.give_up(now, why)

    def stop(self) -> None:
        """End the process; may be called twice."""
        self._child.stop()

    def _first(self) -> bytes:
        self.tag, self.load = secrets.token_hex(8), 0
        return line(self._begin(self.tag))
