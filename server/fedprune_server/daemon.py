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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedprune.architecture import Architecture
from fedprune.blobs import BlobStore
from fedprune.coordination import Coordinator, Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.state import Progress as Part
from fedprune.errors import BrokerError, ProfileError, ProtocolError
from fedprune.job import Job
from fedprune.profile_store import find
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.chunk import QOS as CHUNK_QOS
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import ConnectionDown, ConnectionUp, Event
from fedprune.wire.messages import (
    Accepted,
    Birth,
    Cancelled,
    Death,
    Finished,
    FromServer,
    Gone,
    Hello,
    Offer,
    Progress,
    Refusal,
    Update,
    Want,
    parse,
)
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Serve
from fedprune_server.downloads import Downloads
from fedprune_server.roster import ACCURACY, Roster
from fedprune_server.storage import Storage, kept_models
from fedprune_server.table import Display, Lines, Snapshot
from fedprune_server.uploads import Arrived, Uploads, Wants
from fedprune_server.workshop import Executes, Workshop

log = logging.getLogger("fedprune.server")

_TICK_S = 0.5
_CHUNKS_PER_TURN = 4
_UNSENT_BYTES = 2 * 2**20
"""Chunks wait while so much is on its way to the broker, so that messages never do."""

_LINGER_S = 1.5
_ANSWER_S = 75.0
"""Devices that haven't answered a hello by then are gone: their pauses between two attempts go up to a minute."""

_COMPLAINTS = 20
"""Bad messages that are logged one by one; later ones are only counted."""


class Wire(Protocol):
    """What the daemon needs of its connection; `fedprune.wire.link.Link` has it."""

    @property
    def connected(self) -> bool:
        """Whether the connection is up."""
        ...

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        ...

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting."""
        ...

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | Event | None:
        """The next message or event."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until what was published is sent."""
        ...


