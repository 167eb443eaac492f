"""A sign of life on stderr for commands that take long before their first output."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TextIO

AFTER_S = 1.0
"""Silence before the spinner appears."""

_TURN_S = 0.1
_SIGNS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ERASE = "\r\x1b[2K"


@contextmanager
def spinner(title: str) -> Iterator[None]:
    """Show a spinner on a terminal from `AFTER_S` on until something is written to stdout or stderr.

    What a child process or a prompt on /dev/tty writes isn't seen: write an empty text to stderr before.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    turning = _Turning(sys.stderr, title)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Watched(stream, turning.end) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        turning.end()


class _Turning:
    """A spinner in a thread of its own."""

    def __init__(self, stream: TextIO, title: str) -> None:
        self._stream, self._title = stream, title
        self._guard, self._ended, self._shown = threading.Lock(), threading.Event(), False
        threading.Thread(target=self._turn, name="spinner", daemon=True).start()

    def end(self) -> None:
        """Erase the spinner; nothing is shown afterwards."""
        if self._ended.is_set():
            return
        self._ended.set()  # first: a signal's handler that writes meanwhile must not wait for this thread
        with self._guard:
            if self._shown:
                self._stream.write(_ERASE)
                self._stream.flush()

    def _turn(self) -> None:
        pause, began = AFTER_S, time.monotonic()
        for sign in itertools.cycle(_SIGNS):
            if self._ended.wait(pause):
                return
            pause = _TURN_S
            with self._guard:
                if not self._ended.is_set():
                    self._shown = True
                    self._stream.write(f"{_ERASE}{sign} {self._title}, {time.monotonic() - began:.0f} s")
                    self._stream.flush()


class _Watched:
    """A stream that reports its first use, before the write."""

    def __init__(self, stream: TextIO, used: Callable[[], None]) -> None:
        self._stream, self._used = stream, used

    def write(self, text: str) -> int:
        self._used()
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self._used()
        self._stream.writelines(lines)

    @property
    def buffer(self) -> BinaryIO:
        """The stream of bytes below, about to be used."""
        self._used()
        return self._stream.buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
