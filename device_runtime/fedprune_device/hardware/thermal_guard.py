"""Pauses training while the board is too hot or its voltage too low."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from fedprune.core.errors import ConfigError
from fedprune_device.hardware.readings import UNDER_VOLTAGE, firmware_flags, temperature_c

_LOG = logging.getLogger("fedprune.device")

# Where training waits, and where it continues: a Raspberry Pi slows its clock down from 80 °C on, gradually
# (https://www.raspberrypi.com/documentation/computers/raspberry-pi.html). The gap keeps pauses from alternating.
PAUSE_ABOVE_C, RESUME_BELOW_C = 80.0, 72.0

# Seconds between two readings: heat changes slowly, and steps may take milliseconds.
_READING_INTERVAL_S = 5.0


class ThermalGuard:
    """Pauses training between two steps while the board is too hot or its voltage too low.

    Training waits from `hot_c` °C on until it is below `cool_c`. `pause_reason` is the reason for the current pause,
    empty without one; `paused_seconds` are the seconds in all.
    """

    def __init__(
        self,
        hot_c: float = PAUSE_ABOVE_C,
        cool_c: float = RESUME_BELOW_C,
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not (math.isfinite(hot_c) and math.isfinite(cool_c) and 0 < cool_c < hot_c <= 120):
            raise ConfigError(
                "temperatures that pause training", expected="0 < cool < hot ≤ 120 °C", got=f"{cool_c:g}, {hot_c:g}"
            )
        self._hot, self._cool = hot_c, cool_c
        self._root = root
        self._clock = clock
        self._sleep = sleep
        self._next_reading_at = -math.inf
        self.pause_reason = ""
        self.paused_seconds = 0.0

    def pause(self, stop: Callable[[], bool]) -> bool:
        """Wait while the board needs it, unless `stop` returns True; returns its last value."""
        now = self._clock()
        if now < self._next_reading_at:
            return stop()
        self._next_reading_at = now + _READING_INTERVAL_S
        reason = self._reason_to_wait(self._hot)
        if reason and not stop():
            _LOG.warning("training waits: %s", reason)
            self.pause_reason = reason
            while (reason := self._reason_to_wait(self._cool)) and not stop():
                self._sleep(1.0)
            self.pause_reason = ""
            seconds = self._clock() - now
            self.paused_seconds += seconds
            self._next_reading_at = self._clock() + _READING_INTERVAL_S
            _LOG.info("training continues after %.0f s", seconds)
        return stop()

    def _reason_to_wait(self, limit_c: float) -> str:
        temperature = temperature_c(self._root)
        if temperature is not None and temperature >= limit_c:
            return f"{temperature:.0f} °C, limit {limit_c:g} °C"
        return "the supply's voltage is too low" if firmware_flags(self._root) & UNDER_VOLTAGE else ""
