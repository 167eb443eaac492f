"""Updates on their way to the server, of which other processes take in those of boards that know how.

The server alone talks to boards: it hands an announced update to an upload worker, signs and sends that one's requests,
and learns when the update is on the disk. A worker's messages are checked, and count only for what it was given. When
one dies, its unfinished updates are given to another one, or fetched by the server itself, from where they were.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.chunk import MAX_PACKET
from fedprune.wire.messages import TO, BlobRequest
from fedprune_server.process.child_process import ChildProcess, RestartedProcess
from fedprune_server.transfer.upload_workers.messages import (
    Asks,
    Beat,
    Begin,
    Born,
    Drop,
    Fetch,
    Interrupted,
    There,
    Took,
    ToServer,
    ToWorker,
    line,
    read,
)
from fedprune_server.transfer.uploads import LOST, Arrived, FailedUpload, Outcome, Uploads, Wants

log = logging.getLogger("fedprune.server")

SILENT_S = 30.0
"""An upload worker that has sent nothing for so long, or has had no connection, is ended and started again."""

_STOP_S = 5.0
_NAME = "an upload worker"
_COMMAND = (sys.executable, "-m", "fedprune_server.transfer.upload_workers.child")


class UploadWorker:
    """An upload worker's process. Each new one has its own tag, so that messages to the previous one are ignored.

    Args:
        begin: Makes the first message to a process with a tag.
        wake: Called from another thread when it has sent a message.
    """

    def __init__(self, begin: Callable[[str], Begin], wake: Callable[[], None]) -> None:
        self._begin = begin

        def start() -> ChildProcess[ToWorker | ToServer]:
            return ChildProcess(_COMMAND, _NAME, read, wake=wake)

        self._child = RestartedProcess(start, _NAME, stop_s=_STOP_S)
        self.tag = ""
        self.load = 0
        """Bytes of updates that it still has to fetch."""
        self._heard = 0.0

    @property
    def alive(self) -> bool:
        return self._child.alive

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def start(self, now: float) -> bool:
        """Start the process, unless it exists or has ended too often lately; returns whether it was started."""
        started = self._child.start(self._first, now)
        if started:
            self._heard = now
        return started

    def send(self, message: ToWorker) -> None:
        """Send it a message, without waiting."""
        self._child.send(line(message))

    def received(self, now: float) -> Iterator[ToWorker | ToServer]:
        """Its messages since the last call. One that was silent for too long is ended."""
        for message in self._child.received(now):
            if not isinstance(message, Beat) or message.up:
                self._heard = now
            yield message
        if self.alive and now - self._heard > SILENT_S:
            why = f"it sent nothing, or had no connection to the broker, for {SILENT_S:.0f} s"
            self._child.kill(now, why)

    def stop(self) -> None:
        """End the process; may be called twice."""
        self._child.stop()

    def _first(self) -> bytes:
        self.tag, self.load = secrets.token_hex(8), 0
        return line(self._begin(self.tag))


@dataclass
class _Given:
    round: int
    attempt: int
    ref: BlobRef
    worker: UploadWorker
    leaves: int = 0


class UploadWorkers(Uploads):
    """Receives updates by upload workers. Use it as a context, in which their processes run.

    Args:
        store: Store of updates, in a folder that the workers share.
        begin: Makes the first message to a worker with a tag.
        wake: Called from another thread when there is something to collect.
        clock: A monotonic clock, in seconds, as is every `now` here.
        concurrent: Number of devices from which the server itself, and each worker, pulls at a time.
        max_packet: Maximum length of an MQTT packet that the broker accepts, in bytes.
    """

    def __init__(
        self,
        store: BlobStore,
        begin: Callable[[str], Begin],
        count: int,
        wake: Callable[[], None],
        clock: Callable[[], float],
        concurrent: int = 4,
        max_packet: int = MAX_PACKET,
    ) -> None:
        super().__init__(store, concurrent, max_packet)
        self._blobs = store
        self._clock = clock
        self._wake = wake
        self._news = threading.Event()
        self._workers = [UploadWorker(begin, self._spoke) for _ in range(count)]
        self._given: dict[str, _Given] = {}
        self._by_blob: dict[str, UploadWorker] = {}
        self._fetchers = Counter[str]()
        self._able: set[str] = set()
        self._births: dict[str, tuple[int, float]] = {}
        self._told: set[str] = set()
        self._ended: list[Outcome] = []
        self._taken: list[tuple[str, int]] = []
        self._look_at = 0.0
        self._stored = 0

    @property
    def workers(self) -> Sequence[UploadWorker]:
        return self._workers

    def __enter__(self) -> UploadWorkers:
        for worker in self._workers:
            worker.start(self._clock())
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        log.info("upload workers took in %d updates", self._stored)

    def add(self, device: str, round_: int, attempt: int, ref: BlobRef, now: float) -> Wants:
        if not self.fetching(device, round_, attempt, ref):
            self.drop(device)
            worker = self._choose(device, ref)
            if worker is not None:
                self._give(device, _Given(round_, attempt, ref, worker))
        if device in self._given:
            return self.heard(device, now)
        return super().add(device, round_, attempt, ref, now)

    def heard(self, device: str, now: float) -> Wants:
        given = self._given.get(device)
        if given is not None and device not in self._told:
            given.worker.send(There(device))
            self._told.add(device)
        return super().heard(device, now)

    def gone(self, device: str, sha256: str, now: float) -> Wants:
        given = self._given.get(device)
        if given is None or given.ref.sha256 != sha256:
            return super().gone(device, sha256, now)
        self.drop(device)
        self._ended.append(FailedUpload(device, given.round, given.attempt, LOST, FailureKind.GONE.value))
        return []

    def interrupted(self, now: float) -> None:
        super().interrupted(now)
        self._told.clear()
        for worker in self._workers:
            if worker.alive:
                worker.send(Interrupted())

    def born(self, device: str, session: int, answer_s: float, now: float, abilities: Collection[str] = ()) -> Wants:
        """A device announces itself; whether workers can fetch from it, it says there."""
        self._births[device] = session, answer_s
        wants, given = super().born(device, session, answer_s, now, abilities), self._given.get(device)
        if TO in abilities:
            self._able.add(device)
            if given is not None:
                given.worker.send(Born(device, session, answer_s))
            return wants
        self._able.discard(device)
        if given is None:
            return wants
        self.drop(device)
        return wants + super().add(device, given.round, given.attempt, given.ref, now)

    def drop(self, device: str) -> list[str]:
        given = self._take_back(device)
        if given is None:
            return super().drop(device)
        given.worker.send(Drop(device))
        return [given.ref.sha256]

    def keep(self, device: str, round_: int, attempt: int) -> list[str]:
        given = self._given.get(device)
        if given is None:
            return super().keep(device, round_, attempt)
        return [] if (given.round, given.attempt) == (round_, attempt) else self.drop(device)

    def fetching(self, device: str, round_: int, attempt: int, ref: BlobRef) -> bool:
        given = self._given.get(device)
        if given is None:
            return super().fetching(device, round_, attempt, ref)
        return (given.round, given.attempt, given.ref) == (round_, attempt, ref)

    def devices(self) -> list[str]:
        return [*super().devices(), *self._given]

    def digests(self) -> set[str]:
        return super().digests() | {g.ref.sha256 for g in self._given.values()}

    def outcomes(self) -> list[Outcome]:
        ended, self._ended = self._ended, []
        return ended + super().outcomes()

    def progress(self, device: str) -> tuple[int, int] | None:
        given = self._given.get(device)
        return super().progress(device) if given is None else (given.leaves, given.ref.leaf_count)

    def taken(self) -> list[tuple[str, int]]:
        taken, self._taken = self._taken, []
        return taken

    def collect(self, now: float) -> Wants:
        """Take in what workers say, and start those again that have ended."""
        if not self._news.is_set() and now < self._look_at:
            return []
        self._news.clear()
        self._look_at = now + 1.0
        wants: Wants = []
        for worker in self._workers:
            tag = worker.tag
            for message in worker.received(now):
                wants += self._hear(worker, tag, message, now)
            if not worker.alive:
                worker.start(now)
                wants += self._give_anew(worker, now)
        return wants

    def _spoke(self) -> None:
        """An upload worker has said something; asked from its reader's thread."""
        if not self._news.is_set():
            self._news.set()
            self._wake()

    def _hear(self, worker: UploadWorker, tag: str, message: ToWorker | ToServer, now: float) -> Wants:
        if isinstance(message, Took):
            self._taken.append((message.device, message.size))
            given = self._given.get(message.device)
            if given is not None and given.worker is worker:
                given.leaves = min(message.leaves, given.ref.leaf_count)
            return []
        if not isinstance(message, (Asks, Arrived, FailedUpload)):
            return []
        device, given = message.device, self._given.get(message.device)
        if given is None or given.worker is not worker:
            return []  # it was dropped meanwhile, or is another's
        sha256 = given.ref.sha256
        if isinstance(message, Asks):
            ask = BlobRequest(sha256, message.part, message.first, message.count, None, message.most, None, tag)
            return [(device, ask)] if message.sha256 == sha256 else []
        if (message.round, message.attempt) != (given.round, given.attempt):
            return []
        if isinstance(message, Arrived):
            if message.weights != sha256:
                return []
            if not self._blobs.has(sha256) or self._blobs.size(sha256) != given.ref.size:
                log.error("an upload worker says that it stored %s, which isn't there: fetched again", sha256)
                self._take_back(device)
                return super().add(device, given.round, given.attempt, given.ref, now)
            self._stored += 1
        self._take_back(device)
        self._ended.append(message)
        return []

    def _choose(self, device: str, ref: BlobRef) -> UploadWorker | None:
        """Who fetches a device's update: whoever fetches the same blob, so that no two write it, or has least to do."""
        if device not in self._able:
            return None
        same = self._by_blob.get(ref.sha256)
        if same is not None and same.alive:
            return same
        return min((r for r in self._workers if r.alive), key=lambda r: r.load, default=None)

    def _give(self, device: str, given: _Given) -> None:
        session, answer_s = self._births.get(device, (None, 0.0))
        self._given[device] = given
        self._by_blob[given.ref.sha256] = given.worker
        self._fetchers[given.ref.sha256] += 1
        given.worker.load += given.ref.size
        given.worker.send(Fetch(device, given.round, given.attempt, given.ref, session, answer_s))
        self._told.add(device)

    def _take_back(self, device: str) -> _Given | None:
        given = self._given.pop(device, None)
        if given is not None:
            given.worker.load -= given.ref.size
            self._fetchers[given.ref.sha256] -= 1
            if not self._fetchers[given.ref.sha256]:
                del self._fetchers[given.ref.sha256], self._by_blob[given.ref.sha256]
        return given

    def _give_anew(self, dead: UploadWorker, now: float) -> Wants:
        """What an upload worker had under way as it died is given to others, in the same order."""
        mine = {n: g for n, g in self._given.items() if g.worker is dead}
        for device in mine:
            self._take_back(device)
        dead.load = 0
        wants: Wants = []
        for device, given in mine.items():
            wants += self.add(device, given.round, given.attempt, given.ref, now)
        return wants
