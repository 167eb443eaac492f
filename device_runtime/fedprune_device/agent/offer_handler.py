"""What a board does for its server: it pulls what was offered, trains it, and hands in what came of it.

What must not be lost is on the disk before anything is said about it, and is said again until the server has answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from fedprune.core.errors import FedpruneError
from fedprune.hardware.profile import HardwareProfile
from fedprune.training.recipe import Recipe
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import Accepted, Cancelled, Finished, Update
from fedprune.wire.offer import Offer
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.offer_checks import attempt_of, check_offer, fits, place_of, same_work
from fedprune_device.network.uplink import Uplink
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.graph_choice import GraphChoice
from fedprune_device.training.offline_training import OfflineTraining
from fedprune_device.training.round_runner import DamagedBlobError, RoundRunner
from fedprune_device.training.trainer import TrainingStoppedError
from fedprune_device.training.training_thread import TrainingThread

_LOG = logging.getLogger("fedprune.device")

_MAX_DAMAGES = 3
_REMEMBERED = 32
"""Offers that are known when they come again."""


class OfferHandler:
    """The offer that a board has accepted, from then until the server has what came of it.

    Args:
        store: The board's state directory.
        supply: Pulls what an offer needs.
        outbox: Says what there is to say.
        bench: Trains.
        alone: Trains while the server is away.
        choice: Chooses among an offer's training graphs.
        lowering: Lowers what serves.
        profile: What the board is; without it only the disk limits what is accepted.
        care: Lets training wait while the board is too hot.
    """

    def __init__(
        self,
        store: DeviceStore,
        supply: Downloader,
        outbox: Uplink,
        bench: RoundRunner,
        alone: OfflineTraining,
        *,
        choice: GraphChoice,
        lowering: ReducedPrecision,
        profile: HardwareProfile | None = None,
        care: ThermalGuard | None = None,
    ) -> None:
        self._store, self._supply, self._outbox, self._bench, self._alone = store, supply, outbox, bench, alone
        self._choice, self._lowering, self._profile, self._care = choice, lowering, profile, care
        self._ready: float | None = None  # the download's seconds, when an offer waits for the worker
        self._worker: TrainingThread | None = None
        self._seen: list[Offer] = []
        self._damages = 0

    @property
    def under_way(self) -> bool:
        """Whether something is pulled or trained, be it only to its end."""
        return self._worker is not None or self._supply.offer is not None

    @property
    def quiet(self) -> bool:
        """Whether a restart would cost nothing: nothing is pulled or trained, and no update waits to be handed in."""
        task = self._store.task
        idle = self._worker is None and not self._busy and not self._alone.running and self._store.pending is None
        return idle and (task is None or task.done)

    @property
    def held(self) -> Offer | Update | None:
        """The offer that is worked on, or else the update that waits to be handed in."""
        task = self._store.task
        return task.offer if task is not None and not task.done else self._store.pending

    # What the server says

    def forget_offers(self) -> None:
        """Take offers for new ones: the server may be another, or run the same job once more."""
        self._seen.clear()

    def offered(self, offer: Offer, now: float) -> None:
        """The server offers work; it may have come late, or twice."""
        offer = self._choice.suited(self._lowering.wanted(offer))
        task = self._store.task
        if self._outbox.refuse_again(offer):
            return
        if task is not None and not task.done and task.offer == offer:
            self._outbox.hurry(now)  # an update that waits is what the server should hear of
            return
        if offer in self._seen:
            return  # it came late, or twice
        # Anything else is new, whatever its number: a server that lost its state begins again at its first round.
        if task is not None and same_work(task.offer, offer) and (self._store.waiting(task.offer) or self._busy):
            _LOG.info("round %d of job %s, attempt %d: the same work, going on", offer.round, offer.job, offer.attempt)
            self._renumber(offer, now)
        else:
            self._start(offer, now)
        self._seen = [*self._seen, offer][-_REMEMBERED:]

    def chunk(self, chunk: Chunk, now: float, *, shared: bool) -> None:
        """A piece of what was asked for; `shared` where all devices get it."""
        self._supplied(lambda: self._supply.chunk(chunk, now, shared=shared))

    def gone(self, sha256: str, now: float) -> None:
        """The server no longer has what was asked for."""
        self._supplied(lambda: self._supply.gone(sha256, now))

    def accepted(self, message: Accepted) -> None:
        """The server has an update."""
        task, pending = self._store.task, self._store.pending
        if pending is None or place_of(pending) != place_of(message) or pending.weights.sha256 != message.weights:
            return
        _LOG.info("round %d of job %s: the server has the update", message.round, message.job)
        if task is not None and place_of(task.offer) == place_of(message):
            self._store.finish()
        self._store.forget()
        self._collect()

    def cancelled(self, message: Cancelled) -> None:
        """The server wants nothing more of an attempt."""
        task, pending = self._store.task, self._store.pending
        meant = attempt_of(message)
        # What is cancelled may be offered again under the same number: a server that waits for devices does that.
        self._seen = [o for o in self._seen if attempt_of(o) != meant]
        if pending is not None and attempt_of(pending) == meant:
            self._store.forget()
        if task is not None and not task.done and attempt_of(task.offer) == meant:
            _LOG.info("round %d of job %s is cancelled: %s", message.round, message.job, message.reason)
            self._halt()
            self._store.finish()
        self._collect()

    def finished(self, message: Finished) -> None:
        """A job is done."""
        task, pending = self._store.task, self._store.pending
        _LOG.info("job %s is finished", message.job)
        self._seen.clear()
        self._outbox.forget_refusal()
        if pending is not None and pending.job == message.job:
            self._store.forget()
        if task is not None and task.offer.job == message.job:
            self._halt()
            self._store.drop()
            self._collect()
        else:
            self._store.own.forget(message.job)

    # What is to be done

    def resume(self, now: float) -> None:
        """Go on where the last process stopped."""
        self._collect()
        task = self._store.task
        if task is None or task.done:
            return
        if self._store.waiting(task.offer) is None:
            _LOG.info("going on with round %d of job %s", task.offer.round, task.offer.job)
            offer = self._choice.suited(task.offer)
            try:
                self._store.privacy.check(Recipe.from_dict(offer.recipe))  # the owner may ask for more than then
                if offer != task.offer:
                    self._store.accept(offer)
                self._supply.begin(offer, now, asks=False)
            except FedpruneError as error:
                self._refuse(task.offer, error)

    def turn(self, now: float, *, connected: bool) -> None:
        """Go on with what is under way.

        Args:
            now: Seconds that only grow.
            connected: Whether there is a connection to the broker.
        """
        took = self._supplied(lambda: self._supply.turn(now))
        if took is not None:
            self._ready = took
            self._collect()
        if self._worker is not None and not self._worker.alive:
            worker, self._worker = self._worker, None
            self._settle(worker, now)
            self._collect()
        idle = self._worker is None and self._ready is None and not self._supply.fetching
        if self._alone.turn(now, connected=connected, idle=idle):
            self._collect()
        task = self._store.task
        if self._worker is None and not self._alone.running and self._ready is not None and task is not None:
            seconds, self._ready = self._ready, None
            how = self._choice.described(task.offer)
            _LOG.info("round %d of job %s: training %s", task.offer.round, task.offer.job, how)
            self._worker = TrainingThread(self._bench, task.offer, seconds, self._care)
        if self._store.pending is not None:
            self._outbox.announce(self._store.pending, now)

    def report(self, now: float) -> bool:
        """Say how far what is under way is; returns whether that is nothing at all."""
        if self._supply.offer is not None:
            self._outbox.progress(self._supply.offer, ("download", *self._supply.progress), now)
        elif self._worker is not None and not self._worker.stopped:
            self._outbox.progress(self._worker.offer, self._worker.status, now)
        elif self._alone.status is not None:
            self._outbox.standing.working(*self._alone.status, alone=True)
        elif self._store.pending is None:
            self._outbox.standing.idle()
            return True
        return False

    def end(self, timeout: float) -> None:
        """Stop everything, and wait for the end of each thread, but no longer than `timeout` seconds."""
        self._halt()
        for thread in (self._worker, self._alone, self._supply):
            if thread is not None:
                thread.join(timeout)

    @property
    def _busy(self) -> bool:
        """Whether the current offer is being pulled or trained."""
        running = self._worker is not None and not self._worker.stopped
        return running or self._supply.offer is not None or self._ready is not None

    def _renumber(self, offer: Offer, now: float) -> None:
        """Let what is under way, or waits to be handed in, count for another attempt at the same work."""
        pending = self._store.waiting(offer)
        if pending is not None:
            self._store.keep(replace(pending, attempt=offer.attempt))
        self._store.accept(offer)
        self._supply.renumber(offer)
        if self._worker is not None:
            self._worker.offer = offer
        self._outbox.hurry(now)

    def _start(self, offer: Offer, now: float) -> None:
        try:
            check_offer(offer, self._store, self._profile)
            pending = self._store.pending
            if pending is not None and pending.job == offer.job and pending.round >= offer.round:
                self._store.forget()  # it answers an offer that the server no longer knows of
            self._store.accept(offer)
            self._halt()
            self._damages = 0
            self._collect()
            if self._store.pending is not None or not fits(offer, self._store):
                self._store.dismiss()  # an update that waits, too, takes the place of a weights file
                self._collect()
            _LOG.info("round %d of job %s, attempt %d: accepted", offer.round, offer.job, offer.attempt)
            self._download(offer, now)
        except FedpruneError as error:
            self._refuse(offer, error)

    def _download(self, offer: Offer, now: float) -> None:
        self._supply.begin(offer, now, plainly=self._damages > 0)  # what couldn't be read once is not decoded again

    def _supplied(self, step: Callable[[], float | None]) -> float | None:
        """Go on with what is on its way; an offer that can't be supplied is refused."""
        offer = self._supply.offer
        try:
            return step()
        except FedpruneError as error:
            if offer is None:
                raise
            self._refuse(offer, error)
        return None

    def _settle(self, worker: TrainingThread, now: float) -> None:
        """Commit the worker's result. The result of a stopped worker is dropped: its job may no longer be current."""
        task, offer = self._store.task, worker.offer
        if worker.stopped or task is None or task.done or task.offer != offer:
            return
        if worker.made is not None:
            try:
                update = replace(self._bench.commit(worker.made), attempt=offer.attempt)
                self._store.keep(update)
            except FedpruneError as error:
                self._refuse(offer, error)
                return
            shown = ", ".join(f"{k} {v:.4g}" for k, v in sorted(update.metrics.items()))
            _LOG.info("round %d of job %s: trained (%s)", offer.round, offer.job, shown)
            self._outbox.hurry(now)
        elif isinstance(worker.error, DamagedBlobError) and self._damages < _MAX_DAMAGES:
            self._damages += 1
            _LOG.warning("%s: pulling it again", worker.error)
            try:
                self._store.blobs.delete(worker.error.sha256)
                self._download(offer, now)
            except FedpruneError as error:
                self._refuse(offer, error)
        elif worker.error is not None and not isinstance(worker.error, TrainingStoppedError):
            other = self._choice.instead(offer, worker.error)
            if other is None:
                self._refuse(offer, worker.error)
            else:
                self._start(other, now)

    def _halt(self) -> None:
        """Stop what is being done for the current offer."""
        self._supply.stop()
        self._ready = None
        self._alone.stop()
        if self._worker is not None:
            self._worker.stop()

    def _collect(self) -> None:
        # What the worker has just made is referred to by nothing yet; nobody waits for what a stopped one makes.
        if (self._worker is None or self._worker.stopped) and not self._alone.running:
            self._store.collect()

    def _refuse(self, offer: Offer, error: BaseException) -> None:
        self._outbox.refuse(offer, error)
        task = self._store.task
        if task is not None and task.offer == offer:
            self._halt()
            self._store.finish()
            self._collect()
