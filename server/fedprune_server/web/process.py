"""The console's process as the server sees it: started anew when it dies, and never waited for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

from fedprune_server.process.line_process import STUCK_S, ChildProcess
from fedprune_server.web.state.order_messages import Order
from fedprune_server.web.state.publisher_messages import Begin, Listening, ToConsole, ToServer, line, read_order

log = logging.getLogger("fedprune.server")

FULL = 500
"""Lines that wait for it; with more it is told nothing new until it has read some."""

MOST_ORDERS = 200
"""Orders that wait for the server; a console that sends more is ended."""

_END_S = 3.0

_ENVIRONMENT = ("HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV")
_ENVIRONMENTS = ("LC_", "PYTHON")
"""Variables that it gets, and what names of others begin with: passwords of databases and buckets stand in the rest."""


class Child(Protocol):
    """The console's process, as the feed needs it."""

    @property
    def full(self) -> bool:
        """Whether it has enough to read."""

    def start(self, now: float) -> bool:
        """Start it if it isn't there; whether there is a new one."""

    def tell(self, word: ToConsole) -> None:
        """Tell it something."""

    def orders(self, now: float) -> Iterator[Order]:
        """What it ordered."""

    def stop(self) -> None:
        """End it."""


class ConsoleProcess:
    """A console's process.

    Args:
        begin: The first line to it.
        command: What is started; None for the console.
    """

    def __init__(self, begin: Begin, command: list[str] | None = None) -> None:
        self._begin = begin
        self._child: ChildProcess[ToServer] = ChildProcess(
            command or [sys.executable, "-m", "fedprune_server.web.child"], "the console", read_order,
            end_s=_END_S, most=MOST_ORDERS, environment=harmless(os.environ),
        )  # fmt: skip
        self._read_at = 0.0
        self._waiting = 0
        self.url = ""
        """Where it listens; empty until it said so."""

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._child.alive

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._child.pid

    @property
    def full(self) -> bool:
        """Whether it has so much to read that it isn't told more."""
        return self._child.waiting >= FULL

    def start(self, now: float) -> bool:
        """Start a process, unless it has been tried too often lately; returns whether there is a new one."""
        started = self._child.start(lambda: line(self._begin), now)
        if started:
            self.url, self._read_at = "", now
        return started

    def tell(self, word: ToConsole) -> None:
        """Tell it something, without waiting."""
        self._child.tell(line(word))

    def orders(self, now: float) -> Iterator[Order]:
        """Orders that came since the last call; at its end, and when it is stuck, the process is ended.

        It is stuck when it has read nothing of what waits for `STUCK_S`.
        """
        for word in self._child.words(now):
            if isinstance(word, Listening):
                if word.url != self.url:
                    log.info("the console is at %s", word.url)
                self.url = word.url
            else:
                yield word
        if not self.alive:
            return
        waiting = self._child.waiting
        if waiting == 0 or waiting < self._waiting:
            self._read_at = now
        self._waiting = waiting
        if now - self._read_at > STUCK_S:
            self._child.give_up(now, f"it has read nothing for {STUCK_S:.0f} s")

    def stop(self) -> None:
        """End the process; may be called twice."""
        self._child.stop()


def harmless(environment: Mapping[str, str]) -> dict[str, str]:
    """What of a server's environment who speaks with browsers may have."""
    return {k: v for k, v in environment.items() if k in _ENVIRONMENT or k.startswith(_ENVIRONMENTS)}
