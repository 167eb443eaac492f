"""Tells the service manager that the agent is ready and alive; keeps a release on trial once it is healthy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fedprune.core.errors import StorageError
from fedprune_device.launcher.sd_notify import READY, STOPPING, WATCHDOG, notify, status_line, watchdog_seconds
from fedprune_device.releases.release_trial import ReleaseTrial

_LOG = logging.getLogger("fedprune.device")

_MAX_WATCHDOG_S = 10.0  # a beat comes every quarter of this at the latest, even if no manager watches


class Watchdog:
    """Tells the service manager that the agent's loop turns; the manager restarts a service whose loop hangs.

    A release on trial counts as healthy one turn after the broker was reached. `interval` is the manager's watchdog in
    seconds, 0 for none; None reads the environment.
    """

    def __init__(
        self,
        trial: ReleaseTrial | None = None,
        *,
        tell: Callable[[str], object] = notify,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trial = trial
        self._tell = tell
        # A quarter of the manager's time, so that one slow turn doesn't restart the service.
        watchdog_s = watchdog_seconds() if interval is None else interval
        self._interval_s = min(_MAX_WATCHDOG_S, watchdog_s or _MAX_WATCHDOG_S) / 4
        self._clock = clock
        self._next_beat = 0.0
        self._ready = False
        self._connected = False

    def turn(self) -> None:
        if not self._ready:
            self._ready = True
            self._tell(READY)
        now = self._clock()
        if now >= self._next_beat:
            self._next_beat = now + self._interval_s
            self._tell(WATCHDOG)
        if self._connected and self._trial is not None:
            self._commit(self._trial)

    def on_connect(self) -> None:
        self._connected = True
        self._tell(status_line("connected to the broker"))

    def on_disconnect(self, reason: str) -> None:
        self._connected = False
        self._tell(status_line(f"waiting for the broker: {reason}"))

    def stop(self) -> None:
        self._tell(STOPPING)

    def _commit(self, trial: ReleaseTrial) -> None:
        try:
            trial.commit()
            self._trial = None
        except StorageError as error:  # the next turn tries again; at its deadline the launcher gives up
            _LOG.warning("release %d can't be kept yet: %s", trial.number, error)