class Supervised(Protocol):
    """A broker that the daemon looks after."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        ...

    def restart(self) -> None:
        """Run it again at the same address."""
        ...


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
        keep: How many of the latest global models stay on the disk.
        pulls: From how many devices updates are pulled at a time.
        profiles: Folders of hardware profiles beside the shipped ones.
        broker: The embedded broker, if there is one.
        display: Where to show what happens.
        clock: Seconds since 1970: deadlines must mean the same after a restart.
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
        keep: int = 3,
        pulls: int = 4,
        profiles: Sequence[Path] = (),
        broker: Supervised | None = None,
        display: Display | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = job
        self.state = state
        self._architecture = architecture
        self._coordinator = Coordinator(job, architecture, state)
        self._storage = storage
        self._store = store
        self._workshop = Workshop(worker)
        self._link = link
        self._topics = Topics(site)
        self._keep = keep
        self._profiles = tuple(profiles)
        self._broker = broker
        self._display = display or Lines()
        self._clock = clock
        self._monotonic = monotonic
        self._uploads = Uploads(store, pulls)
        self._downloads = Downloads(Serve(store))
        self._wakes: list[float] = []
        self._events: deque[on.Event] = deque()
        self._roster = Roster(job, architecture, state, storage.traffic())
        self._garbage: set[str] = set()
        self._graphs: set[str] = set()
        self._unheard: dict[str, int] = {}
        self._heard_by = 0.0
        self._complaints = 0
        self._stopping = False
        self._finished = False

    @property
    def subscriptions(self) -> list[str]:
        """What the link must listen to, before it is started."""
        return self._topics.server_subscriptions()

    @property
    def busy(self) -> bool:
        """Whether something is under way that doesn't wait for devices or time."""
        return self._workshop.busy or bool(self._events) or bool(self._downloads)

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

    def run(self, *, until_finished: bool = False) -> State:
        """Run until `stop` is called, or until the job is done.

        Args:
            until_finished: End when the job is done, instead of telling devices that come later.

        Returns:
            The last state.

        Raises:
            FedpruneError: A command failed for another reason than a device's update, or the disk fails. The state on
                disk is that of the last event that was taken in completely.
        """
        try:
            self._carry_out(self._coordinator.resume(self._clock()))
            ticked = self._monotonic()
            while not self._stopping:
                self._take(self._link.get(self._pause()))
                while not self._stopping and (result := self._workshop.collect()) is not None:
                    self._handle(result)
                if self._monotonic() - ticked >= _TICK_S:
                    ticked = self._monotonic()
                    self._tick(ticked)
                self._wake(self._clock())
                self._send_chunks()
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
        if self._events or (self._downloads and self._link.unsent < _UNSENT_BYTES):
            return 0.0
        longest = 0.01 if self._workshop.busy or self._downloads else 0.1
        return max(0.0, min(longest, self._wakes[0] - self._clock())) if self._wakes else longest

    def _take(self, item: tuple[str, bytes] | Event | None) -> None:
        if isinstance(item, tuple):
            try:
                self._receive(*item)
            except ProtocolError as error:
                self._complain(item[0], error)
        elif isinstance(item, ConnectionUp):
            log.info("connected to the broker")
            hello = Hello(max(1, int(self._clock() * 1000)))
            self._link.publish(self._topics.broadcast(), hello.to_bytes())
            # While we were away nobody told us who died.
            self._unheard = {n: d.session for n, d in self.state.devices.items() if d.online}
            self._heard_by = self._monotonic() + _ANSWER_S
            self._ask(self._uploads.restart(self._monotonic()))
            self._collect_uploads()
        elif isinstance(item, ConnectionDown):
            log.warning("connection to the broker lost: %s", item.reason)

    def _complain(self, topic: str, error: ProtocolError) -> None:
        self._complaints += 1
        if self._complaints <= _COMPLAINTS:
            log.warning("ignored a message on %.200s: %s", topic, error)
        if self._complaints == _COMPLAINTS:
            log.warning("further bad messages are ignored silently")

    def _receive(self, topic: str, payload: bytes) -> None:
        device, _, channel = self._topics.parse(topic)
        self._roster.received(device, len(payload))
        now = self._monotonic()
        if channel == "up/blob":
            self._ask(self._uploads.chunk(device, Chunk.parse(payload), now))
            self._collect_uploads()
            return
        if channel != "up":
            raise ProtocolError("channel", expected="up or up/blob", got=channel)
        message = parse(payload)
        said = getattr(message, "device", device)
        if said != device:
            raise ProtocolError("device of a message", expected=device, got=said)
        if isinstance(message, Birth):
            self._born(message, len(payload))
        elif isinstance(message, Death):
            known = self.state.devices.get(device)
            if known is not None and known.session == message.session:
                self._uploads.drop(device)
                self._downloads.drop(device)
            self._handle(on.DeviceDied(device, message.session))
        elif isinstance(message, Want):
            if message.sha256 in self._offered(device):
                self._downloads.add(device, message)
            else:
                self._send(device, Gone(message.sha256))
        elif isinstance(message, Gone):
            self._ask(self._uploads.gone(device, message.sha256, now))
            self._collect_uploads()
        elif isinstance(message, (Progress, Refusal, Update)):
            self._report(device, message)
        else:
            raise ProtocolError("message of a device", got=message.kind)

    def _born(self, birth: Birth, size: int) -> None:
        if birth.device not in self._roster:
            self._roster[birth.device].up = size
        self._unheard.pop(birth.device, None)
        try:
            profile = find(_plain_name(birth.profile), self._profiles).to_dict()
        except ProfileError as error:
            self._roster.exclude(birth.device, str(error))
            return
        self._handle(on.DeviceBorn(birth.device, birth.session, profile, birth.samples, birth.probe))
        self._roster.introduce(birth.device)

    def _report(self, device: str, message: Progress | Refusal | Update) -> None:
        """What a device says about its part in a round."""
        if message.job != self.job.name:
            # It holds something of a job that isn't ours (any more): it may let go of it.
            if isinstance(message, Update):
                self._send(device, Cancelled(message.job, message.round, "this server runs another job"), message.job)
            return
        contact = self._roster[device]
        if isinstance(message, Progress):
            contact.progress = message
        elif isinstance(message, Refusal):
            log.warning("device %s refuses round %d: %s", device, message.round, message.reason)
            self._handle(on.OfferRefused(device, message.round, message.attempt, message.reason))
        else:
            contact.accuracy = message.metrics.get(ACCURACY, contact.accuracy)
            self._handle(
                on.UpdateAnnounced(
                    device,
                    message.round,
                    message.attempt,
                    message.base,
                    message.weights.to_dict(),
                    message.samples,
                    message.steps,
                    dict(message.metrics),
                )
            )

    # Events and commands.

    def _handle(self, event: on.Event) -> None:
        """Take in an event, and those that follow from it at once."""
        self._events.append(event)
        if len(self._events) > 1:
            return  # the loop below, further up the stack, gets to it
        while self._events:
            self._handle_one(self._events[0])
            self._events.popleft()

    def _handle_one(self, event: on.Event) -> None:
        state, now = self.state, self._clock()
        before, round_, done = state.references(), state.round, len(state.history)
        commands = self._coordinator.handle(event, now)
        # First remembered, then done: after a crash at any point the state asks for what was not done.
        self._storage.save(state, event, now, self.traffic)
        self._garbage |= before - state.references()
        if isinstance(event, on.Extracted):
            self._graphs |= {event.offer[k]["sha256"] for k in ("training", "inference") if k in event.offer}
        if isinstance(event, on.UpdateRejected):
            log.warning("update of %s in round %d doesn't count: %s", event.device, event.round, event.reason)
        wanted = {(n, state.round, t.attempt) for n, t in state.tasks.items() if t.progress is Part.PULLING}
        self._garbage.update(self._uploads.keep(wanted if state.phase is Phase.TRAINING else set()))
        if state.round != round_ or state.phase is Phase.FINISHED:
            self._collect_garbage()
        for summary in state.history[done:]:
            self._display.round_over(self.snapshot(), summary)
        self._carry_out(commands)

    def _carry_out(self, commands: list[do.Command]) -> None:
        for command in commands:
            match command:
                case do.SendOffer():
                    self._offer(command)
                case do.PullUpdate():
                    self._pull(command)
                case do.Acknowledge():
                    accepted = Accepted(self.job.name, command.round, command.attempt, command.weights)
                    self._send(command.device, accepted, self.job.name)
                case do.Cancel():
                    log.debug("device %s: round %d is void: %s", command.device, command.round, command.reason)
                    self._send(command.device, Cancelled(self.job.name, command.round, command.reason), self.job.name)
                case do.Wake():
                    heapq.heappush(self._wakes, command.at)
                case do.Finish():
                    self._finish(command)
                case _:
                    self._workshop.order(command)

    def _offer(self, command: do.SendOffer) -> None:
        body = command.offer
        blobs = {k: BlobRef.from_dict(body[k]) for k in ("weights", "training", "inference")}
        offer = Offer(
            self.job.name, command.round, command.attempt, **{**body, **blobs, "widths": tuple(body["widths"])}
        )
        self._roster.offered(command.device, self._monotonic())
        self._send(command.device, offer, self.job.name)

    def _pull(self, command: do.PullUpdate) -> None:
        task = self.state.tasks.get(command.device)
        expected = ((task.offer if task else None) or {}).get("weights", {}).get("size")
        ref = BlobRef.from_dict(command.weights)
        # An update is as large as the weights that were offered, or it is no update: nothing of it is fetched.
        if ref.size != expected:
            reason = f"size of the update: expected {expected} bytes, got {ref.size}"
            self._events.append(on.UpdateRejected(command.device, command.round, command.attempt, reason))
            return
        self._ask(self._uploads.add(command.device, command.round, command.attempt, ref, self._monotonic()))
        self._collect_uploads(later=True)

    def _collect_uploads(self, *, later: bool = False) -> None:
        """Turn ended pulls into events; `later` when an event is being handled already."""
        for outcome in self._uploads.outcomes():
            event: on.Event
            if isinstance(outcome, Arrived):
                event = on.UpdateStored(outcome.device, outcome.round, outcome.attempt, outcome.weights)
                self._roster.delivered(outcome.device, self._monotonic())
            else:
                event = on.UpdateRejected(outcome.device, outcome.round, outcome.attempt, outcome.reason)
            if later and self._events:
                self._events.append(event)
            else:
                self._handle(event)

    def _finish(self, command: do.Finish) -> None:
        if not self._finished:
            log.info("job %s is finished: global model %s", self.job.name, command.model)
        self._finished = True
        for device in self.state.devices:
            self._send(device, Finished(self.job.name), self.job.name)

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
        self._ask(self._uploads.tick(now))
        self._collect_uploads()

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

    # What goes out.

    def _send(self, device: str, message: FromServer, job: str | None = None) -> None:
        payload = message.to_bytes()
        topic = self._topics.down(device, job) if job else self._topics.down(device)
        if self._link.publish(topic, payload):
            self._roster.sent(device, len(payload))

    def _ask(self, wants: Wants) -> None:
        for device, want in wants:
            self._send(device, want)

    def _send_chunks(self) -> None:
        for _ in range(_CHUNKS_PER_TURN):
            if self._link.unsent >= _UNSENT_BYTES:
                return
            item = self._downloads.next()
            if item is None:
                return
            device, chunk = item
            if isinstance(chunk, Gone):
                self._send(device, chunk)
            elif self._link.publish(self._topics.down_blob(device), chunk, CHUNK_QOS):
                self._roster.sent(device, len(chunk))

    def _offered(self, device: str) -> set[str]:
        """Digests of what a device may fetch: only what its own offer names."""
        task = self.state.tasks.get(device)
        offer: Mapping[str, Any] = (task.offer if task else None) or {}
        return {v["sha256"] for v in offer.values() if isinstance(v, dict) and "sha256" in v}

    # Housekeeping.

    def _collect_garbage(self) -> None:
        """Delete what earlier rounds needed. Only between rounds: then nobody is about to put the same bytes again."""
        kept = self.state.references() | self._graphs | kept_models(self.state, self._keep)
        for digest in self._garbage - kept:
            self._store.delete(digest)
        self._garbage &= kept


def _plain_name(profile: str) -> str:
    """The name of a profile; a device's word must not become a path on this machine.

    Raises:
        ProfileError: It is none.
    """
    if "/" in profile or profile.endswith((".toml", ".json")):
        raise ProfileError("name of a device's hardware profile", expected="a plain name", got=repr(profile)[:80])
    return profile
