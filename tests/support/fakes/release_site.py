"""A server that offers releases and a board that takes them, in memory: processes are functions, the disk is real."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import FedpruneError
from fedprune.releases.release import FILES, MANIFEST, SIGNATURE, Release
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import COMMITTED, REFUSED, ROLLED_BACK, ReleaseOffer, ReleaseReport, ReleaseWithdrawn
from fedprune.wire.messages import Birth, BlobNotFound, BlobRequest, parse_message
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune_device.launcher.launcher import SlotExit, run_service
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore
from fedprune_device.launcher.state import STABLE, LauncherState
from fedprune_device.network.connection import BoardConnection, MessageChannel, ReceivedMessage
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_device.releases.release_agent import ReleaseAgent
from fedprune_device.releases.release_trial import ReleaseTrial
from fedprune_device.releases.watchdog import Watchdog
from support.fakes.runtime_releases import PUBLIC, versions_in

TOPICS = Topics("site")
SHARED = "VERSION = any"
"""The first line of files that several releases have."""

ENDS = (COMMITTED, ROLLED_BACK, REFUSED)


def healthy(_: Path | None) -> None:
    """Nothing is wrong."""


class ReleaseServer:
    """Offers one release after the other, each until it has ended on the board, and serves their files."""

    def __init__(self, folder: Path, *releases: Path) -> None:
        self.store = BlobStore(folder)
        self.offers = [self.offer(r) for r in releases]
        self.inbox: deque[Any] = deque()
        self.reports: list[ReleaseReport] = []
        self.wants = 0
        self.requested = set[str]()
        self.mangle: Callable[[bytes], list[bytes]] = lambda raw: [raw]

    def offer(self, release: Path, **changes: Any) -> ReleaseOffer:
        manifest = (release / MANIFEST).read_bytes()
        release_manifest = Release.from_bytes(manifest)
        refs = [self.store.put((release / FILES / f.sha256).read_bytes()) for f in release_manifest.files]
        values = {
            "number": release_manifest.number,
            "manifest": manifest.decode(),
            "signature": (release / SIGNATURE).read_bytes().hex(),
            "leaves": tuple(r.leaves for r in refs),
            "attempts": 3,
            "seconds": 300.0,
        }
        return ReleaseOffer(**{**values, **changes})

    def final_report(self, number: int) -> ReleaseReport | None:
        return next((r for r in self.reports if r.number == number and r.state in ENDS), None)

    @property
    def done(self) -> bool:
        return all(self.final_report(o.number) for o in self.offers)

    def connect(self) -> None:
        """The board's process is another, or its connection is."""
        self.inbox.clear()
        self.inbox.append(ConnectionUp())

    def say(self, message: Any) -> None:
        self.inbox.extend((TOPICS.down("d"), raw) for raw in self.mangle(message.to_bytes()))

    def get(self, timeout: float | None = 0.0) -> Any:
        return self.inbox.popleft() if self.inbox else None

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        message = parse_message(payload)
        if isinstance(message, ReleaseReport):
            self.reports.append(message)
            if message.state in ENDS:
                self.next()
        elif isinstance(message, Birth):
            self.next()
        elif isinstance(message, BlobRequest):
            self.wants += 1
            self.requested.add(message.sha256)
            answer = BlobSender(self.store).answer(message)
            if hasattr(answer, "__iter__"):
                for chunk in answer:
                    self.inbox.extend((TOPICS.down_blob("d"), raw) for raw in self.mangle(chunk))
            else:
                self.say(answer)
        return True

    def next(self) -> None:
        left = [o for o in self.offers if not self.final_report(o.number)]
        if left:
            self.say(left[0])


class Board:
    """A board that boots, runs what its launcher starts, and takes what its server offers."""

    def __init__(self, root: Path, server: ReleaseServer, crashes: int = 3, why: str = "exit code 1") -> None:
        self.home = SlotStore(root)
        self.server = server
        self.crashes = crashes
        self.end = SlotExit(why)
        self.health: Callable[[Path | None], None] = healthy
        self.ran: list[int] = []
        self.is_quiet: Callable[[], bool] = lambda: True
        self.now = 0.0
        self.until: Callable[[], bool] = lambda: False

    def run_until_idle(self, starts: int = 40) -> None:
        """Start the service until its server has nothing more to offer."""
        for _ in range(starts):
            run_service(self.home, self.run)
            if self.server.done or self.until():
                return
        raise AssertionError(f"the board never comes to rest: {self.server.reports[-3:]}")

    def run(self, slot: str, record: SlotRecord, state: LauncherState | None) -> SlotExit:
        assert versions_in(self.home.root / slot) - {SHARED} == {f"VERSION = {record.version}"}, (
            "two versions are mixed"
        )
        self.ran.append(record.version)
        trial = ReleaseTrial.current({"FEDPRUNE_ROOT": str(self.home.root), "FEDPRUNE_SLOT": slot})
        if trial is not None:
            if record.version == self.crashes and self.health is healthy:
                return self.end
            try:
                trial.check(lambda: (self.health if record.version == self.crashes else healthy)(None))
            except FedpruneError:
                return SlotExit("ended with exit code 51")
        self.serve(trial, slot)
        return SlotExit("restarted", 0)

    def serve(self, trial: ReleaseTrial | None = None, slot: str = "a") -> None:
        """The process: the agent's loop, as far as releases go."""
        self.server.connect()
        connection = BoardConnection(self.server, MessageChannel("d", "site"))
        installer = ReleaseInstaller(self.home.root, PUBLIC, running_slot=slot)
        releases = ReleaseAgent(connection, installer, clock=lambda: self.now)
        heart = Watchdog(trial, tell=lambda _: None, interval=0, clock=lambda: self.now)
        for _ in range(100_000):
            heart.turn()
            match item := connection.receive():
                case ConnectionUp():
                    heart.on_connect()
                    connection.send(Birth("d", 1, "p", 1, "s"))
                    releases.on_birth()
                case Chunk() as chunk:
                    releases.on_chunk(chunk)
                case ReceivedMessage(ReleaseOffer() | ReleaseWithdrawn() as message):
                    releases.on_message(message)
                case ReceivedMessage(BlobNotFound(sha256)):
                    releases.on_blob_not_found(sha256)
            if item is None and not self.server.inbox:
                self.now += 0.2
                time.sleep(0.0002)  # the thread that unpacks is real
            if releases.turn(quiet=self.is_quiet()) or self.until():
                return
            if self.server.done and (state := self.home.load()) is not None and state.phase == STABLE:
                return
        raise AssertionError(f"the process never ends: {self.server.reports[-3:]}")
