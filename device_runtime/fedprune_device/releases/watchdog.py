"""The service's watchdog: fed where the agent's loop turns, and nowhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fedprune.core.errors import StorageError
from fedprune_device.launcher.sd_notify import READY, STOPPING, WATCHDOG, notify, status, watchdog_seconds
from fedprune_device.releases.release_trial import ReleaseTrial

_LOG = logging.getLogger("fedprune.device")

_SLOWEST_S = 10.0
"""Between two beats; the service manager may want them more often."""


class Watchdog:
    """Reports to the service manager, which restarts a loop that hangs, that the agent's loop turns.

    A release on trial is healthy a turn after the broker was reached. `interval` is the manager's watchdog in seconds,
    0 for none; None reads the environment.
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
        self._between = min(_SLOWEST_S, (watchdog_seconds() if interval is None else interval or 0.0) or 4e9) / 4
        self._clock = clock
        self._next = 0.0
        self._ready = False
        self._connected = False

    def turn(self) -> None:
        if not self._ready:
            self._ready = True
            self._tell(READY)
        now = self._clock()
        if now >= self._next:
            self._next = now + self._between
            self._tell(WATCHDOG)
        if self._connected and self._trial is not None:
            self._commit(self._trial)

    def connected(self) -> None:
        self._connected = True
        self._tell(status("connected to the broker"))

    def lost(self, reason: str) -> None:
        self._connected = False
        self._tell(status(f"waiting for the broker: {reason}"))

    def stop(self) -> None:
        self._tell(STOPPING)

    def _commit(self, trial: ReleaseTrial) -> None:
        try:
            trial.commit()
            self._trial = None
        except StorageError as error:  # the next turn tries again; at its deadline the launcher gives up
            _LOG.warning("release %d can't be kept yet: %s", trial.number, error)
