"""What a coordinator's commands lead to outside: what is said to devices, and what is fetched from them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress as Part
from fedprune.wire.messages import Accepted, Cancelled, Finished
from fedprune.wire.offer import Offer
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.executor.update_size import misfit, sent
from fedprune_server.messaging.outbox import Post
from fedprune_server.transfer.s3_sync import Shipping
from fedprune_server.transfer.uploads import Arrived, Uploads

log = logging.getLogger("fedprune.server")

_UNHEARD_OFFER_S = 30.0
"""An offer of which a device shows nothing for so long is said again: a broker's acknowledgement is no device's."""

Errand = do.SendOffer | do.PullUpdate | do.Acknowledge | do.Cancel | do.TellFinished


class Errands:
    """Says and fetches what commands ask for; what comes of it is an event.

    Args:
        job: The job.
        state: The coordinator's state; read, never changed.
        registry: The devices.
        uploads: Updates on their way here.
        post: The way out.
        out: Devices that were shut out.
        happen: Takes in an event.
        monotonic: Seconds of a clock that nobody sets.
        shipping: Brings updates where they are kept.
        blobs_at: Where blobs lie on the web, too; None for nowhere.
    """

    def __init__(
        self,
        job: Job,
        state: State,
        registry: DeviceRegistry,
        uploads: Uploads,
        post: Post,
        out: AbstractSet[str],
        happen: Callable[[on.Event], None],
        monotonic: Callable[[], float],
        shipping: Shipping,
        blobs_at: str | None = None,
    ) -> None:
        self._shipping = shipping
        self._job = job
        self._state = state
        self._registry = registry
        self._uploads = uploads
        self._post = post
        self._out = out
        self._happen = happen
        self._monotonic = monotonic
        self._blobs_at = blobs_at

    def run(self, command: Errand) -> None:
        """Carry out a command.

        Raises:
            StorageError: The disk fails.
        """
        job = self._job.name
        match command:
            case do.SendOffer():
                self.offer(command)
            case do.PullUpdate():
                self._pull(command)
            case do.Acknowledge():
                self._post.send(command.device, Accepted(job, command.round, command.attempt, command.weights), job)
            case do.Cancel():
                found = (self._registry.prefix, command.device, command.round, command.reason)
                log.debug("%sdevice %s: round %d is void: %s", *found)
                self._post.send(command.device, Cancelled(job, command.round, command.attempt, command.reason), job)
            case do.TellFinished():
                self._post.send(command.device, Finished(job), job)

    def offer(self, command: do.SendOffer, *, again: bool = False) -> None:
        """Offer a device its part.

        Args:
            command: The offer.
            again: Whether it was offered before, and nothing was heard of it.
        """
        body, job = sent(command.offer), self._job.name
        if command.device in self._out:  # while its offer was made
            self._happen(on.OfferRefused(command.device, command.round, command.attempt, "it was shut out"))
            return
        try:
            blobs = {k: BlobRef.from_dict(body[k]) for k in ("weights", "training", "inference")}
            body |= {**blobs, "widths": tuple(body["widths"]), "blobs_at": self._blobs_at}
            self._post.send(command.device, Offer(job, command.round, command.attempt, **body), job)
        except ProtocolError as error:  # a model that no message holds: nobody can take part with it
            self._happen(on.OfferRefused(command.device, command.round, command.attempt, one_line(str(error))))
            return
        if not again:
            self._registry.offered(command.device, self._monotonic())

    def repeat(self, now: float) -> None:
        """Say offers again of which nothing was heard.

        Args:
            now: Seconds of a clock that nobody sets.
        """
        for device in self._registry.silent(now, _UNHEARD_OFFER_S):
            task = self._state.tasks[device]
            if task.offer is not None:
                self.offer(do.SendOffer(device, self._state.round_of(task), task.attempt, task.offer), again=True)

    def let_go(self, *, anew: bool) -> list[str]:
        """Stop fetching what no part awaits any more.

        Args:
            anew: Whether to look at all that is fetched, not only at parts that have changed.

        Returns:
            Digests of what was dropped.
        """
        state, dropped = self._state, list[str]()
        for name in self._uploads.devices() if anew else state.tasks.changed:
            task = state.tasks.get(name)
            if task is None or task.progress is not Part.PULLING or not state.awaits(task):
                dropped += self._uploads.drop(name)
            else:
                dropped += self._uploads.keep(name, state.round_of(task), task.attempt)
        return dropped

    def collect_uploads(self) -> None:
        """Turn ended pulls into events."""
        for outcome in self._shipping.through(self._uploads.outcomes()):
            device, round_, attempt = outcome.device, outcome.round, outcome.attempt
            if isinstance(outcome, Arrived):
                self._registry.delivered(device, self._monotonic())
                self._happen(on.UpdateStored(device, round_, attempt, outcome.weights))
            else:
                self._happen(on.UpdateRejected(device, round_, attempt, one_line(outcome.reason)))

    def _pull(self, command: do.PullUpdate) -> None:
        task = self._state.tasks.get(command.device)
        if task is None or (self._state.round_of(task), task.attempt) != (command.round, command.attempt):
            return  # the server has gone on meanwhile, which is no fault of the device
        ref = BlobRef.from_dict(command.weights)
        if reason := misfit(task.offer, ref):
            self._happen(on.UpdateRejected(command.device, command.round, command.attempt, reason))
            return
        self._post.ask(self._uploads.add(command.device, command.round, command.attempt, ref, self._monotonic()))
        self.collect_uploads()
