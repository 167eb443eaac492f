"""Child processes that exchange messages with this one over their standard streams. No call waits for a pipe."""

from __future__ import annotations

import logging
import queue
import subprocess  # nosec B404  # lists of words, never a shell
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO, Generic, TypeVar

from fedprune.core.errors import FedpruneError, ProtocolError

log = logging.getLogger("fedprune.server")

# A child that ran at least this long is restarted at once when it ends, any number of times: only one that ends right
# after each start would keep the server busy with restarts.
STABLE_RUN_S = 60.0

# Number of shorter runs in a row after which the next start waits for `RESTART_BACKOFF_S`.
MAX_SHORT_RUNS = 3

RESTART_BACKOFF_S = 60.0

# Seconds for which a child's message waits for room in the queue of unread messages. After that nothing more is read
# from the child: the server's loop can't keep up with it.
_FULL_QUEUE_TIMEOUT_S = 30.0

Message = TypeVar("Message")


class ChildDiedError(FedpruneError):
    """A child process ended before its work was done."""


class ChildProcess(Generic[Message]):
    """One run of a child process, in a session of its own: Ctrl-C at the terminal reaches only this process, which
    then ends the child. Raises `OSError` if it can't be started.

    Args:
        name: The child's name in the log, such as `the console`.
        read: Reads the child's next message; returns None at the end.
        max_unread: Maximum number of unread messages, with more of which the child is ended; 0 for no limit.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        read: Callable[[BinaryIO], Message | None],
        *,
        max_unread: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name, self._read_message = name, read
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._messages: queue.Queue[Message | None] = queue.Queue(max_unread)
        self.has_ended = False  # whether all its messages have been received and it sends no more
        self._process = subprocess.Popen(  # noqa: S603  # nosec B603  # our own module, in this Python
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        thread = f"fedprune-{name.split()[-1]}"
        threading.Thread(target=self._write, args=(self._process.stdin,), name=thread, daemon=True).start()
        threading.Thread(target=self._read, args=(self._process.stdout,), name=thread, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    def send(self, line: bytes) -> None:
        """Send a line to the child, without waiting."""
        self._lines.put(line)

    def receive(self, timeout: float = 0.0) -> Message | None:
        """The child's next message; None if none comes in time, or the child has ended."""
        if self.has_ended:
            return None
        try:
            message = self._messages.get(block=timeout > 0.0, timeout=timeout)
        except queue.Empty:
            return None
        self.has_ended = message is None
        return message

    def kill(self) -> None:
        self._process.kill()

    def stop(self, timeout: float) -> None:
        """End the child: close its standard input and send SIGTERM, and SIGKILL after `timeout` seconds."""
        self._lines.put(None)
        self._process.terminate()
        wait_or_kill(self._process, timeout)

    def _read(self, stream: BinaryIO) -> None:
        """Queue the child's messages until its stream ends or a message can't be read."""
        try:
            with stream:
                while (message := self._read_message(stream)) is not None:
                    self._messages.put(message, timeout=_FULL_QUEUE_TIMEOUT_S)
        except (OSError, ValueError, ProtocolError, queue.Full) as error:
            log.error("can't read what %s sends: %s", self._name, error)
        self._messages.put(None)

    def _write(self, stream: BinaryIO) -> None:
        with suppress(OSError, ValueError):
            while (line := self._lines.get()) is not None:
                stream.write(line)
                if self._lines.empty():  # one system call for many lines
                    stream.flush()
        with suppress(OSError, ValueError):
            stream.close()


class RestartedProcess(Generic[Message]):
    """A child process that is started again when it ends. Only `kill` and `stop` wait for it, for `stop_s` at most. The
    log names it `name`, such as `the console`."""

    def __init__(self, start: Callable[[], ChildProcess[Message]], name: str, *, stop_s: float) -> None:
        self._start, self._name, self._stop_s = start, name, stop_s
        self._child: ChildProcess[Message] | None = None
        self._started_at = self._next_start_at = 0.0
        self._short_runs = 0

    @property
    def is_alive(self) -> bool:
        """Whether the process exists. One that has ended counts until its last message is received."""
        return self._child is not None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def start(self, first_line: Callable[[], bytes], now: float) -> bool:
        """Start the process, and send it the first line; not if it exists or has ended too often lately. Returns
        whether it was started. `now` is of a monotonic clock."""
        if self._child is not None or now < self._next_start_at:
            return False
        encoded_line = first_line()
        try:
            self._child = self._start()
        except OSError as error:
            log.error("%s can't be started: %s", self._name, error)
            self._next_start_at = now + RESTART_BACKOFF_S
            return False
        self._started_at = now
        self._child.send(encoded_line)
        return True

    def send(self, line: bytes) -> None:
        """Send a line to the process, without waiting. Without a process the line is lost."""
        if self._child is not None:
            self._child.send(line)

    def receive_all(self, now: float) -> Iterator[Message]:
        """The messages since the last call. A process that has ended may then be started again."""
        child = self._child
        if child is None:
            return
        while (message := child.receive()) is not None:
            yield message
        if child.has_ended and child is self._child:
            self.kill(now, "it has ended")

    def kill(self, now: float, reason: str) -> None:
        """Kill the process, so that it can be started again."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.stop(self._stop_s)
        log.warning("%s is started again: %s (exit code %s)", self._name, reason, child.exit_code)
        self._short_runs = 0 if now - self._started_at > STABLE_RUN_S else self._short_runs + 1
        if self._short_runs >= MAX_SHORT_RUNS:
            self._short_runs, self._next_start_at = 0, now + RESTART_BACKOFF_S
            message = "%s ended %d times within a minute: the server does without it for a minute"
            log.error(message, self._name, MAX_SHORT_RUNS)

    def stop(self) -> None:
        """End the process; may be called twice."""
        child, self._child = self._child, None
        if child is not None:
            child.stop(self._stop_s)


def wait_or_kill(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Wait for a process that was asked to end; kill it if it takes longer than `timeout` seconds."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
    process.kill()  # does nothing to one that has ended
    process.wait()
