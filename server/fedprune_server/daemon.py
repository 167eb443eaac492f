"""The daemon: a coordinator with a clock, a disk, a broker and a thread for heavy work.

One loop does everything that is quick: it takes in messages, saves what they lead to and only then carries it out.
Heavy commands go to the workshop's thread, and what comes of them is an event like any other. Whatever is lost on the
way (a message, a connection, this process) is said again by somebody: devices repeat their updates, the server its
offers.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from fedprune.architecture import Architecture
from fedprune.blobs import BlobStore
from fedprune.coordination import Phase, State, coordinate
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.state import Progress as Part
from fedprune.errors import BrokerError, ProtocolError
from fedprune.job import Job
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.chunk import MAX_PACKET
from fedprune.wire.fields import one_line
from fedprune.wire.link import ConnectionDown, ConnectionUp, Event
from fedprune.wire.messages import Accepted, Cancelled, Finished, Hello, Offer
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Serve
from fedprune_server.divergence import ran_away, remedy
from fedprune_server.downloads import Downloads
from fedprune_server.garbage import Garbage
from fedprune_server.offers import graphs_of
from fedprune_server.post import Doubled, Post, ShutOut, Supervised, Wire
from fedprune_server.reception import Reception
from fedprune_server.rollout_desk import RolloutDesk
from fedprune_server.rollout_store import RolloutStore
from fedprune_server.roster import Roster
from fedprune_server.storage import Storage
from fedprune_server.table import Display, Lines, Snapshot
from fedprune_server.uploads import Arrived, Uploads, misfit, sent
from fedprune_server.workshop import Executes, Workshop

log = logging.getLogger("fedprune.server")

_TICK_S = 0.5
_LINGER_S = 1.5
_GREETING_S = 24 * 3600.0
_ANSWER_S = 75.0
"""Devices that haven't answered a hello by then are gone: their pauses between two attempts go up to a minute."""

_UNHEARD_OFFER_S = 30.0
"""An offer of which a device shows nothing for so long is said again: a broker's acknowledgement is no device's."""


