"""Starts the console's process, and starts it again when it ends or hangs; the server never waits for it."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import BinaryIO

from fedprune.core.errors import ConfigError
from fedprune.core.imports import module_code
from fedprune.core.records import decode_record, encode_record
from fedprune_server.process.child_process import ChildProcess, RestartedProcess

log = logging.getLogger("fedprune.server")

# Lines of the process that may wait for the server, which reads them twice a second; with more the process is ended.
MAX_UNREAD_LINES = 200

_NAME = "the console"
_MAX_LINE_BYTES = 4096
_STOP_S = 3.0
# A console that has sent nothing for this long is ended and started again: six of its signs of life are missing.
SILENCE_LIMIT_S = 30.0

# Variables that the process gets, and prefixes of further ones. Others may hold passwords of databases and buckets, and
# browsers reach this process.
_VARIABLES = ("HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV")
_VARIABLE_PREFIXES = ("LC_", "PYTHON")


@dataclass(frozen=True)
class ConsoleStart:
    """What the console's process reads from its standard input at its start.

    Attributes:
        folder: The state folder, with `console.db` and `status.db`.
        orders: Which orders it accepts: `none`, `look` or `all`.
        hosts: Names that browsers may use in addition to its address.
        proxied: Whether a reverse proxy on this machine terminates TLS.
        parent: The server's process id.
    """

    address: str
    port: int
    folder: str
    certificate: str | None
    key: str | None
    orders: str
    hosts: tuple[str, ...]
    proxied: bool
    parent: int

    @classmethod
    def from_json(cls, text: bytes) -> ConsoleStart:
        """Raises `ConfigError` if it is not what `to_json` writes."""
        return decode_record(cls, text, "the start of a console", ConfigError)

    def to_json(self) -> bytes:
        return encode_record(self) + b"\n"


class ConsoleProcess:
    """A console's process, or another `command`. It repeats its address every few seconds as a sign of life."""

    def __init__(self, settings: ConsoleStart, command: list[str] | None = None) -> None:
        self._settings = settings
        self._command = command or [sys.executable, "-c", module_code("fedprune_server.web.child")]
        self._child = RestartedProcess(self._start, _NAME, stop_s=_STOP_S)
        self._last_sign_at = 0.0
        self.url = ""  # where it listens; empty until it has reported its address

    @property
    def is_alive(self) -> bool:
        return self._child.is_alive

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def turn(self, now: float) -> None:
        """Start the process if it has ended, unless it was tried too often lately, and end one that hangs."""
        if self._child.start(self._settings.to_json, now):
            self.url, self._last_sign_at = "", now
        for url in self._child.receive_all(now):
            if url != self.url:
                log.info("the console is at %s", url)
            self.url, self._last_sign_at = url, now
        if self.is_alive and now - self._last_sign_at > SILENCE_LIMIT_S:
            self._child.kill(now, f"it has not responded for {SILENCE_LIMIT_S:.0f} s")

    def stop(self) -> None:
        """End the process; may be called twice."""
        self._child.stop()

    def _start(self) -> ChildProcess[str]:
        # Without secrets: browsers reach the process.
        environment = {k: v for k, v in os.environ.items() if k in _VARIABLES or k.startswith(_VARIABLE_PREFIXES)}
        return ChildProcess(self._command, _NAME, _read_url, max_unread=MAX_UNREAD_LINES, environment=environment)


def _read_url(stream: BinaryIO) -> str | None:
    raw = stream.readline(_MAX_LINE_BYTES)
    if not raw:
        return None
    if not raw.startswith(b"http") or not raw.endswith(b"/\n"):
        raise ValueError("expected an address")
    return raw.decode("ascii").strip()
