"""Notices floods of requests to join: anybody who reaches the broker may send such requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fedprune.core.text import one_line

log = logging.getLogger("fedprune.server")

# Seconds for which requests to join count as flooded after some were dropped.
JOIN_FLOOD_S = 60.0


class JoinFlood:
    """The latest flood of requests to join, for warnings and alerts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._flooding_client: tuple[str, float] | None = None
        self._flooded_at = -JOIN_FLOOD_S

    def note(self, client: str) -> None:
        """Note that requests to join fill their inbox, so that its connection is closed for a while. `client` is the
        MQTT client id of the flooding client; empty if many clients send a few requests each. Only the latest client is
        stored: a stranger can choose any number of ids."""
        now = self._clock()
        is_logged, self._flooded_at = now < self._flooded_at + JOIN_FLOOD_S, now
        if not client:
            if not is_logged:
                log.warning(
                    "more boards ask to join than this server answers at a time: some wait longer, and ask again. If "
                    "you don't expect them, close the listener for joining"
                )
            return
        client = one_line(client, 64)
        if not self.flooding_client():
            log.warning(
                "the MQTT client %s floods the topic for joining: requests to join are dropped, those of %s first. "
                "The broker's log has its address; close the listener for joining while no board is to join",
                client, client,
            )  # fmt: skip
        self._flooding_client = client, now + JOIN_FLOOD_S

    def flooding_client(self) -> str | None:
        """The MQTT client id that flooded the requests to join; empty if many clients did together, None if none."""
        now = self._clock()
        if self._flooding_client is not None and self._flooding_client[1] > now:
            return self._flooding_client[0]
        return "" if now < self._flooded_at + JOIN_FLOOD_S else None