class Daemon:
    """Runs a job over MQTT.

    Args:
        job: The job.
        architecture: The global model's.
        state: Where to go on.
        storage: Where events and states are saved.
        store: Where blobs lie.
        worker: Carries out heavy commands.
        link: The connection to the broker, subscribed to `subscriptions`, not necessarily up yet.
        site: The site whose devices take part.
        keep: How many of the latest global models stay on the disk; None for all that ever was in the store.
        pulls: From how many devices updates are pulled at a time.
        profiles: Folders of hardware profiles beside the shipped ones.
        max_devices: How many devices may ever take part.
        max_packet: Bytes of an MQTT packet that the broker lets through.
        broker: The embedded broker, if there is one.
        rollouts: Releases on their way to boards, if this server gives them any.
        members: Who may take part, where it isn't everybody; others leave a rollout.
        display: Where to show what happens.
        clock: Seconds since 1970, for deadlines and the log; it may be set.
        monotonic: Seconds of a clock that nobody sets: for patience.
    """

    def __init__(
        self,
        job: Job,
        architecture: Architecture,
        state: State,
        storage: Storage,
        store: BlobStore,
        worker: Executes,
        link: Wire,
        *,
        site: str = "default",
        keep: int | None = 3,
        pulls: int = 4,
        profiles: Sequence[Path] = (),
        max_devices: int = 1000,
        max_packet: int = MAX_PACKET,
        broker: Supervised | None = None,
        rollouts: RolloutStore | None = None,
        members: Callable[[], Collection[str]] | None = None,
        display: Display | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = job
        self.state = state
        self._coordinator = coordinate(job, architecture, state)
        self._storage = storage
        self._workshop = Workshop(worker)
        self._link = link
        self._topics = Topics(site)
        self._broker = broker
        self._display = display or Lines()
        self._clock = clock
        self._monotonic = monotonic
        self._roster = Roster(job, architecture, state, storage.traffic(), max_devices, storage.outsiders())
        self._uploads = Uploads(store, pulls, max_packet)
        stores = [store] if rollouts is None else [store, rollouts.blobs]
        self._post = Post(link, self._topics, self._roster, Downloads(Serve(*stores), max_packet), max_packet)
        self._desk = None if rollouts is None else RolloutDesk(rollouts, self._post.send, members, clock, monotonic)
        self._reception = Reception(
            job, state, self._topics, self._roster, self._uploads, self._post, profiles, monotonic, self._desk, clock
        )
        self._garbage = Garbage(store, keep)
        self._wakes: list[float] = []
        self._events: deque[on.Event] = deque()
        self._draining = False
        self._unheard: dict[str, int] = {}
        self._heard_by = 0.0
        self._greet_at = 0.0
        self._stopping = False
        self._finished = False
        self._done: Callable[[], None] | None = None

    @property
    def subscriptions(self) -> list[str]:
        """What the link must listen to, before it is started."""
        return self._topics.server_subscriptions()

    @property
    def busy(self) -> bool:
        """Whether something is under way that doesn't wait for devices or time."""
        return self._workshop.busy or bool(self._events) or self._post.waiting

    @property
    def finished(self) -> bool:
        """Whether the job is done."""
        return self._finished

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """Payload bytes to and from each device, over all starts of the server."""
        return self._roster.traffic

    def stop(self) -> None:
        """End the loop soon; may be called from a signal handler or another thread."""
        self._stopping = True

    def run(self, *, until_finished: bool = False, done: Callable[[], None] | None = None) -> State:
        """Run until `stop` is called, or until the job is done.

        Args:
            until_finished: End when the job is done, instead of telling devices that come later.
            done: Called when the job is done, at once if it already is.

        Returns:
            The last state.

        Raises:
            FedpruneError: A command failed for another reason than a device's update, or the disk fails. The state on
                disk is that of the last event that was taken in completely.
        """
        self._done = done
        try:
            self._resume()
            ticked = self._monotonic()
            while not self._stopping:
                self._take(self._link.get(self._pause()))
                while not self._stopping and (result := self._workshop.collect()) is not None:
                    self._handle(result)
                if self._monotonic() - ticked >= _TICK_S:
                    ticked = self._monotonic()
                    self._tick(ticked)
                self._wake(self._clock())
                self._post.send_chunks()
                self._display.refresh(self.snapshot)
                if self._finished and until_finished and not self._workshop.busy:
                    self._linger()
                    break
            return self.state
        finally:
            self._workshop.close()
            self._display.close()

    def snapshot(self) -> Snapshot:
        """The job as it stands."""
        pulled = {n: p for n in self.state.tasks if (p := self._uploads.progress(n)) is not None}
        return self._roster.snapshot(self._clock(), self._link.connected, pulled)

    # What comes in.

    def _pause(self) -> float:
        """Seconds to wait for a message."""
        if self._post.ready:
            return 0.0
        longest = 0.01 if self._workshop.busy or self._post.waiting else 0.1
        return max(0.0, min(longest, self._wakes[0] - self._clock())) if self._wakes else longest

    def _take(self, item: tuple[str, bytes] | Event | ShutOut | Doubled | None) -> None:
        if isinstance(item, tuple):
            event = self._reception.receive(*item)
            self._collect_uploads()
            if event is not None:
                self._handle(event)
            if isinstance(event, on.DeviceBorn):
                self._unheard.pop(event.device, None)
                self._roster.introduce(event.device)
            self._storage.put_outsiders(self._roster.outsiders)
        elif isinstance(item, ShutOut | Doubled):
            for event in self._reception.noticed(item):
                self._handle(event)
        elif isinstance(item, ConnectionUp):
            log.info("connected to the broker")
            self._greet(self._monotonic())
            # While we were away nobody told us who died.
            self._unheard = {n: d.session for n, d in self.state.devices.items() if d.online}
            self._heard_by = self._monotonic() + _ANSWER_S
            self._post.ask(self._uploads.restart(self._monotonic()))
            self._collect_uploads()
        elif isinstance(item, ConnectionDown):
            log.warning("connection to the broker lost: %s", item.reason)
        if self._desk is not None and isinstance(item, (ConnectionUp, ConnectionDown)):
            self._desk.connected(isinstance(item, ConnectionUp))

    # Events and commands.

    def _resume(self) -> None:
        """Go on where the last process ended; what follows from that at once comes after it."""
        self._draining = True
        event, now = on.Resumed(), self._clock()
        try:
            commands = self._coordinator.handle(event, now)
            self._storage.save(self.state, event, now, self.traffic)
            self._carry_out(commands)
        finally:
            self._draining = False
        self._drain()

    def _handle(self, event: on.Event) -> None:
        """Take in an event, after those that wait; carrying out one may lead to others."""
        self._events.append(event)
        if not self._draining:
            self._drain()

    def _drain(self) -> None:
        self._draining = True
        try:
            while self._events:
                self._handle_one(self._events.popleft())
        finally:
            self._draining = False

    def _handle_one(self, event: on.Event) -> None:
        state, now = self.state, self._clock()
        before, round_, done = state.references(), state.round, len(state.history)
        commands = self._coordinator.handle(event, now)
        # First remembered, then done: after a crash at any point the state asks for what was not done.
        self._storage.save(state, event, now, self.traffic)
        self._garbage.suspect(before - state.references())
        if isinstance(event, on.Extracted):
            self._garbage.spare(graphs_of(event.offer), state.round)
        if isinstance(event, on.UpdateRejected):
            log.warning("update of %s in round %d doesn't count: %s", event.device, event.round, event.reason)
            if ran_away(event.reason):
                log.warning("%s", remedy(self.job.recipe.to_dict()))
        pulled = {n: t for n, t in state.tasks.items() if t.progress is Part.PULLING and state.awaits(t)}
        self._garbage.suspect(self._uploads.keep({(n, state.round_of(t), t.attempt) for n, t in pulled.items()}))
        if state.round != round_ or state.phase is Phase.FINISHED:
            # No offer is being made: coordinators order them while a round collects, the workshop answers in order, so
            # all are here before the round's end is; and those of the next round are ordered below.
            self._garbage.collect(state, self._uploads.digests())
        for summary in state.history[done:]:
            self._display.round_over(self.snapshot(), summary)
        self._carry_out(commands)

    def _carry_out(self, commands: list[do.Command]) -> None:
        self._workshop.expect(commands)
        for command in commands:
            match command:
                case do.SendOffer():
                    self._offer(command)
                case do.PullUpdate():
                    self._pull(command)
                case do.Acknowledge():
                    accepted = Accepted(self.job.name, command.round, command.attempt, command.weights)
                    self._post.send(command.device, accepted, self.job.name)
                case do.Cancel():
                    log.debug("device %s: round %d is void: %s", command.device, command.round, command.reason)
                    self._post.send(
                        command.device,
                        Cancelled(self.job.name, command.round, command.attempt, command.reason),
                        self.job.name,
                    )
                case do.Wake():
                    heapq.heappush(self._wakes, command.at)
                case do.Finish():
                    self._finish(command)
                case do.TellFinished():
                    self._post.send(command.device, Finished(self.job.name), self.job.name)
                case _:
                    self._workshop.order(command)

    def _offer(self, command: do.SendOffer, *, again: bool = False) -> None:
        body = sent(command.offer)
        if command.device in self._reception.out:  # while its offer was made
            self._handle(on.OfferRefused(command.device, command.round, command.attempt, "it was shut out"))
            return
        try:
            blobs = {k: BlobRef.from_dict(body[k]) for k in ("weights", "training", "inference")}
            body |= {**blobs, "widths": tuple(body["widths"])}
            self._post.send(command.device, Offer(self.job.name, command.round, command.attempt, **body), self.job.name)
        except ProtocolError as error:  # a model that no message holds: nobody can take part with it
            self._handle(on.OfferRefused(command.device, command.round, command.attempt, one_line(str(error))))
            return
        if not again:
            self._roster.offered(command.device, self._monotonic())

    def _pull(self, command: do.PullUpdate) -> None:
        task = self.state.tasks.get(command.device)
        ref = BlobRef.from_dict(command.weights)
        if reason := misfit(task.offer if task else None, ref):
            self._handle(on.UpdateRejected(command.device, command.round, command.attempt, reason))
            return
        self._post.ask(self._uploads.add(command.device, command.round, command.attempt, ref, self._monotonic()))
        self._collect_uploads()

    def _collect_uploads(self) -> None:
        """Turn ended pulls into events."""
        for outcome in self._uploads.outcomes():
            device, round_, attempt = outcome.device, outcome.round, outcome.attempt
            if isinstance(outcome, Arrived):
                self._roster.delivered(device, self._monotonic())
                self._handle(on.UpdateStored(device, round_, attempt, outcome.weights))
            else:
                self._handle(on.UpdateRejected(device, round_, attempt, one_line(outcome.reason)))

    def _finish(self, command: do.Finish) -> None:
        if not self._finished:
            log.info("job %s is finished: global model %s", self.job.name, command.model)
            if self._done is not None:
                self._done()
        self._finished = True
        for device in self.state.devices:
            self._post.send(device, Finished(self.job.name), self.job.name)

    # Time.

    def _tick(self, now: float) -> None:
        if self._broker is not None and not self._broker.alive:
            log.warning("the embedded broker has died and is started again")
            try:
                self._broker.restart()
            except BrokerError as error:  # tried again at the next tick
                log.error("%s", error)
        if self._unheard and now > self._heard_by:
            silent, self._unheard = self._unheard, {}
            for device, session in silent.items():
                self._uploads.drop(device)
                self._handle(on.DeviceDied(device, session))
        if self._desk is not None:
            self._desk.tick()
        self._roster.namesakes.settle(now)
        for device in self._roster.silent(now, _UNHEARD_OFFER_S):
            task = self.state.tasks[device]
            if task.offer is not None:
                self._offer(do.SendOffer(device, self.state.round_of(task), task.attempt, task.offer), again=True)
        self._post.ask(self._uploads.tick(now))
        self._collect_uploads()
        if self._link.connected and now >= self._greet_at:
            self._greet(now)

    def _greet(self, now: float) -> None:
        """Say to everybody that this server is there, and what time it is."""
        self._greet_at = now + _GREETING_S
        self._post.broadcast(Hello(int(self._clock())))

    def _wake(self, now: float) -> None:
        due = False
        while self._wakes and self._wakes[0] <= now:
            heapq.heappop(self._wakes)
            due = True
        if due:
            self._handle(on.Ticked())

    def _linger(self) -> None:
        """Let the last messages out, and tell devices that come back just now that it is over."""
        until = self._monotonic() + _LINGER_S
        while not self._stopping and self._monotonic() < until:
            self._take(self._link.get(0.05))
            self._display.refresh(self.snapshot)
        self._link.flush(_LINGER_S)
