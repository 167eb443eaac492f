"""One receiver as the server sees it: a process, what it was told, and what it says."""

from __future__ import annotations

import logging
import queue
import secrets
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

from fedprune.errors import ProtocolError
from fedprune_server.receivers.words import Beat, Begin, ToReceiver, ToServer, line, read

log = logging.getLogger("fedprune.server")

SILENT_S = 30.0
"""A receiver that has said for so long nothing, or that it has no connection, is ended and started again."""

STEADY_S = 60.0
"""One that ran for so long and then ends is started again at once, any number of times."""

REST_S = 60.0
"""After `TRIES` that ended sooner it is left alone for so long."""

TRIES = 3

_END_S = 5.0


class Receiver:
    """A receiver's process. A new one has a tag of its own: what was meant for the last one reaches nobody.

    Args:
        begin: The first word to a process with a tag.
        wake: Called from another thread when it has said something.
    """

    def __init__(self, begin: Callable[[str], Begin], wake: Callable[[], None]) -> None:
        self._begin = begin
        self._wake = wake
        self.tag = ""
        self.load = 0
        """Bytes of updates that it was told to fetch and hasn't."""
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: queue.Queue[bytes | None] = queue.Queue()
        self._words: queue.Queue[ToReceiver | ToServer | None] = queue.Queue()
        self._began = self._heard = self._rests_until = 0.0
        self._short = 0

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The process."""
        return None if self._process is None else self._process.pid

    def start(self, now: float) -> bool:
        """Start a process, unless it has been tried too often lately; returns whether there is one."""
        if now < self._rests_until:
            return False
        self.tag, self.load = secrets.token_hex(8), 0
        first = line(self._begin(self.tag))
        try:
            process = subprocess.Popen(  # nosec B603  # our own module, in this Python
                [sys.executable, "-m", "fedprune_server.receivers.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is for the server, which then ends its receivers
            )
        except OSError as error:
            log.error("a receiver can't be started: %s", error)
            self._rests_until = now + REST_S
            return False
        self._process = process
        self._orders, self._words = queue.Queue(), queue.Queue()
        self._began = self._heard = now
        self._orders.put(first)
        for target, arguments in (
            (_write, (process.stdin, self._orders)),
            (_read, (process.stdout, self._words, self._wake)),
        ):
            threading.Thread(target=target, args=arguments, name="fedprune-receiver", daemon=True).start()
        return True

    def say(self, word: ToReceiver) -> None:
        """Tell it something, without waiting."""
        self._orders.put(line(word))

    def words(self, now: float) -> Iterator[ToReceiver | ToServer]:
        """What it has said since the last call; at its end, and when it was silent for too long, it is ended."""
        while True:
            try:
                word = self._words.get_nowait()
            except queue.Empty:
                break
            if word is None:
                self._ended(now, "it has ended")
                return
            if not isinstance(word, Beat) or word.up:
                self._heard = now
            yield word
        if self.alive and now - self._heard > SILENT_S:
            self._ended(now, f"it said nothing, or had no connection to the broker, for {SILENT_S:.0f} s")

    def stop(self) -> None:
        """End the process; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        self._orders.put(None)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        process.kill()  # nothing to one that has ended
        process.wait()

    def _ended(self, now: float, why: str) -> None:
        process = self._process
        if process is not None:
            process.kill()
        self.stop()
        code = None if process is None else process.returncode
        log.warning("a receiver is started again: %s (exit code %s)", why, code)
        self._short = 0 if now - self._began > STEADY_S else self._short + 1
        if self._short >= TRIES:
            self._short, self._rests_until = 0, now + REST_S
            log.error("a receiver ended %d times within a minute: the server does without it for a minute", TRIES)


def _write(stream: BinaryIO, orders: queue.Queue[bytes | None]) -> None:
    """Write what a process is told; it may take its time."""
    with suppress(OSError, ValueError):
        while (raw := orders.get()) is not None:
            stream.write(raw)
            if orders.empty():
                stream.flush()
    with suppress(OSError, ValueError):
        stream.close()


def _read(stream: BinaryIO, words: queue.Queue[ToReceiver | ToServer | None], wake: Callable[[], None]) -> None:
    """Read what a process says; the end of that, or nonsense, is its end."""
    try:
        with stream:
            while (word := read(stream)) is not None:
                words.put(word)
                wake()
    except (OSError, ValueError, ProtocolError) as error:
        log.error("a receiver says what makes no sense: %s", error)
    words.put(None)
    wake()
