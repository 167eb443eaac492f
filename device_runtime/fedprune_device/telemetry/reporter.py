"""A board's log and its last crash, for its server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune.wire.fleet_messages import CrashReport, LogRequest
from fedprune_device.network.connection import Connection
from fedprune_device.telemetry.crash_reports import CrashReports
from fedprune_device.telemetry.log_buffer import LogBuffer

_AGAIN_S = 60.0  # lines that the server hasn't acknowledged by then are sent again
_BETWEEN_S = 5.0  # between two messages of lines, so that lines of one moment share a message

_LOGGER = "fedprune"


class LogReporter:
    """Sends the board's warnings and its last crash, once the server has asked for them."""

    def __init__(
        self, connection: Connection, log: LogBuffer, crashes: CrashReports, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connection, self._log, self._crashes, self._clock = connection, log, crashes, clock
        self._wanted: LogRequest | None = None
        self._crash: CrashReport | None = None
        self._next = 0.0

    def born(self) -> None:
        self._wanted = None

    def lost(self) -> None:
        self._wanted = None

    def wanted(self, message: LogRequest) -> None:
        """The server asks for lines, and acknowledges those that it has."""
        first, self._wanted = self._wanted is None, message
        if message.kept is not None:
            self._log.kept(message.kept)
            if self._crash is not None and self._crash.number <= message.kept:
                self._crash = None
                self._crashes.told()
        if first or message.kept is not None:
            self._next = min(self._next, self._clock() + (0.0 if first else _BETWEEN_S))

    def turn(self) -> None:
        self._log.save()
        now = self._clock()
        if self._wanted is None or now < self._next or not self._wanted.lines:
            return
        try:
            message = self._unheard_crash() or self._log.take(self._wanted.lines, self._wanted.bytes)
            self._next = now + (_BETWEEN_S if message is None else _AGAIN_S)
            if message is not None:
                self._connection.send(message)
        except FedpruneError:
            self._next = now + _AGAIN_S  # a disk that fails: nothing of this is worth a line

    def _unheard_crash(self) -> CrashReport | None:
        if self._crash is None and (body := self._crashes.report) is not None:
            try:
                self._crash = CrashReport(self._connection.device, self._log.number, **body)
            except (ProtocolError, TypeError):
                self._crashes.told()  # of another version, or damaged
        return self._crash


@contextmanager
def reporting(
    folder: Path, device: str, quiet: Callable[[], bool] = lambda: False
) -> Iterator[tuple[LogBuffer, CrashReports]]:
    """Keep the log's warnings and how this run ends, for the server.

    If `quiet` (its samples are in a private job), no text of them is reported.
    """
    log, crashes = LogBuffer(folder, device, quiet=quiet), CrashReports(folder, quiet=quiet)
    logger = logging.getLogger(_LOGGER)
    logger.addHandler(log)
    try:
        with crashes.watched():
            yield log, crashes
    finally:
        logger.removeHandler(log)
        log.save(now=True)
