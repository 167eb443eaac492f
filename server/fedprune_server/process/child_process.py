"""A child process that exchanges lines with its parent over its standard streams, and is restarted when it ends."""

from __future__ import annotations

import logging
import queue
import subprocess  # nosec B404  # lists of words, never a shell
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Generic, TypeVar

from fedprune.core.errors import ProtocolError, shown
from fedprune.wire.fields import read_checked
from fedprune_server.process.children import reap

log = logging.getLogger("fedprune.server")

STEADY_S = 60.0
"""A child that ran at least this long is restarted at once when it ends, any number of times."""

REST_S = 60.0
"""Pause after `TRIES` children in a row that ended sooner."""

TRIES = 3

_FULL_S = 30.0
"""How long a child's message waits for room in the queue of unread messages before the child is ended."""

Message = TypeVar("Message")


class ChildProcess(Generic[Message]):
    """A child as its parent sees it. Only `stop` waits for it, for a few seconds.

    Args:
        command: Program and arguments.
        name: Its name in the log, such as `a receiver`.
        read: Reads its next message; None at the end.
        end_s: Seconds that it has for ending when asked to.
        most: Maximum number of unread messages; with more it is ended. 0 for no limit.
        environment: Its environment variables; None for this process's.
        wake: Called from another thread when it has sent a message.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        read: Callable[[BinaryIO], Message | None],
        *,
        end_s: float,
        most: int = 0,
        environment: Mapping[str, str] | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._command, self._name, self._read_message = list(command), name, read
        self._end_s, self._most, self._wake, self._environment = end_s, most, wake, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._messages: queue.Queue[Message | None] = queue.Queue(most)
        self._began = self._rests_until = 0.0
        self._short = 0

    @property
    def alive(self) -> bool:
        """Whether the process exists."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def waiting(self) -> int:
        """Number of lines that have not been written to it yet."""
        return self._lines.qsize()

    def start(self, first: Callable[[], bytes], now: float) -> bool:
        """Start the process, unless it exists or has ended too often lately; returns whether it was started.

        Args:
            first: Makes the first line to it.
            now: Seconds of a monotonic clock.
        """
        if self.alive or now < self._rests_until:
            return False
        begin = first()
        try:
            process = subprocess.Popen(  # noqa: S603  # nosec B603  # our own module, in this Python
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the server, which then ends it
            )
        except OSError as error:
            log.error("%s can't be started: %s", self._name, error)
            self._rests_until = now + REST_S
            return False
        self._process, self._began = process, now
        # The threads of the previous process keep its queues.
        self._lines, self._messages = queue.Queue(), queue.Queue(self._most)
        self._lines.put(begin)
        for target, pipe, passing in (
            (_write, process.stdin, self._lines),
            (self._read, process.stdout, self._messages),
        ):
            run: Callable[..., None] = target
            thread = f"fedprune-{self._name.split()[-1]}"
            threading.Thread(target=run, args=(pipe, passing), name=thread, daemon=True).start()
        return True

    def send(self, line: bytes) -> None:
        """Send it a line, without waiting."""
        self._lines.put(line)

    def received(self, now: float) -> Iterator[Message]:
        """Its messages since the last call. If it has ended, it may be started again."""
        while True:
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return
            if message is None:
                self.give_up(now, "it has ended")
                return
            yield message

    def give_up(self, now: float, why: str) -> None:
        """Kill it, so that it can be started again."""
        process = self._process
        if process is not None:
            process.kill()
        self.stop()
        code = None if process is None else process.returncode
        log.warning("%s is started again: %s (exit code %s)", self._name, why, code)
        self._short = 0 if now - self._began > STEADY_S else self._short + 1
        if self._short >= TRIES:
            self._short, self._rests_until = 0, now + REST_S
            said = "%s ended %d times within a minute: the server does without it for a minute"
            log.error(said, self._name, TRIES)

    def stop(self) -> None:
        """End the process; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        self._lines.put(None)
        process.terminate()
        reap(process, self._end_s)

    def _read(self, stream: BinaryIO, messages: queue.Queue[Message | None]) -> None:
        """Queue its messages; the end of the stream, or a message that can't be read, is its end."""
        try:
            with stream:
                while (message := self._read_message(stream)) is not None:
                    messages.put(message, timeout=_FULL_S)
                    self._wake()
        except (OSError, ValueError, ProtocolError, queue.Full) as error:
            log.error("can't read what %s sends: %s", self._name, error)
        messages.put(None)
        self._wake()


def checked_line(raw: bytes, limit: int, what: str, types: Mapping[str, type[Any]]) -> Any:
    """Parse a line of such a child, or to it.

    Args:
        raw: The line, with its newline.
        limit: Its maximum length in bytes.
        what: Its name in errors.
        types: Its possible message types, by kind.

    Raises:
        ProtocolError: It is too long or cut short, no JSON, or a field is missing or wrong.
    """
    if len(raw) > limit or not raw.endswith(b"\n"):
        raise ProtocolError(what, expected=f"at most {limit} bytes and its end", got=shown(raw[:80]))
    return read_checked(raw, what, types)


def _write(stream: BinaryIO, lines: queue.Queue[bytes | None]) -> None:
    """Write the queued lines to a process, which may read them slowly."""
    with suppress(OSError, ValueError):
        while (raw := lines.get()) is not None:
            stream.write(raw)
            if lines.empty():
                stream.flush()
    with suppress(OSError, ValueError):
        stream.close()
