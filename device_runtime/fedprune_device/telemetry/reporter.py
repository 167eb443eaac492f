"""A board's connection through which its log and its last crash reach the server; all else passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.log_messages import CrashReport, LogWanted
from fedprune.wire.messages import parse
from fedprune.wire.topics import Topics
from fedprune_device.network.uplink import Wire
from fedprune_device.telemetry.crash_reports import CrashReports
from fedprune_device.telemetry.log_buffer import LogBuffer

_AGAIN_S = 60.0
"""What the server hasn't kept after so long is told again."""

_BETWEEN_S = 5.0
"""Between two messages of lines: what comes at once is told at once."""

_LOGGER = "fedprune"


class LogReporter:
    """What the agent speaks and hears through.

    Args:
        link: The connection.
        device: The board's name.
        site: The fleet's site.
        log: The lines for the server.
        crashes: The last run's end.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        link: Wire,
        device: str,
        site: str,
        log: LogBuffer,
        crashes: CrashReports,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._device = link, device
        self._topic, self._down = Topics(site).up(device), Topics(site).down(device)
        self._log, self._crashes, self._clock = log, crashes, clock
        self._wanted: LogWanted | None = None
        self._crash: CrashReport | None = None
        self._next = 0.0

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        return self._link.unsent

    def listen(self, topics: Collection[str]) -> None:
        """Listen to exactly these shared topics."""
        self._link.listen(topics)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting; a birth is answered by what the server wants of the log, if it wants any."""
        if topic == self._topic and b'"type":"birth"' in payload:
            self._wanted = None
        return self._link.publish(topic, payload, qos)

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | ConnectionUp | ConnectionDown | None:
        """The next message or event of the link, but for what concerns the log."""
        item = self._link.get(timeout)
        if isinstance(item, (ConnectionUp, ConnectionDown)):
            self._wanted = None
        elif item is not None and item[0] == self._down and b'"log_wanted"' in item[1]:
            try:
                message = parse(item[1])
            except ProtocolError:
                return item  # the agent complains of it
            if isinstance(message, LogWanted):
                self._heard(message)
                item = None
        self._turn()
        return item

    def _heard(self, message: LogWanted) -> None:
        first, self._wanted = self._wanted is None, message
        if message.kept is not None:
            self._log.kept(message.kept)
            if self._crash is not None and self._crash.number <= message.kept:
                self._crash = None
                self._crashes.told()
        if first or message.kept is not None:
            self._next = min(self._next, self._clock() + (0.0 if first else _BETWEEN_S))

    def _turn(self) -> None:
        self._log.save()
        now = self._clock()
        if self._wanted is None or now < self._next or not self._wanted.lines:
            return
        try:
            message = self._unheard_crash() or self._log.take(self._wanted.lines, self._wanted.bytes)
            self._next = now + (_BETWEEN_S if message is None else _AGAIN_S)
            if message is not None:
                self._link.publish(self._topic, message.to_bytes())
        except FedpruneError:
            self._next = now + _AGAIN_S  # a disk that fails: nothing of this is worth a line

    def _unheard_crash(self) -> CrashReport | None:
        if self._crash is None and (body := self._crashes.report) is not None:
            try:
                self._crash = CrashReport(self._device, self._log.number, **body)
            except (ProtocolError, TypeError):
                self._crashes.told()  # of another version, or damaged
        return self._crash


@contextmanager
def reporting(
    folder: Path, device: str, quiet: Callable[[], bool] = lambda: False
) -> Iterator[tuple[LogBuffer, CrashReports]]:
    """Keep the log's warnings and how this run ends, for the server.

    Args:
        folder: The board's state directory, which this process holds.
        device: The board's name.
        quiet: Whether its samples are in a private job, of which no text tells.
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
