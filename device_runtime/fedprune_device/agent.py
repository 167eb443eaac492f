"""The agent: listens for offers, pulls what they need, trains, hands in the update, and serves on meanwhile.

One loop does everything that is quick; a worker thread trains. Every message may come twice, late or never: what must
not be lost is on the disk before anything is said about it, and is said again until the server has answered.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedprune.errors import FedpruneError, StorageError
from fedprune.precision import FLOAT32
from fedprune.probe_report import ProbeReport
from fedprune.profile import HardwareProfile
from fedprune.wire.answer_time import AnswerTime
from fedprune.wire.broker_url import tls_context
from fedprune.wire.chunk import MAX_PACKET, Chunk
from fedprune.wire.connection_news import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Accepted, Cancelled, Death, Finished, Gone, Hello, Message, Want, parse
from fedprune.wire.offer import Offer
from fedprune.wire.topics import EVERYONE, Topics
from fedprune.wire.transfer import Serve
from fedprune_device.acceptance import attempt_of, check_offer, fits, place_of, same_work
from fedprune_device.alone import Alone
from fedprune_device.assignment import DamagedBlobError, LoadedTrainer, Workbench
from fedprune_device.care import Care
from fedprune_device.greeting import Greeting
from fedprune_device.lowering import Lowering
from fedprune_device.outbox import Outbox, Wire
from fedprune_device.source import Samples
from fedprune_device.standing import Standing
from fedprune_device.step_choice import StepChoice
from fedprune_device.store import DeviceStore
from fedprune_device.supply import Supply
from fedprune_device.trainer import TrainingStoppedError
from fedprune_device.training_thread import TrainingThread

_LOG = logging.getLogger("fedprune.device")

_BUSY_WAIT = 0.05
_IDLE_WAIT = 0.5
_MAX_DAMAGES = 3
_REMEMBERED = 32
"""Offers that are known when they come again."""


class Agent:
    """A device in a fleet.

    Args:
        device: Its name.
        site: The fleet's site.
        store: Its state directory.
        link: The connection; it must be subscribed to `Topics(site).device_subscriptions(device)`.
        data: Its samples.
        profile: What the board is; without it only the disk limits what is accepted.
        profile_name: What the server is told the board is; the profile's name by default.
        threads: Threads for training.
        cuda: Whether to train on an NVIDIA GPU, if that works.
        probe: What the board measured of itself.
        care: Lets training wait while the board is too hot.
        alone: Seconds after which it trains without its server; 0 for never (`Alone`).
        answers: Says what answers predictions, for the server; empty where that is nothing special.
        precision: What its model serves at (`lowering.SERVE`).
        serves: The job whose models may serve; empty for those of any job.
        max_packet: Bytes of an MQTT packet that the broker lets through, as far as is known.
        web: Gives TLS with the web servers that offers name.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        device: str,
        site: str,
        store: DeviceStore,
        link: Wire,
        data: Samples,
        *,
        profile: HardwareProfile | None = None,
        profile_name: str = "",
        threads: int = 1,
        cuda: bool = False,
        probe: ProbeReport | None = None,
        care: Care | None = None,
        alone: float = 0.0,
        answers: Callable[[], str] = lambda: "",
        precision: str = FLOAT32,
        serves: str = "",
        max_packet: int = MAX_PACKET,
        web: Callable[[], ssl.SSLContext] = tls_context,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._topics = device, Topics(site)
        self._store, self._link = store, link
        self._outbox = Outbox(device, self._topics, link, Serve(store.blobs), max_packet)
        self._answers = AnswerTime()
        self._supply = Supply(store, link, self._topics, self._outbox, self._answers, max_packet, web)
        self._data, self._profile, self._care, self._clock = data, profile, care, clock
        known = profile_name or (profile.name if profile is not None else "")
        self._greeting = Greeting(device, known, probe, answers)
        self._lowering = Lowering(precision, threads)
        store.slots.job = serves
        self._choice = StepChoice(standard=cuda)
        trainer = LoadedTrainer(threads, cuda=cuda)
        self._bench = Workbench(
            device, store.blobs, store.slots, data, trainer, store.own, self._lowering, store.privacy.draw
        )
        self._alone = Alone(device, store, data, threads, alone, care, cuda=cuda, lowering=self._lowering)
        self._ready: float | None = None  # the download's seconds, when an offer waits for the worker
        self._worker: TrainingThread | None = None
        self._seen: list[Offer] = []
        self._damages = 0
        self._finished = False
        self._stopping = threading.Event()

    def run(self, until_finished: bool = False) -> None:
        """Work until `stop` is called.

        Args:
            until_finished: Return when the server says that a job is finished, too.
        """
        self._begin(self._clock())
        try:
            while not self._stopping.is_set() and not (until_finished and self._finished):
                busy = self._worker is not None or self._supply.offer is not None
                item = self._link.get(_BUSY_WAIT if busy else _IDLE_WAIT)
                self._guarded(self._take, item)
                self._guarded(self._turn, None)
        finally:
            self._halt()
            for thread in (self._worker, self._alone, self._supply):
                if thread is not None:
                    thread.join(10)
            self._outbox.say(Death(self._device, self._store.session))

    @property
    def quiet(self) -> bool:
        """Whether a restart would cost nothing: nothing is pulled or trained, and no update waits to be handed in."""
        task = self._store.task
        idle = self._worker is None and not self._busy and not self._alone.running and self._store.pending is None
        return idle and (task is None or task.done)

    def stop(self) -> None:
        """Let `run` return soon; may be called from a signal handler or another thread."""
        self._stopping.set()

    @property
    def standing(self) -> Standing:
        """What it is at; may be read from any thread."""
        return self._outbox.standing

    def will(self) -> tuple[str, bytes]:
        """Topic and payload that the broker shall publish when the next connection is lost; numbers that connection."""
        try:
            self._store.next_session()
        except StorageError as error:
            _LOG.warning("can't keep the session number: %s", error)
            self._store.session += 1
        return self._outbox.will(self._store.session)

    def _guarded(self, step: Callable[[Any], None], argument: Any) -> None:
        """Nothing that comes over the network ends the agent."""
        try:
            step(argument)
        except FedpruneError as error:
            _LOG.warning("%s", error)
        except Exception:  # noqa: BLE001 - one bad message must not end a device's service
            _LOG.exception("unexpected error; going on")

    # What comes in

    def _take(self, item: tuple[str, bytes] | ConnectionUp | ConnectionDown | None) -> None:
        now = self._clock()
        if isinstance(item, ConnectionUp):
            _LOG.info("connected to the broker")
            self.standing.connected = True
            self._alone.heard(now)
            self._answers.connected(item.took)
            self._seen.clear()  # the server may be another, or run the same job once more
            self._greet(now)
            self._supply.connected(now)
        elif isinstance(item, ConnectionDown):
            _LOG.info("connection to the broker lost: %s", item.reason)
            self.standing.connected = False
            self._outbox.drop_chunks()
            self._alone.heard(now)
        elif item is not None:
            self._alone.heard(now)
            topic, payload = item
            address = self._topics.parse(topic)
            if address.channel == "down/blob":
                chunk, shared = Chunk.parse(payload), address.device == EVERYONE
                self._supplied(lambda: self._supply.chunk(chunk, now, shared=shared))
            elif address.channel == "down":
                self._on_message(parse(payload), now)

    def _on_message(self, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self._seen.clear()
            self._greet(now)
            self._supply.remind(now)
        elif isinstance(message, Offer):
            self._on_offer(message, now)
        elif isinstance(message, Accepted):
            self._on_accepted(message)
        elif isinstance(message, Cancelled):
            self._on_cancelled(message)
        elif isinstance(message, Finished):
            self._on_finished(message)
        elif isinstance(message, Want):
            self._outbox.answer(message, self._store.pending, now)
        elif isinstance(message, Gone):
            self._supplied(lambda: self._supply.gone(message.sha256, now))

    def _greet(self, now: float) -> None:
        task, pending = self._store.task, self._store.pending
        held = task.offer if task is not None and not task.done else pending
        birth = self._greeting.birth(self._store.session, self._data.samples, held, now, self._answers.slowest)
        self._outbox.say(birth)
        self._outbox.hurry(now)

    def _on_offer(self, offer: Offer, now: float) -> None:
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

    @property
    def _busy(self) -> bool:
        """Whether the current offer is being pulled or trained."""
        running = self._worker is not None and not self._worker.stopped
        return running or self._supply.offer is not None or self._ready is not None

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

    def _on_accepted(self, message: Accepted) -> None:
        task, pending = self._store.task, self._store.pending
        if pending is None or place_of(pending) != place_of(message) or pending.weights.sha256 != message.weights:
            return
        _LOG.info("round %d of job %s: the server has the update", message.round, message.job)
        if task is not None and place_of(task.offer) == place_of(message):
            self._store.finish()
        self._store.forget()
        self._collect()

    def _on_cancelled(self, message: Cancelled) -> None:
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

    def _on_finished(self, message: Finished) -> None:
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
        self._finished = True

    # What is to be done

    def _begin(self, now: float) -> None:
        """Go on where the last process stopped."""
        self._collect()
        task = self._store.task
        if task is None or task.done:
            return
        if self._store.waiting(task.offer) is None:
            _LOG.info("going on with round %d of job %s", task.offer.round, task.offer.job)
            offer = self._choice.suited(task.offer)
            try:
                if offer != task.offer:
                    self._store.accept(offer)
                self._supply.begin(offer, now, asks=False)
            except FedpruneError as error:
                self._refuse(task.offer, error)

    def _turn(self, _: None) -> None:
        now = self._clock()
        self._outbox.send_chunks()
        took = self._supplied(lambda: self._supply.turn(now))
        if took is not None:
            self._ready = took
            self._collect()
        if self._worker is not None and not self._worker.alive:
            worker, self._worker = self._worker, None
            self._settle(worker, now)
            self._collect()
        idle = self._worker is None and self._ready is None and not self._supply.fetching
        if self._alone.turn(now, connected=self.standing.connected, idle=idle):
            self._collect()
        task = self._store.task
        if self._worker is None and not self._alone.running and self._ready is not None and task is not None:
            seconds, self._ready = self._ready, None
            how = self._choice.described(task.offer)
            _LOG.info("round %d of job %s: training %s", task.offer.round, task.offer.job, how)
            self._worker = TrainingThread(self._bench, task.offer, seconds, self._care)
        if self._store.pending is not None:
            self._outbox.announce(self._store.pending, now)
        self._report(now)
        if self.standing.connected:
            self._outbox.stay(self._store.session, now)

    def _report(self, now: float) -> None:
        if self._supply.offer is not None:
            self._outbox.progress(self._supply.offer, ("download", *self._supply.progress), now)
        elif self._worker is not None and not self._worker.stopped:
            self._outbox.progress(self._worker.offer, self._worker.status, now)
        elif self._alone.status is not None:
            self.standing.working(*self._alone.status, alone=True)
        elif self._store.pending is None:
            self.standing.idle()
            if self.standing.connected and self._greeting.outdated(self._data, now):
                self._greet(now)

    def _settle(self, worker: TrainingThread, now: float) -> None:
        """Take what the worker leaves behind."""
        task, offer = self._store.task, worker.offer
        if worker.stopped or task is None or task.done or task.offer != offer:
            return
        if worker.update is not None:
            update = replace(worker.update, attempt=offer.attempt)
            try:
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
