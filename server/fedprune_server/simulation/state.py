"""The state of a simulation besides the coordinator's: the queue of events, connections, and costs so far.

`saved_run` writes it to a folder.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from fedprune.coordination import events as on
from fedprune.core.text import all_strings
from fedprune_server.monitoring.round_rows import RoundNotes

# Positions in a device's costs (`RoundNotes.spent`): bytes, and multiply-accumulates and energy of its training.
DOWN, UP, MACS, ACTIVE_MACS, ENERGY = range(5)


@dataclass(frozen=True)
class TrainingEnd:
    """The end of a virtual device's training; the numbers are computed when it is taken from the queue."""

    device: str
    round: int
    attempt: int
    offer: dict[str, Any]


@dataclass(frozen=True)
class WindowEnd:
    """The end of a device's window of time, valid for one connection."""

    device: str
    session: int


Item = on.Event | TrainingEnd | WindowEnd

_WORK_TYPES = (TrainingEnd, on.UpdateAnnounced, on.UpdateStored)  # items that belong to a device's part in a round


@dataclass
class SimulationState:
    """The state of a run apart from the coordinator's.

    Attributes:
        clock: Virtual seconds since the start.
        sequence: Number of the last queued item; it orders items of the same time.
        queue: Queued items with their times, by number.
        sessions: Number of each device's latest connection.
        online: Devices that are connected.
        leaves: End of each device's window of time.
        held: Digests of the blobs that each device holds.
        tables: Digest of the leaf table of the weights that each device was sent last.
        unsent: Announced updates that the server doesn't have yet, by device.
        sizes: Bytes of the update last requested from each device.
        bounds: Maximum bytes of that update in the offered codec.
        boards: Digest of each board's state between rounds.
        free: Times at which the server's link is free: `DOWN` for sending to devices, `UP` for receiving.
        cached: When the cache between server and devices had each of the present round's files (`server_cache`).
        now: Notes of the current round.
        rounds: Notes of finished rounds, by number.
        refusal: Reason of the last refused offer.
    """

    clock: float = 0.0
    sequence: int = 0
    queue: dict[int, tuple[float, Item]] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)
    leaves: dict[str, float] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    unsent: dict[str, on.UpdateAnnounced] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    boards: dict[str, str] = field(default_factory=dict)
    free: list[float] = field(default_factory=lambda: [0.0, 0.0])
    cached: dict[str, float] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    macs: int = 0
    now: RoundNotes = field(default_factory=RoundNotes)
    rounds: dict[int, RoundNotes] = field(default_factory=dict)
    refusal: str = ""
    _order: list[tuple[float, int]] = field(default_factory=list)
    _work: dict[str, set[int]] = field(default_factory=dict)

    def push(self, virtual_time: float, item: Item) -> None:
        self.sequence += 1
        self.push_numbered(virtual_time, self.sequence, item)

    def push_numbered(self, virtual_time: float, number: int, item: Item) -> None:
        """Queue an item under a given number, such as that of a saved one."""
        self.queue[number] = (virtual_time, item)
        # Ties in time go by number, so that a run is the same after a restart.
        heapq.heappush(self._order, (virtual_time, number))
        if isinstance(item, _WORK_TYPES):
            self._work.setdefault(item.device, set()).add(number)

    @property
    def next_item(self) -> Item:
        """The item that `pop` returns next. Raises `IndexError` if the queue is empty."""
        # Cancelled items stay in the heap: removing one from its middle would cost a search.
        while self._order[0][1] not in self.queue:
            heapq.heappop(self._order)
        return self.queue[self._order[0][1]][1]

    def pop(self) -> Item:
        """Advance to the next item and return it. Raises `IndexError` if the queue is empty."""
        item = self.next_item
        virtual_time, number = heapq.heappop(self._order)
        del self.queue[number]
        self.clock = virtual_time
        if isinstance(item, _WORK_TYPES):
            self._drop_number(item.device, number)
        return item

    def _drop_number(self, device: str, number: int) -> None:
        numbers = self._work[device]
        numbers.discard(number)
        if not numbers:
            del self._work[device]

    def drop_work(self, device: str, number: int | None = None) -> None:
        """Remove a device's work from the queue, for one round or for all."""
        for key in sorted(self._work.get(device, ())):
            item = self.queue[key][1]
            if isinstance(item, _WORK_TYPES) and number in (None, item.round):
                del self.queue[key]
                self._drop_number(device, key)

    def device_costs(self, device: str) -> list[int]:
        """The device's costs in the current round, to be added to: at `DOWN`, `UP`, `MACS`, …"""
        return self.now.spent.setdefault(device, [0, 0, 0, 0, 0])

    def trainings(self) -> list[TrainingEnd]:
        return [item for _, item in self.queue.values() if isinstance(item, TrainingEnd)]

    def finish_round(self, number: int) -> None:
        self.now.down, self.now.up = self.down, self.up
        self.rounds[number] = self.now
        self.now, self.cached = RoundNotes(), {}

    def references(self) -> set[str]:
        """All strings of queued items, any of which may be the digest of a blob."""
        strings: set[str] = {*self.boards.values(), *self.tables.values()}
        for _, item in self.queue.values():
            if not isinstance(item, (on.DeviceBorn, on.DeviceDied, on.Ticked, WindowEnd)):
                # All strings are taken: one that isn't a digest does no harm, but a missing digest loses its blob.
                strings |= all_strings(vars(item))
        for event in self.unsent.values():
            strings |= all_strings(event.weights)
        return strings
