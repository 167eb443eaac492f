"""Carries out what a coordinator orders about devices: messages to them, and updates to fetch."""

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
from fedprune.jobs.state import Progress as Part
from fedprune.wire.messages import Accepted, Cancelled, Finished, Offer
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.executor.offers import misfit, sent
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.transfer.upload_place import Arrived
from fedprune_server.transfer.uploads import Uploads

log = logging.getLogger("fedprune.server")

_UNHEARD_OFFER_S = 25.0
"""Seconds after which an offer is repeated: the broker's acknowledgement is not the device's."""

DeviceCommand = do.SendOffer | do.PullUpdate | do.Acknowledge | do.Cancel | do.TellFinished


@dataclass(frozen=True)
class DeviceTraffic:
    """The traffic between a job and its devices: messages out, updates in, and the contact of each device.

    Attributes:
        state: The coordinator's; read, never changed.
    """

    job: Job
    state: State
    registry: DeviceRegistry
    uploads: Uploads
    outbox: Outbox
    monotonic: Callable[[], float] = time.monotonic


class CommandDispatcher:
    """Carries out a coordinator's commands that concern a device; what happens at once is returned as events.

    Args:
        awaits: Whether the job's channel awaits an upload of a device by itself.
        blobs_at: URL under which boards find blobs over HTTP; None for none.

    Attributes:
        revoked: Devices that are no longer members and have not announced themselves since.
    """

    def __init__(
        self,
        traffic: DeviceTraffic,
        awaits: Callable[[str], bool],
        blobs_at: str | None = None,
    ) -> None:
        self._job, self._state, self._registry = traffic.job, traffic.state, traffic.registry
        self._uploads, self._outbox, self._monotonic = traffic.uploads, traffic.outbox, traffic.monotonic
        self._awaits, self._blobs_at = awaits, blobs_at
        self._changed = traffic.state.tasks.watch()
        self.revoked: set[str] = set()

    def run(self, command: DeviceCommand) -> list[on.Event]:
        """Carry out a command. Raises `StorageError` if the disk fails."""
        job, device = self._job.name, command.device
        match command:
            case do.SendOffer():
                return self.offer(command, again=command.again)
            case do.PullUpdate():
                return self._pull(command)
            case do.Acknowledge():
                self._outbox.send(device, Accepted(job, command.round, command.attempt, command.weights), job)
            case do.Cancel():
                found = (self._registry.prefix, device, command.round, command.reason)
                log.debug("%sdevice %s: round %d is void: %s", *found)
                self._registry.forget_transfers(device)
                self._outbox.send(device, Cancelled(job, command.round, command.attempt, command.reason), job)
            case do.TellFinished():
                self._outbox.send(device, Finished(job), job)
        return []

    def offer(self, command: do.SendOffer, *, again: bool = False) -> list[on.Event]:
        """Offer a device its part of the round, `again` if it was offered before: its time counts from then."""
        job = self._job.name
        if command.device in self.revoked:  # while its offer was made
            return [
                on.OfferRefused(command.device, command.round, command.attempt, "it was revoked", FailureKind.REVOKED)
            ]
        try:
            place = {"job": job, "round": command.round, "attempt": command.attempt, "blobs_at": self._blobs_at}
            self._outbox.send(command.device, Offer.from_dict(sent(command.offer) | place), job)
        except ProtocolError as error:  # a model that fits no message: no device can take part with it
            return [on.OfferRefused(command.device, command.round, command.attempt, one_line(str(error)))]
        if not again:
            self._registry.offered(command.device, self._monotonic())
        return []

    def repeat(self, now: float) -> list[on.Event]:
        """Repeat offers of which devices have shown nothing; `now` is monotonic."""
        events: list[on.Event] = []
        for device in self._registry.silent(now, _UNHEARD_OFFER_S):
            task = self._state.tasks[device]
            if task.offer is not None:
                command = do.SendOffer(device, self._state.round_of(task), task.attempt, task.offer)
                events += self.offer(command, again=True)
        return events

    def let_go(self, *, everywhere: bool) -> list[str]:
        """Stop receiving updates that no part awaits any more.

        Args:
            everywhere: Look at all that are received, not only at parts that have changed since the last call.

        Returns:
            Digests of what was dropped.
        """
        state, dropped = self._state, list[str]()
        for name in self._uploads.devices() if everywhere else self._changed:
            if self._awaits(name):
                continue
            task = state.tasks.get(name)
            if task is None or task.progress is not Part.PULLING or not state.awaits(task):
                dropped += self._uploads.drop(name)
            else:
                dropped += self._uploads.keep(name, state.round_of(task), task.attempt)
        self._changed.clear()
        return dropped

    def arriving(self) -> set[str]:
        """Digests of updates that are being received, or copied to where they are kept."""
        return self._uploads.digests()

    def collect_uploads(self) -> list[on.Event]:
        """Events of updates that have arrived or failed."""
        events: list[on.Event] = []
        for outcome in self._uploads.outcomes():
            device, round_, attempt = outcome.device, outcome.round, outcome.attempt
            if isinstance(outcome, Arrived):
                self._registry.delivered(device, self._monotonic())
                events.append(on.UpdateStored(device, round_, attempt, outcome.weights))
            else:
                events.append(on.UpdateRejected(device, round_, attempt, outcome.reason, outcome.failure))
        return events

    def _pull(self, command: do.PullUpdate) -> list[on.Event]:
        task = self._state.part(command.device, command.round, command.attempt)
        if task is None:
            return []  # the server has gone on meanwhile, which is no fault of the device
        ref = BlobRef.from_dict(command.weights)
        if reason := misfit(task.offer, ref):
            part = command.device, command.round, command.attempt
            return [on.UpdateRejected(*part, reason, FailureKind.MALFORMED)]
        self._outbox.ask(self._uploads.add(command.device, command.round, command.attempt, ref, self._monotonic()))
        return self.collect_uploads()
