"""A fleet in memory: a link without a network, devices without training, a worker without weights."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy
from msgspec.structs import replace

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import (
    Accepted,
    Birth,
    BlobNotFound,
    BlobRequest,
    BoardWarning,
    Cancelled,
    Death,
    Finished,
    Hello,
    Offer,
    Refusal,
    UpdateAnnouncement,
    UploadRequest,
    UploadResult,
    parse_message,
)
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Pull
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.runnable_job import DeviceServices, RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.messaging.connection import RateLimitedLink
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.monitoring.display import RoundLines
from fedprune_server.observation.observer import TurnEvent
from fedprune_server.observation.snapshot import DeviceSnapshot, JobSnapshot
from fedprune_server.storage.storage import Storage
from support.fakes.tiny_job import ARCHITECTURE, JOB, NAMES

SIZE = 100_000  # bytes of a device's weights: four leaves, in two chunks


def fill(*inputs: object, size: int = SIZE) -> bytes:
    """Bytes that depend on `parts` alone."""
    return hashlib.shake_256(repr(inputs).encode()).digest(size)


class ToyWorker:
    """Carries out commands on bytes that mean nothing, but depend on everything that they should.

    For `graph_rounds` rounds offers name the same graph, and then another one; None for all rounds.
    """

    def __init__(self, store: BlobStore, graph_rounds: int | None = None) -> None:
        self.store = store
        self.graph_rounds = graph_rounds
        self.executed: list[object] = []
        self.poison: set[str] = set()

    def initial(self) -> str:
        return self.store.put(fill("initial")).sha256

    def expect(self, commands: list[do.Command]) -> None:
        pass

    def graph(self, round_: int) -> bytes:
        """The graph of a round's offers."""
        return fill("graph", round_ // self.graph_rounds if self.graph_rounds else 0, size=70_000)

    def execute(self, command: do.Command) -> on.Event:
        self.executed.append(command)
        match command:
            case do.Score():
                return on.Scored(command.round, self.store.put(fill("ranks", command.model, size=50)).sha256)
            case do.Extract():
                basis, device_part = command.basis, command.part
                self.store.read(basis.model)
                weights = self.store.put(fill("part", basis.model, basis.ranking, device_part.device))
                graph = self.store.put(self.graph(basis.round)).to_dict()
                body = {
                    "seed": 1,
                    "architecture": "0" * 64,
                    "selection": "1" * 64,
                    "widths": list(device_part.widths),
                    "classes": 3,
                    "weights": weights.to_dict(),
                    "training": graph,
                    "inference": graph,
                    "recipe": {},
                }
                return on.Extracted(basis.round, device_part.device, device_part.attempt, body)
            case do.FoldUpdate():
                self.store.read(command.contribution.weights)
                device_part = command.contribution.part
                if device_part.device in self.poison:
                    return on.UpdateRejected(
                        device_part.device, command.round, device_part.attempt, "weights are not finite"
                    )
                return on.Folded(device_part.device, command.round, device_part.attempt)
            case do.Close():
                contributions = [(p.part.device, p.weights) for p in command.contributions]
                return on.Closed(command.round, self.store.put(fill("global", command.model, contributions)).sha256)
            case do.Evaluate():
                self.store.read(command.model)
                return on.Evaluated(command.round, {"accuracy": 0.5})
        raise TypeError(command)


class ToyDevice:
    """A device that trains by hashing. Everything that it receives, it may receive twice.

    It trains for `training_s` seconds, which only pass where `turn` is called.
    """

    training_s = 0.0
    ready_at = 0.0

    def __init__(self, name: str, folder: Path, air: Air) -> None:
        self.name = name
        self.air = air
        self.topics = Topics("default")
        self.store = BlobStore(folder / name, durable=False)
        self.session = 1
        self.pulls: dict[str, Pull] = {}
        self.offer: Offer | None = None
        self.pending: UpdateAnnouncement | None = None
        self.heard: list[object] = []
        self.silent = False
        self.abilities: tuple[str, ...] = ()
        self.warnings: tuple[BoardWarning, ...] = ()
        self.profile = "raspberry-pi-5"
        self.samples = 10
        self.upload: Callable[[UploadRequest, bytes], str | None] = lambda request, body: "it can't"
        """Uploads bytes; the reason why it can't."""
        self.lie: Callable[[UpdateAnnouncement], UpdateAnnouncement] = lambda update: update

    def say(self, message: object) -> None:
        self.air.to_server(self.topics.up(self.name), message.to_bytes())  # type: ignore[attr-defined]

    def send_birth(self) -> None:
        self.say(
            Birth(
                self.name,
                self.session,
                self.profile,
                self.samples,
                "test",
                abilities=self.abilities,
                warnings=self.warnings,
            )
        )

    def hear(self, topic: str, payload: bytes) -> None:
        if self.topics.parse(topic).channel == "down/blob":
            chunk = Chunk.parse(payload)
            if chunk.sha256 in self.pulls:
                for want in self.pulls[chunk.sha256].on_chunk(chunk, self.air.now):
                    self.say(want)
                self.train()
            return
        message = parse_message(payload)
        self.heard.append(message)
        if isinstance(message, Hello):
            self.send_birth()
            self.resend()
            for pull in self.pulls.values():
                for want in pull.start(self.air.now):
                    self.say(want)
        elif isinstance(message, Offer) and not self.silent:
            self.take(message)
        elif isinstance(message, BlobNotFound) and self.offer is not None and self.pulls:
            # As boards do: the offer's round is over.
            self.pulls, offer = {}, self.offer
            self.say(Refusal(self.name, offer.job, offer.round, offer.attempt, "a file of it is gone", 30))
        elif isinstance(message, BlobRequest):
            answer = BlobSender(self.store).answer(message)
            if isinstance(answer, BlobNotFound):
                self.say(answer)
                return
            for raw in answer:
                self.air.to_server(self.topics.up_blob(self.name), raw)
        elif isinstance(message, UploadRequest):
            self.say(UploadResult(message.sha256, self.upload(message, self.store.read(message.sha256))))
        elif isinstance(message, Accepted):
            if self.pending is not None and self.pending.weights.sha256 == message.weights:
                self.pending = None
        elif isinstance(message, (Cancelled, Finished)):
            self.pending = None

    def take(self, offer: Offer) -> None:
        if self.offer is not None and (self.offer.round, self.offer.attempt) == (offer.round, offer.attempt):
            self.resend()
            return
        self.offer, self.ready_at = offer, self.air.now + self.training_s
        self.pulls = {}
        for ref in {offer.weights, offer.training, offer.inference}:
            pull = self.pulls[ref.sha256] = Pull(ref, self.store.partial(ref))
            for want in pull.start(self.air.now):
                self.say(want)
        self.train()

    def train(self) -> None:
        offer = self.offer
        if offer is None or not all(p.is_done for p in self.pulls.values()) or not self.pulls:
            return
        if self.air.now < self.ready_at:
            return
        self.pulls = {}
        update = UpdateAnnouncement(
            self.name,
            offer.job,
            offer.round,
            offer.attempt,
            offer.weights.sha256,
            self.store.put(fill("trained", self.store.read(offer.weights.sha256), self.name)),
            10,
            5,
            {"accuracy_after": 0.25},
        )
        self.pending = self.lie(update)
        self.resend()

    def resend(self) -> None:
        if self.pending is not None:
            self.say(self.pending)

    def turn(self) -> None:
        """Time has passed."""
        self.train()

    def die(self) -> None:
        self.say(Death(self.name, self.session))


class Air:
    """The space between server and devices: an in-memory broker that can lose and double what passes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.connected = True
        self.unsent = 0
        self.room = True
        self.full = False
        """Whether nothing is taken to be sent."""
        self.shut: set[str] = set()
        """Devices to which nothing is sent, as they aren't let in any more."""
        self.devices: dict[str, ToyDevice] = {}
        self.inbox: deque[tuple[str, bytes] | ConnectionUp | ConnectionDown] = deque([ConnectionUp()])
        self.doubled = False
        self.lost: list[str] = []
        """Topics of which the next message gets lost."""
        self.on_idle: Callable[[], None] = lambda: None
        self.idle = 0

    def to_server(self, topic: str, payload: bytes) -> None:
        self.inbox.extend([(topic, payload)] * (2 if self.doubled else 1))

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        name = topic.split("/")[3]
        if self.full or name in self.shut:
            return False
        if topic in self.lost:
            self.lost.remove(topic)
            return True  # as whoever sends would think
        for device in list(self.devices.values()) if name == "all" else [self.devices.get(name)]:
            for _ in range(2 if self.doubled else 1):
                if device is not None:
                    device.hear(topic, payload)
        return True

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | ConnectionUp | ConnectionDown | None:
        if self.inbox:
            self.idle = 0
            return self.inbox.popleft()
        self.idle += 1
        self.on_idle()
        return None

    def flush(self, timeout: float) -> bool:
        return True


def quick(folder: Path) -> Storage:
    """A database that doesn't wait for the disk: these tests kill objects, not machines."""
    storage = Storage.open_in(folder)

    storage.database.engine.dispose()
    sqlalchemy.event.listen(
        storage.database.engine, "connect", lambda connection, record: connection.execute("PRAGMA synchronous=OFF")
    )
    return storage


def server_of(jobs: list[tuple[RunnableJob, dict[str, Any]]], air: Any, clock: Callable[[], float]) -> Server:
    """A server of jobs, each with options for its runner, for the connection or for the server."""
    options = {k: v for _, job_options in jobs for k, v in job_options.items()}
    quarantine = options.get("quarantine") or Quarantine(lambda: air.now)
    link = air if "quarantine" in options else RateLimitedLink(air, quarantine)
    packet = {k: options[k] for k in ("max_packet",) if k in options}
    site = SiteLink(link, Topics("default"), quarantine, clock=clock, monotonic=lambda: air.now, **packet)
    runners = []
    for job, job_options in jobs:
        services = DeviceServices(
            **{k: job_options[k] for k in ("rollouts", "members", "crashes", "blobs") if k in job_options}
        )
        runner_options = {k: job_options[k] for k in ("profiles", "max_devices") if k in job_options}
        runners.append(JobRunner(job, site, services, **runner_options))
    return Server(
        runners, site, options.get("broker"), connected_target=options.get("connected", 0),
        observers=options.get("observers", (RoundLines(),)),
    )  # fmt: skip


class Fleet:
    """A server's folder, an air and devices, out of which daemons are made."""

    def __init__(
        self, folder: Path, job: Job = JOB, names: tuple[str, ...] = NAMES, *, graph_rounds: int | None = None
    ) -> None:
        self.folder = folder
        self.job = job
        self.air = Air()
        self.clock: Callable[[], float] | None = None
        """Of daemons; by default the air's."""
        self.store = BlobStore(folder / "blobs", durable=False)
        self.worker = ToyWorker(self.store, graph_rounds)
        self.storage = quick(folder)
        for name in names:
            self.air.devices[name] = ToyDevice(name, folder / "devices", self.air)

    def daemon(self, **options: Any) -> Server:
        """A server on what the folder holds, as a new process would make it."""
        state = self.storage.load()
        if state is None:
            state = State(model=self.worker.initial())
            self.storage.save(state, (), 0.0)
        job = RunnableJob(
            self.job, ARCHITECTURE, state, self.storage, self.store, self.worker,
            **{k: options.pop(k) for k in ("keep", "pulls", "frozen") if k in options},
        )  # fmt: skip
        return server_of([(job, options)], self.air, self.clock or (lambda: self.air.now))

    def run(self, **options: Any) -> State:
        """Run a daemon until its job is done, letting time pass only when nothing else can happen."""
        return self.run_daemon(self.daemon(**options))

    def run_daemon(self, daemon: Server) -> State:
        """The same for one that `daemon` made."""

        def idle() -> None:
            # The worker's thread is real: let it answer before the clock moves.
            if daemon.is_busy:
                time.sleep(0.0005)
                return
            self.air.now += 0.5
            if self.air.now > 10_000:
                raise TimeoutError("the job doesn't come to an end")
            for device in self.air.devices.values():
                device.turn()

        self.air.on_idle = idle
        daemon.run(until_finished=True)
        return daemon.main_runner.state

    def restart(self) -> None:
        """What a new process of the server finds: its folder, and a new connection."""
        self.storage = quick(self.folder)
        self.worker = ToyWorker(self.store, self.worker.graph_rounds)
        self.air.inbox = deque([ConnectionUp()])


def counted_devices(state: State) -> list[list[str]]:
    """Per round the devices that counted."""
    return [[n for n, d in r["devices"].items() if d["progress"] == "folded"] for r in state.history]


def models(state: State) -> list[str]:
    """Digests of the models of a job's rounds."""
    return [summary["model"] for summary in state.history]


def larger(update: UpdateAnnouncement) -> UpdateAnnouncement:
    """An update that claims to be larger than what was offered."""
    ref = update.weights
    return replace(update, weights=BlobRef(ref.sha256, ref.size + 1, ref.leaves))


class Watcher:
    """Observes jobs for a test: their snapshots after the latest turn, and all that has happened."""

    def __init__(self, on_event: Callable[[JobSnapshot, Any], None] = lambda snapshot, what: None) -> None:
        self.jobs: dict[str, JobSnapshot] = {}
        self.events: list[TurnEvent] = []
        self._on_event = on_event

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self.jobs[snapshot.name] = snapshot
        self.events += events
        for event in events:
            self._on_event(snapshot, event.payload)

    @property
    def devices(self) -> Mapping[str, DeviceSnapshot]:
        """The devices of the only job."""
        (snapshot,) = self.jobs.values()
        return snapshot.devices
