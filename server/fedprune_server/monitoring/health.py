"""Reports a server's health, as its loop turns, to systemd's watchdog and to probes of a container.

It sends systemd `READY=1` at the first turn, `WATCHDOG=1` from then on, `STOPPING=1` at the end (sd_notify(3)). Where
`FEDPRUNE_PULSE` names a file, it is written as well, with whether the server runs or stands by.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune.core.errors import StorageError
from fedprune_device.launcher import sd_notify

if TYPE_CHECKING:
    from fedprune_server.observation.observer import TurnEvent
    from fedprune_server.observation.snapshot import JobSnapshot

log = logging.getLogger("fedprune.server")

# The environment variable with the file whose age shows whether the server lives. A variable, because a container's
# probe is another process with the same environment.
HEALTH_FILE_VARIABLE = "FEDPRUNE_PULSE"

RUNNING, STANDING_BY = "running", "standing by"

# Probes call a server dead after minutes, and a flash card shouldn't be written to more often than that needs.
_BEAT_INTERVAL_S = 5.0

_MAX_AGE_S = 120.0


class Pulse:
    """Reports to systemd and to probes that the server's loop turns, or waits for its database."""

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        notify_systemd: Callable[[str], object] = sd_notify.notify,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        name = environment.get(HEALTH_FILE_VARIABLE, "")
        self._file = Path(name) if name else None
        self._notify_systemd, self._clock = notify_systemd, clock
        # systemd kills at WATCHDOG_USEC and advises half of it; a quarter leaves room for one slow turn.
        self._interval_s = min(_BEAT_INTERVAL_S, (sd_notify.watchdog_seconds(environment) or 4e9) / 4)
        self._next_beat_at = 0.0
        self._last_state = ""

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        # Here, since a probe imports this module every few seconds only to read the file.
        from fedprune_server.observation.observer import ServerEnding

        if not any(isinstance(event.payload, ServerEnding) for event in events):
            self._beat(RUNNING)
            return
        self._notify_systemd(sd_notify.STOPPING)
        if self._file is not None:
            with suppress(OSError):  # a probe must not take an old file for a server that lives
                self._file.unlink()

    def standing_by(self) -> AbstractContextManager[None]:
        """Report health while the body waits for another server's end, without a loop."""
        return sd_notify.repeat_call(lambda: self._beat(STANDING_BY), self._interval_s, "pulse")

    def _beat(self, state: str) -> None:
        now = self._clock()
        if state == self._last_state and now < self._next_beat_at:
            return
        self._next_beat_at = now + self._interval_s
        if state != self._last_state:
            self._last_state = state
            self._notify_systemd(f"{sd_notify.READY}\n{sd_notify.status_line(state)}")
        self._notify_systemd(sd_notify.WATCHDOG)
        if self._file is not None:
            try:
                self._file.write_text(f"{state}\n")
            except OSError as error:
                log.warning("can't write %s, which tells that this server lives: %s", self._file, error.strerror)


def check_pulse(path: Path, *, running: bool = False) -> str:
    """Check a server's health file, which must not be older than `_MAX_AGE_S`; returns `RUNNING` or `STANDING_BY`.

    Raises `StorageError` if there is no server or it hangs, and with `running` also if it only stands by.
    """
    try:
        age = time.time() - path.stat().st_mtime
        state = path.read_text(errors="replace")[:100].strip()
    except OSError as error:
        raise StorageError(
            f"no server reports that it lives: {path}: {error.strerror}",
            hint=f"{HEALTH_FILE_VARIABLE} must name that file there.",
        ) from error
    if age > _MAX_AGE_S:
        raise StorageError(f"the server's loop hasn't turned for {age:.0f} s", expected=f"at most {_MAX_AGE_S:g} s")
    if state not in (RUNNING, STANDING_BY):
        raise StorageError(f"{path} is not what a server writes", got=repr(state))
    if running and state != RUNNING:
        raise StorageError("this server stands by", expected="one that runs")
    return state
