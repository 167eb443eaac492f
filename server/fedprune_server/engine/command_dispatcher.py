"""Carries out a coordinator's commands about devices: sends messages to them, and fetches their updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune.wire.messages import Accepted, Cancelled, Finished, Offer
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.executor.offer_entries import device_offer, update_misfit
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.transfer.upload_place import ArrivedUpdate
from fedprune_server.transfer.uploads import Uploads

log = logging.getLogger("fedprune.server")

# Seconds without a sign of the device after which its offer is repeated: the broker acknowledges a message before the
# device has it, so an acknowledged offer may still be lost.
_OFFER_REPEAT_S = 25.0


@dataclass(frozen=True)
class DeviceTraffic:
    """The parts through which a job exchanges messages and updates with its devices. The coordinator's `state` is read
    here, never changed."""

    job: Job
    state: State
    registry: DeviceRegistry
    uploads: Uploads
    outbox: Outbox
    monotonic: Callable[[], float] = time.monotonic


class CommandDispatcher:
    """Carries out a coordinator's commands about devices. Immediate results are returned as events.

    `awaits_upload` says whether the job's channel awaits an upload of a device that no part of the round waits for.
    Boards find blobs over HTTP under the URL `blobs_at`, if there is one. `revoked` are devices that are no longer
    members and have not announced themselves since."""

    def __init__(
        self, traffic: DeviceTraffic, awaits_upload: Callable[[str], bool], blobs_at: str | None = None
    ) -> None:
        self._job, self._state, self._registry = traffic.job, traffic.state, traffic.registry
        self._uploads, self._outbox, self._monotonic = traffic.uploads, traffic.outbox, traffic.monotonic
        self._awaits_upload, self._blobs_at = awaits_upload, blobs_at
        self._changed_tasks = traffic.state.tasks.watch()
        self.revoked: set[str] = set()

    def run(self, command: do.DeviceCommand) -> list[on.Event]:
        """Carry out a command. Raises `StorageError` if the disk fails."""
        job, device = self._job.name, command.device
        match command:
            case do.SendOffer():
                return self.offer(command)
            case do.PullUpdate():
                return self._pull(command)
            case do.Acknowledge():
                self._outbox.send(device, Accepted(job, command.round, command.attempt, command.weights), job)
            case do.Cancel():
                prefix = self._registry.prefix
                log.debug("%sdevice %s: round %d is void: %s", prefix, device, command.round, command.reason)
                self._registry.transfers.forget(device)
                self._outbox.send(device, Cancelled(job, command.round, command.attempt, command.reason), job)
            case do.TellFinished():
                self._outbox.send(device, Finished(job), job)
        return []

    def offer(self, command: do.SendOffer) -> list[on.Event]:
        """Offer a device its part of the round. Its time counts once the offer is really sent (`Outbox.deliver`)."""
        job = self._job.name
        if command.device in self.revoked:  # revoked while the executor was making its offer
            return [
                on.OfferRefused(command.device, command.round, command.attempt, "it was revoked", FailureKind.REVOKED)
            ]
        try:
            round_fields = {"job": job, "round": command.round, "attempt": command.attempt, "blobs_at": self._blobs_at}
            self._outbox.send(command.device, Offer.from_dict(device_offer(command.offer) | round_fields), job)
        except ProtocolError as error:  # the offer is longer than a message may be, so the device can't take part
            return [on.OfferRefused(command.device, command.round, command.attempt, one_line(str(error)))]
        return []

    def repeat_offers(self) -> list[on.Event]:
        """Repeat the offers to devices that have shown no sign of them."""
        events: list[on.Event] = []
        for device in self._registry.take_silent(_OFFER_REPEAT_S):
            task = self._state.tasks[device]
            if task.offer is not None:
                events += self.offer(do.SendOffer(device, self._state.round_of(task), task.attempt, task.offer))
        return events

    def drop_unawaited_uploads(self, *, all_devices: bool) -> list[str]:
        """Stop receiving updates that no part of a round awaits any more; returns the digests of the dropped updates.
        Unless `all_devices`, only updates of parts that have changed since the last call are checked."""
        state, dropped = self._state, list[str]()
        for device in self._uploads.devices() if all_devices else self._changed_tasks:
            if self._awaits_upload(device):
                continue
            task = state.tasks.get(device)
            if task is None or task.progress is not Progress.PULLING or not state.awaits(task):
                dropped += self._uploads.drop(device)
            else:
                dropped += self._uploads.keep(device, state.round_of(task), task.attempt)
        self._changed_tasks.clear()
        return dropped

    def arriving_digests(self) -> set[str]:
        """Digests of updates that are being received, or copied into the bucket."""
        return self._uploads.digests()

    def collect_uploads(self) -> list[on.Event]:
        """Events of updates that have arrived or failed."""
        events: list[on.Event] = []
        for outcome in self._uploads.take_outcomes():
            device, round_, attempt = outcome.device, outcome.round, outcome.attempt
            if isinstance(outcome, ArrivedUpdate):
                self._registry.note_delivery(device, self._monotonic())
                events.append(on.UpdateStored(device, round_, attempt, outcome.weights))
            else:
                events.append(on.UpdateRejected(device, round_, attempt, outcome.reason, outcome.failure))
        return events

    def _pull(self, command: do.PullUpdate) -> list[on.Event]:
        """Fetch an announced update, unless its size can't be right; returns the events of updates that have ended."""
        task = self._state.task_at(command.device, command.round, command.attempt)
        if task is None:
            return []  # the round has gone on meanwhile, which is no fault of the device
        ref = BlobRef.from_dict(command.weights)
        if reason := update_misfit(task.offer, ref):
            part_key = command.device, command.round, command.attempt
            return [on.UpdateRejected(*part_key, reason, FailureKind.MALFORMED)]
        requests = self._uploads.add(command.device, command.round, command.attempt, ref, self._monotonic())
        self._outbox.send_requests(requests)
        return self.collect_uploads()
