"""Saves a job's events and state, once in each turn of the loop, and deletes the blobs that it no longer needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.coordination import events as on
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.engine.command_dispatcher import CommandDispatcher
from fedprune_server.executor.retention import BlobCollector
from fedprune_server.storage.storage import MAX_PARTS_IN_MEMORY, Storage


class Journal:
    """Saves a job's events and state, with the traffic of the devices in the registry. The dispatcher knows which
    updates are being received, so that their partial blobs aren't deleted."""

    def __init__(
        self,
        state: State,
        storage: Storage,
        collector: BlobCollector,
        registry: DeviceRegistry,
        dispatcher: CommandDispatcher,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._storage, self._collector, self._registry = state, storage, collector, registry
        self._dispatcher, self._monotonic = dispatcher, monotonic
        self._saved_position = (state.round, state.phase)
        self._summaries_taken = len(state.history)

    def note_event(self, event: on.Event) -> None:
        """Note the blobs of an event that the coordinator has handled, before the event is saved."""
        if isinstance(event, on.Extracted):
            self._collector.note_offer(event.offer, self._state.round)
        if isinstance(event, on.UpdateStored):
            # An update may come too late to be used: then nothing else would lead to its deletion.
            self._collector.mark([event.weights])

    def save(self, events: Sequence[on.Event], now: float) -> float | None:
        """Save events, the state after them, and traffic; `now` is in seconds since 1970. Returns the seconds that it
        took; None if there was nothing to save. Raises `StorageError` if the disk fails or is full."""
        state = self._state
        is_new_phase = state.phase is not self._saved_position[1]
        self._collector.mark(self._dispatcher.drop_unawaited_uploads(all_devices=is_new_phase))
        self._collector.note_state(state)
        # Saved before its commands are carried out: after a crash at any point the saved state orders again what was
        # not done.
        started_at, seconds = self._monotonic(), None
        if self._storage.save(state, events, now, self._registry.unsaved_traffic):
            self._registry.unsaved_traffic.clear()
            seconds = self._monotonic() - started_at
        self._storage.put_unplanned_devices(self._registry.unplanned_devices)
        previous_round, self._saved_position = self._saved_position[0], (state.round, state.phase)
        if state.round != previous_round or (is_new_phase and state.phase is Phase.FINISHED):
            # No offer is being made: coordinators order them while a round collects, the executor answers in order, so
            # all are here before the round's end is; and those of the next round are ordered after this.
            self._collector.collect(state, self._dispatcher.arriving_digests())
        return seconds

    def save_unplanned_devices(self) -> None:
        """Save which devices can't take part, and why. Raises `StorageError` if the disk fails or is full."""
        self._storage.put_unplanned_devices(self._registry.unplanned_devices)

    def take_finished_rounds(self) -> Iterator[dict[str, Any]]:
        """Summaries of the rounds that have ended since the last call. Afterwards memory holds only the summaries of
        old rounds, without their devices."""
        history = self._state.history
        summaries, self._summaries_taken = history[self._summaries_taken :], len(history)
        yield from summaries
        if summaries:
            self._state.drop_old_summaries(MAX_PARTS_IN_MEMORY)
