"""The channel through which the updates of a job's devices come. It is chosen once, when the job begins to run.

There are two: this one of unmasked updates, and `MaskedChannel` (`engine.secure_sums`) for secure aggregation. The
job's runner passes each message of a device about its update to the channel, and the events that the channel returns to
the coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.wire.messages import Cancelled, SecureStep, TrainingDone, UpdateAnnouncement
from fedprune_server.engine.command_dispatcher import DeviceTraffic


class UpdateChannel:
    """The channel of unmasked updates: devices announce them, and the coordinator orders each to be pulled.

    Methods that do nothing here are steps of secure aggregation.
    """

    # Whether a device whose update was counted or refused is still needed until its round closes.
    holds_devices = False

    def __init__(self, traffic: DeviceTraffic) -> None:
        self._job, self._state, self._traffic = traffic.job, traffic.state, traffic

    @property
    def is_computing(self) -> bool:
        """Whether this channel computes on another thread."""
        return False

    def awaits_upload(self, device: str) -> bool:
        """Whether the channel itself awaits an upload of a device, though the coordinator has ordered none."""
        return False

    def on_announcement(
        self, device: str, message: TrainingDone | UpdateAnnouncement, metrics: Mapping[str, float]
    ) -> on.Event | None:
        """Handle the message of a device that has trained: it announces its update, or offers to mask it."""
        if isinstance(message, TrainingDone):
            self._cancel(device, message, "this job takes updates as they are")
            return None
        uploads = self._traffic.uploads
        if uploads.is_fetching(device, message.round, message.attempt, message.weights):
            self._traffic.outbox.send_requests(uploads.on_announcement(device, self._traffic.monotonic()))
            # Most announcements of a large fleet are repetitions by boards that wait for their turn. They make no
            # event, which would be saved.
            return None
        return announcement(device, message, metrics, message.weights.to_dict())

    def on_secure_step(self, device: str, message: SecureStep) -> None:
        """Handle a device's answer to a step of secure aggregation."""

    def on_refusal(self, device: str, round_: int, attempt: int, reason: str) -> None:
        """Note that a device refuses its part in a round."""

    def take_upload(self, event: on.Event) -> bool:
        """Handle the end of an upload that the channel itself awaits; returns False for one of the coordinator's."""
        return False

    def begin_sums(self, command: do.SumMasked) -> None:
        """Begin the secure sum of updates that devices have."""

    def take_sums(self, now: float) -> on.Event | None:
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
    """The event of a device's message that it has trained; `weights` is empty if the update will be masked."""
    part_fields = message.round, message.attempt, message.base
    return on.UpdateAnnounced(device, *part_fields, weights, message.samples, message.steps, dict(metrics))
