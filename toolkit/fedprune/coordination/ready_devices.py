"""The devices that a round may ask, updated by changes, so that a round begins without a look at all of them.

Names are sorted once; who is ready is an array in their order: numpy goes through a million in milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedprune.jobs.state import JobDevice, State

Integers = npt.NDArray[np.int64]


class ReadyDevices:
    """The devices that are ready. A device's *place* is its index among all names, until others join.

    It reads the state, and never changes it. `may_be_offered` tells by a device's entry in the state whether the device
    may be offered anything at all.
    """

    def __init__(self, state: State, may_be_offered: Callable[[str], bool]) -> None:
        self._state = state
        self._may_be_offered = may_be_offered
        self._changed = state.devices.watch()
        self._names: list[str] = []
        self._ready = np.zeros(0, bool)
        self._silent_devices = set[str]()

    def silent_devices(self) -> list[str]:
        """Names of devices that were silent, and are asked again at a time, sorted."""
        self._refresh()
        return sorted(self._silent_devices)

    def places(self) -> Integers:
        """Places of the devices that are ready, rising."""
        self._refresh()
        return np.flatnonzero(self._ready)

    def names(self, places: Integers) -> list[str]:
        return [self._names[place] for place in places.tolist()]

    def _refresh(self) -> None:
        devices, changed = self._state.devices, self._changed
        # One sort beats many insertions, each of which copies the array; few changes are inserted one by one.
        if 2 * len(changed) > len(self._names):
            self._names = sorted(devices)
            self._ready = np.zeros(len(devices), bool)
            changed = set(devices)
        elif new_names := sorted(n for n in changed if n in devices and self._place(n) is None):
            self._ready = np.insert(self._ready, [bisect_left(self._names, n) for n in new_names], False)
            self._names = sorted([*self._names, *new_names])
        for name in changed:
            if (place := self._place(name)) is not None:
                self._update_place(place, devices.get(name))
        self._changed.clear()

    def _update_place(self, place: int, device: JobDevice | None) -> None:
        name = self._names[place]
        is_silent = device is not None and device.asked_again_at is not None
        (self._silent_devices.add if is_silent else self._silent_devices.discard)(name)
        can_start = device is not None and device.online and not device.excluded and device.silent_since is None
        self._ready[place] = can_start and self._may_be_offered(name)

    def _place(self, name: str) -> int | None:
        place = bisect_left(self._names, name)
        return place if place < len(self._names) and self._names[place] == name else None
