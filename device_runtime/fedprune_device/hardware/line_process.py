"""Runs a program that answers lines of JSON with lines of JSON on its standard streams."""

from __future__ import annotations

import json
import os
import subprocess  # nosec B404  # lists of words, never a shell
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from fedprune.core.closeable import Closeable

# The beginning of an answer, since libraries print lines of their own.
ANSWER_PREFIX = "fedprune: "

# A program that was asked to end is killed after this time.
_CLOSE_TIMEOUT_S = 5.0
# Bytes of the error output that are kept: the last lines name the error.
_MAX_ERROR_BYTES = 2**16
_READ_BYTES = 2**18
# A program without newlines, or that prints for ever, must not fill this process's memory or time.
_MAX_LINE_BYTES = 2**20
_MAX_STRAY_LINES = 1000


class StrayLinesError(Exception):
    """The program prints too many lines that are no answers."""


class LineProcess(Closeable):
    """A started program, which is killed when a call takes longer than its seconds: `timed_out` is true from then on.

    Raises `OSError` if it can't be started. One thread at a time may call it; any may call `kill`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.timed_out = False
        self._error_output = bytearray()
        self.process = subprocess.Popen(  # noqa: S603  # nosec B603  # words of the caller's own
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._in, self._out = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self._listener = threading.Thread(target=self._read_errors, daemon=True)
        self._listener.start()

    def send(self, data: bytes, seconds: float) -> None:
        """Write to the program; raises `OSError` if it has ended."""
        with self._time_limit(seconds):
            self._in.write(data)
            self._in.flush()

    def read_answer(self, seconds: float) -> Any:
        """The next answer. Raises `EOFError` if the program has ended, `StrayLinesError`, or `ValueError` or
        `RecursionError` if the answer is not JSON."""
        with self._time_limit(seconds):
            for _ in range(_MAX_STRAY_LINES):
                raw = self._out.readline(_MAX_LINE_BYTES)
                if not raw:
                    raise EOFError
                line = raw.decode("utf-8", "replace")
                if line.startswith(ANSWER_PREFIX):
                    return json.loads(line[len(ANSWER_PREFIX) :])
        raise StrayLinesError

    def wait_for_end(self) -> tuple[int, str]:
        """The exit status of a program that has ended, or is killed after 5 s; the end of its error output."""
        try:
            code = self.process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.process.wait()
        self._listener.join(_CLOSE_TIMEOUT_S)
        return code, self._error_output.decode("utf-8", "replace")

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        # Closing flushes data that the program never read, which blocks or fails.
        with suppress(OSError), self._time_limit(_CLOSE_TIMEOUT_S):
            self._in.close()
        self.wait_for_end()
        self._out.close()

    @contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(max(seconds, 0.0), self._kill_late_process)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill_late_process(self) -> None:
        self.timed_out = True
        self.kill()

    def _read_errors(self) -> None:
        """Read the error output, so that the program never blocks on it, and keep its end."""
        with cast(IO[bytes], self.process.stderr) as source:
            while chunk := os.read(source.fileno(), _READ_BYTES):
                self._error_output += chunk
                del self._error_output[:-_MAX_ERROR_BYTES]
