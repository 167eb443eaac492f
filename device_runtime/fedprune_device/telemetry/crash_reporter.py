"""The report of a board's last crash to its server."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune.wire.fleet_messages import CrashReport, CrashStored
from fedprune_device.network.connection import BoardConnection
from fedprune_device.telemetry.crash_reports import CrashReports

_RESEND_INTERVAL_S = 60.0  # a crash that the server hasn't acknowledged by then is sent again


class CrashReporter:
    """Sends the last crash after every birth and then once a minute, until the server has stored it."""

    def __init__(
        self, connection: BoardConnection, crashes: CrashReports, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connection, self._crashes, self._clock = connection, crashes, clock
        # When to look for a crash; None before the birth of a connection, since the server knows no board until then.
        self._next_at: float | None = None

    def on_birth(self) -> None:
        self._next_at = self._clock()

    def on_disconnect(self) -> None:
        self._next_at = None

    def on_stored(self, message: CrashStored) -> None:
        """Delete a crash that the server has stored, unless another one has happened since it was sent."""
        crash = self._crashes.report
        if crash is not None and crash.get("number") == message.number:
            self._crashes.delete_report()

    def turn(self) -> None:
        now = self._clock()
        if self._next_at is None or now < self._next_at:
            return
        self._next_at = now + _RESEND_INTERVAL_S
        body = self._crashes.report
        if body is None:
            return
        try:
            message = CrashReport.from_dict({"device": self._connection.device, **body})
        except (ProtocolError, TypeError):
            self._crashes.delete_report()  # damaged
            return
        try:
            self._connection.send(message)
        except FedpruneError:
            return  # not logged, because the next turn after the pause sends it again
