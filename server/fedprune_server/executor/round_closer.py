"""Closes a round with the stored update of each device. (With secure aggregation `masked_sums` does it, with sums.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination.round import Round, RoundOutcome
from fedprune.model.selection import Selection
from fedprune_server.executor.stored_updates import StoredUpdates


class RoundCloser:
    """Closes rounds with the updates of single devices. `round_of` returns the open round that a command names."""

    def __init__(self, updates: StoredUpdates, round_of: Callable[[do.Close | do.Basis], Round]) -> None:
        self._updates, self._round_of = updates, round_of

    def offer_fields(self, basis: do.Basis, device_part: do.DevicePart, selection: Selection) -> dict[str, Any]:
        """Further fields of an offer: none here. With secure aggregation they describe the vector to mask."""
        return {}

    def close(self, command: do.Close) -> RoundOutcome:
        updates = [self._updates.round_update(c) for c in command.contributions]
        return self._round_of(command).close(updates, command.rate, command.participants)
