"""The channel through which updates come from a job's devices; it is chosen once, when the job begins to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.wire.messages import Cancelled, SecureStep, TrainingDone, UpdateAnnouncement
from fedprune_server.engine.command_dispatcher import DeviceTraffic


class UpdateChannel:
    """The channel of unmasked updates: devices announce them, and the coordinator orders each to be pulled.

    Channels of another kind override the methods in which they differ. A channel answers devices itself, and returns
    events for the coordinator.
    """

    # Whether a device whose part is settled is still needed until its round closes.
    holds_devices = False

    def __init__(self, traffic: DeviceTraffic) -> None:
        self._job, self._state, self._traffic = traffic.job, traffic.state, traffic

    @property
    def computing(self) -> bool:
        """Whether this channel computes on another thread."""
        return False

    def awaits_upload(self, device: str) -> bool:
        """Whether the channel itself awaits an upload of a device, though the coordinator has ordered none."""
        return False

    def announce(
        self, device: str, message: TrainingDone | UpdateAnnouncement, metrics: Mapping[str, float]
    ) -> on.Event | None:
        """Handle the message of a device that has trained: it announces its update, or offers to mask it."""
        if isinstance(message, TrainingDone):
            self._cancel(device, message, "this job takes updates as they are")
            return None
        uploads = self._traffic.uploads
        if uploads.is_fetching(device, message.round, message.attempt, message.weights):
            self._traffic.outbox.send_requests(uploads.on_announcement(device, self._traffic.monotonic()))
            # A repetition by a board that waits for its turn, as most announcements of a large fleet are. It makes no
            # event, which would be saved.
            return None
        return announcement(device, message, metrics, message.weights.to_dict())

    def receive(self, device: str, message: SecureStep) -> None:
        """Handle a device's answer to a step of secure aggregation."""

    def refuse(self, device: str, round_: int, attempt: int, reason: str) -> None:
        """Note that a device refuses its part."""

    def take_upload(self, event: on.Event) -> bool:
        """Handle the end of an upload that the channel itself awaits; returns False for one of the coordinator's."""
        return False

    def begin_sums(self, command: do.SumMasked) -> None:
        """Begin to sum updates that devices hold, without receiving any single one."""

    def contributions(self, now: float) -> on.Event | None:
        """The event with the sums that `begin_sums` began, or None if they aren't ready."""
        return None

    def close(self) -> None:
        """Stop computing on another thread."""

    def _cancel(self, device: str, message: TrainingDone | UpdateAnnouncement, reason: str) -> None:
        cancelled = Cancelled(message.job, message.round, message.attempt, reason)
        self._traffic.outbox.send(device, cancelled, message.job)


def announcement(
    device: str, message: TrainingDone | UpdateAnnouncement, metrics: Mapping[str, float], weights: dict[str, Any]
) -> on.UpdateAnnounced:
    part_fields = message.round, message.attempt, message.base
    return on.UpdateAnnounced(device, *part_fields, weights, message.samples, message.steps, dict(metrics))
