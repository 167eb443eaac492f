"""How updates come from a job's devices: the channel that is chosen once, when the job begins to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.wire.messages import Cancelled, SecureStep, Trained, Update
from fedprune_server.engine.command_dispatcher import DeviceTraffic


class UpdateChannel:
    """Updates as devices announce them: whole, or noised by the board. The coordinator orders each to be pulled.

    A channel of another kind overrides what it does in another way. It answers devices itself; what concerns the
    coordinator becomes an event.
    """

    holds_devices = False
    """Whether a device whose part is settled is needed until its round closes."""

    def __init__(self, traffic: DeviceTraffic) -> None:
        self._job, self._state, self._traffic = traffic.job, traffic.state, traffic

    @property
    def computing(self) -> bool:
        """Whether work goes on beside the loop."""
        return False

    def awaits(self, device: str) -> bool:
        """Whether an upload of a device is awaited though no part of the round waits for it."""
        return False

    def announce(self, device: str, message: Trained | Update, metrics: Mapping[str, float]) -> on.Event | None:
        """A device has trained, and announces its update or offers to mask it."""
        if isinstance(message, Trained):
            self._cancel(device, message, "this job takes updates as they are")
            return None
        uploads = self._traffic.uploads
        if uploads.fetching(device, message.round, message.attempt, message.weights):
            self._traffic.outbox.ask(uploads.heard(device, self._traffic.monotonic()))
            return None  # a repetition by a board that waits its turn, as most announcements of a large fleet are
        return announcement(device, message, metrics, message.weights.to_dict())

    def receive(self, device: str, message: SecureStep) -> None:
        """Take in a device's answer to a step of a protocol between boards."""

    def refuse(self, device: str, round_: int, attempt: int, reason: str) -> None:
        """A device refuses its part."""

    def takes(self, event: on.Event) -> bool:
        """Take in an upload that has ended, if it is none that the coordinator has ordered."""
        return False

    def begin(self, command: do.SumMasked) -> None:
        """Begin to sum updates that devices hold."""

    def contributions(self, now: float) -> on.Event | None:
        """The event that such sums are ready, once they are."""
        return None

    def close(self) -> None:
        """Stop what goes on beside the loop."""

    def _cancel(self, device: str, message: Trained | Update, reason: str) -> None:
        cancelled = Cancelled(message.job, message.round, message.attempt, reason)
        self._traffic.outbox.send(device, cancelled, message.job)


def announcement(
    device: str, message: Trained | Update, metrics: Mapping[str, float], weights: dict[str, Any]
) -> on.UpdateAnnounced:
    part = message.round, message.attempt, message.base
    return on.UpdateAnnounced(device, *part, weights, message.samples, message.steps, dict(metrics))
