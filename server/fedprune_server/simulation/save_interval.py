"""How often a simulation is saved: often enough to lose little, seldom enough to cost little."""

from __future__ import annotations

import time
from collections.abc import Callable

_WITHIN_S = 5.0
"""Within a round the state is saved when so many seconds have passed since the last time."""

_SHARE = 20.0
"""Saving takes at most one part of so many of the time, except in rounds that end quickly."""

_DEAR_S = 0.25
"""Where saving takes longer, it passes by ends of rounds, too."""


class Rhythm:
    """Says when saving is due, and watches what it takes."""

    def __init__(self) -> None:
        self._saved_at, self._takes = time.monotonic(), 0.0

    def due(self, *, ended: bool) -> bool:
        """Whether it is time to save.

        Args:
            ended: Whether a round has just ended.
        """
        since = time.monotonic() - self._saved_at
        if ended:
            return self._takes <= _DEAR_S or since >= _SHARE * self._takes
        return since >= max(_WITHIN_S, _SHARE * self._takes)

    def save(self, action: Callable[[], None]) -> None:
        """Save."""
        began = time.monotonic()
        action()
        self._saved_at = time.monotonic()
        self._takes = self._saved_at - began
