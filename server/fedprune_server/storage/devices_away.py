"""Keeps plans and probes of absent devices only in the database, so that a large fleet fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedprune.coordination import State
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import EVICTED_ATTRIBUTES

# Number of absent devices that stay in memory, those that left last: most devices that come back do so soon.
MAX_AWAY_IN_MEMORY = 1000


class DevicesAway:
    """Drops fields of saved devices that are needed only when a device comes back (`EVICTED_ATTRIBUTES`) from memory.

    Active devices keep them: a device is active while it is connected, has a part, or was in the latest round. `read`
    returns a device's saved row."""

    def __init__(self, read: Callable[[str], Mapping[str, Any]]) -> None:
        self._read_row = read
        # Absent devices that are complete in memory, the longest absent first.
        self._away_in_memory: dict[str, None] = {}
        self._away_but_active: list[str] = []  # those that stay in memory until the round is over, as they have a part

    def on_saved(self, state: State, changed_names: Iterable[str], *, round_over: bool) -> None:
        """Put away absent devices without a part in this or the latest round, after the state was saved with these
        changed devices. At the end of a round (`round_over`) those of earlier rounds can be put away, too."""
        state.devices.fetch = self._fetch
        if round_over:
            self._away_in_memory = dict.fromkeys([*self._away_but_active, *self._away_in_memory])
            self._away_but_active = []
        for name in changed_names:
            self._away_in_memory.pop(name, None)
            if (device := state.devices.get(name)) is not None and not device.online:
                self._away_in_memory[name] = None
        latest_devices = state.history[-1]["devices"] if state.history else {}
        while len(self._away_in_memory) > MAX_AWAY_IN_MEMORY:
            name = next(iter(self._away_in_memory))
            del self._away_in_memory[name]
            device = state.devices.get(name)
            if name in state.tasks or name in latest_devices:
                self._away_but_active.append(name)
            elif device is not None and not device.online:
                device.evict(EVICTED_ATTRIBUTES)

    def _fetch(self, name: str) -> dict[str, Any]:
        """The dropped fields of a device, from its saved row."""
        row = self._read_row(name)
        self._away_in_memory[name] = None
        return {key: None if row[key] is None else PackedJson(row[key]) for key in EVICTED_ATTRIBUTES}
