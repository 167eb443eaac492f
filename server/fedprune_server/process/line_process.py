"""A child process that is spoken with in lines over its standard streams, and restarted when it ends."""

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
"""One that ran for so long and then ends is started again at once, any number of times."""

REST_S = 60.0
"""After `TRIES` that ended sooner it is left alone for so long."""

TRIES = 3

STUCK_S = 30.0
"""What a child says waits at most so long for room among the words that nobody has heard."""

Word = TypeVar("Word")


class ChildProcess(Generic[Word]):
    """A child as its parent sees it. Nothing here waits for it, but `stop` for a few seconds.

    Args:
        command: Program and arguments.
        name: What messages call it, such as `a receiver`.
        read: Reads its next word; None at the end.
        end_s: How long it has to end when it is asked to.
        most: How many of its words may wait; with more it is ended. 0 for any number.
        environment: Its environment variables; None for this process's.
        wake: Called from another thread when it has said something.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        read: Callable[[BinaryIO], Word | None],
        *,
        end_s: float,
        most: int = 0,
        environment: Mapping[str, str] | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._command, self._name, self._read_word = list(command), name, read
        self._end_s, self._most, self._wake, self._environment = end_s, most, wake, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._words: queue.Queue[Word | None] = queue.Queue(most)
        self._began = self._rests_until = 0.0
        self._short = 0

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The process."""
        return None if self._process is None else self._process.pid

    @property
    def waiting(self) -> int:
        """How many lines it has still to be told."""
        return self._lines.qsize()

    def start(self, first: Callable[[], bytes], now: float) -> bool:
        """Start a process, unless there is one or it has been tried too often lately.

        Args:
            first: Makes the first line to it.
            now: The time.

        Returns:
            Whether there is a new one.
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
        # The last one's threads keep the queues that they have.
        self._lines, self._words = queue.Queue(), queue.Queue(self._most)
        self._lines.put(begin)
        for target, pipe, passing in ((_write, process.stdin, self._lines), (self._read, process.stdout, self._words)):
            run: Callable[..., None] = target
            thread = f"fedprune-{self._name.split()[-1]}"
            threading.Thread(target=run, args=(pipe, passing), name=thread, daemon=True).start()
        return True

    def tell(self, line: bytes) -> None:
        """Tell it something, without waiting."""
        self._lines.put(line)

    def words(self, now: float) -> Iterator[Word]:
        """What it has said since the last call; where that was its last, it is ended."""
        while True:
            try:
                word = self._words.get_nowait()
            except queue.Empty:
                return
            if word is None:
                self.give_up(now, "it has ended")
                return
            yield word

    def give_up(self, now: float, why: str) -> None:
        """End it at once, so that it can be restarted."""
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

    def _read(self, stream: BinaryIO, words: queue.Queue[Word | None]) -> None:
        """Read what it says; the end of that, or nonsense, is its end."""
        try:
            with stream:
                while (word := self._read_word(stream)) is not None:
                    words.put(word, timeout=STUCK_S)
                    self._wake()
        except (OSError, ValueError, ProtocolError, queue.Full) as error:
            log.error("%s says what makes no sense: %s", self._name, error)
        words.put(None)
        self._wake()


def checked_line(raw: bytes, limit: int, what: str, types: Mapping[str, type[Any]]) -> Any:
    """Read and check a line of such a child, or to it.

    Args:
        raw: The line, with its end.
        limit: Bytes that it may have.
        what: What errors call it.
        types: The words that it may be, by their kinds.

    Raises:
        ProtocolError: It is too long or cut short, no JSON, or a field is missing or wrong.
    """
    if len(raw) > limit or not raw.endswith(b"\n"):
        raise ProtocolError(what, expected=f"at most {limit} bytes and its end", got=shown(raw[:80]))
    return read_checked(raw, what, types)


def _write(stream: BinaryIO, lines: queue.Queue[bytes | None]) -> None:
    """Write what a process is told; it may take its time."""
    with suppress(OSError, ValueError):
        while (raw := lines.get()) is not None:
            stream.write(raw)
            if lines.empty():
                stream.flush()
    with suppress(OSError, ValueError):
        stream.close()
