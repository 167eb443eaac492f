"""The heartbeat of a service: it beats where the agent's loop turns, and nowhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from fedprune.core.errors import StorageError
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune_device.launcher.sd_notify import READY, STOPPING, WATCHDOG, notify, status, watchdog_seconds
from fedprune_device.network.uplink import Wire
from fedprune_device.releases.release_trial import ReleaseTrial

_LOG = logging.getLogger("fedprune.device")

_SLOWEST_S = 10.0
"""Between two beats; the service manager may want them more often."""


class Watchdog:
    """The agent's connection, through which its loop is heard: the loop asks for a message in every turn.

    A loop that hangs asks no more, and the service manager restarts it. A turn after the broker was reached, a
    release on trial is healthy.

    Args:
        link: The connection.
        trial: The trial that is under way, if one is.
        tell: Tells the service manager.
        interval: The manager's watchdog, in seconds, 0 for none; None asks the environment.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        link: Wire,
        trial: ReleaseTrial | None = None,
        *,
        tell: Callable[[str], object] = notify,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._trial = trial
        self._tell = tell
        self._between = min(_SLOWEST_S, (watchdog_seconds() if interval is None else interval or 0.0) or 4e9) / 4
        self._clock = clock
        self._next = 0.0
        self._ready = False
        self._connected = False

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        return self._link.unsent

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | ConnectionUp | ConnectionDown | None:
        """The next message or event of the link; a turn of the loop begins here."""
        if not self._ready:
            self._ready = True
            self._tell(READY)
        now = self._clock()
        if now >= self._next:
            self._next = now + self._between
            self._tell(WATCHDOG)
        if self._connected and self._trial is not None:
            self._commit(self._trial)
        item = self._link.get(timeout)
        if isinstance(item, ConnectionUp):
            self._connected = True
            self._tell(status("connected to the broker"))
        elif isinstance(item, ConnectionDown):
            self._connected = False
            self._tell(status(f"waiting for the broker: {item.reason}"))
        return item

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting; False if that isn't possible now."""
        return self._link.publish(topic, payload, qos)

    def listen(self, topics: Collection[str]) -> None:
        """Listen to exactly these shared topics."""
        self._link.listen(topics)

    def stop(self) -> None:
        """The service ends."""
        self._tell(STOPPING)

    def _commit(self, trial: ReleaseTrial) -> None:
        try:
            trial.commit()
            self._trial = None
        except StorageError as error:  # the next turn tries again; at its deadline the launcher gives up
            _LOG.warning("release %d can't be kept yet: %s", trial.number, error)
