"""The console's process as the server sees it: started anew when it dies, and never waited for."""

from __future__ import annotations

import logging
import queue
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

from fedprune.errors import ProtocolError
from fedprune_server.console.feed_words import Begin, Listening, Order, ToConsole, ToServer, line, read_order

log = logging.getLogger("fedprune.server")

STEADY_S = 60.0
"""One that ran for so long and then ends is started again at once, any number of times."""

REST_S = 60.0
"""After `TRIES` that ended sooner it is left alone for so long."""

TRIES = 3

FULL = 500
"""Lines that wait for it; with more it is told nothing new until it has read some."""

STUCK_S = 30.0
"""One that has read nothing of what waits for so long is ended, and started anew."""

MOST_ORDERS = 200
"""Orders that wait for the server; a console that sends more is ended."""

_END_S = 3.0


class ConsoleProcess:
    """A console's process.

    Args:
        begin: The first line to it.
        command: What is started; None for the console.
    """

    def __init__(self, begin: Begin, command: list[str] | None = None) -> None:
        self._begin = begin
        self._command = command or [sys.executable, "-m", "fedprune_server.console.child"]
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._words: queue.Queue[ToServer | None] = queue.Queue(MOST_ORDERS)
        self._began = self._rests_until = self._read_at = 0.0
        self._waiting = 0
        self._short = 0
        self.url = ""
        """Where it listens; empty until it said so."""

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The process."""
        return None if self._process is None else self._process.pid

    @property
    def full(self) -> bool:
        """Whether it has so much to read that it isn't told more."""
        return self._lines.qsize() >= FULL

    def start(self, now: float) -> bool:
        """Start a process, unless it has been tried too often lately; returns whether there is a new one."""
        if self.alive or now < self._rests_until:
            return False
        try:
            process = subprocess.Popen(  # noqa: S603  # nosec B603  # our own module, in this Python
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is for the server, which then ends it
            )
        except OSError as error:
            log.error("the console can't be started: %s", error)
            self._rests_until = now + REST_S
            return False
        self._process, self.url = process, ""
        self._lines, self._words = queue.Queue(), queue.Queue(MOST_ORDERS)
        self._began = self._read_at = now
        self._lines.put(line(self._begin))
        for target, pipe, words in ((_write, process.stdin, self._lines), (_read, process.stdout, self._words)):
            thread: Callable[..., None] = target
            threading.Thread(target=thread, args=(pipe, words), name="fedprune-console", daemon=True).start()
        return True

    def tell(self, word: ToConsole) -> None:
        """Tell it something, without waiting."""
        self._lines.put(line(word))

    def orders(self, now: float) -> Iterator[Order]:
        """Orders that came since the last call; at its end, and when it is stuck, the process is ended."""
        while True:
            try:
                word = self._words.get_nowait()
            except queue.Empty:
                break
            if word is None:
                self._ended(now, "it has ended")
                return
            if isinstance(word, Listening):
                if word.url != self.url:
                    log.info("the console is at %s", word.url)
                self.url = word.url
            else:
                yield word
        waiting = self._lines.qsize()
        if waiting == 0 or waiting < self._waiting:
            self._read_at = now
        self._waiting = waiting
        if self.alive and now - self._read_at > STUCK_S:
            self._ended(now, f"it has read nothing for {STUCK_S:.0f} s")

    def stop(self) -> None:
        """End the process; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        self._lines.put(None)
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
        log.warning("the console is started again: %s (exit code %s)", why, code)
        self._short = 0 if now - self._began > STEADY_S else self._short + 1
        if self._short >= TRIES:
            self._short, self._rests_until = 0, now + REST_S
            log.error("the console ended %d times within a minute: the server does without it for a minute", TRIES)


def _write(stream: BinaryIO, lines: queue.Queue[bytes | None]) -> None:
    """Write what a process is told; it may take its time."""
    with suppress(OSError, ValueError):
        while (raw := lines.get()) is not None:
            stream.write(raw)
            if lines.empty():
                stream.flush()
    with suppress(OSError, ValueError):
        stream.close()


def _read(stream: BinaryIO, words: queue.Queue[ToServer | None]) -> None:
    """Read what a process says; the end of that, or nonsense, is its end."""
    try:
        with stream:
            while (word := read_order(stream)) is not None:
                words.put(word, timeout=STUCK_S)
    except (OSError, ValueError, ProtocolError, queue.Full) as error:
        log.error("the console says what makes no sense: %s", error)
    words.put(None)
