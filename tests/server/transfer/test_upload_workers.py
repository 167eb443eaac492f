"""Upload workers take in updates for the server: to the same models, whoever dies, and whatever they say."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.wire.link import Link
from fedprune.wire.messages import TO, BlobRequest
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender
from fedprune_server.app import upload_workers
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.devices.quarantine import BURST, BYTES_PER_POINT, Quarantine
from fedprune_server.process.child_process import MAX_SHORT_RUNS
from fedprune_server.transfer.upload_workers.child import MOST_NAMES, Receiving
from fedprune_server.transfer.upload_workers.messages import (
    MAX_LINE,
    Asks,
    Beat,
    Begin,
    Fetch,
    Took,
    ToServer,
    ToWorker,
    line,
    parse_line,
    read,
)
from fedprune_server.transfer.upload_workers.workers import UploadWorker, UploadWorkers
from fedprune_server.transfer.uploads import Arrived, FailedUpload, Uploads
from support.fakes.fleet import Air, Fleet
from support.processes.machine import find_mosquitto, free_port

DIGEST = "ab" * 32


class Played(UploadWorker):
    """An upload worker without a process: all that it is told and says is written and read as between processes."""

    def __init__(self, number: int, folder: Path, now: Callable[[], float]) -> None:
        super().__init__(lambda tag: pytest.fail(tag), lambda: None)
        self.number, self.folder, self.now = number, folder, now
        self.life = 0
        self.receiving: Receiving | None = None
        self.said: deque[bytes] = deque()
        self.all_said: list[ToWorker | ToServer] = []
        self.ticked = 0.0

    @property
    def alive(self) -> bool:
        return self.receiving is not None

    def start(self, now: float) -> bool:
        self.life += 1
        self.tag, self.load = f"{self.number:08x}{self.life:08x}", 0
        uploads = Uploads(BlobStore(self.folder, durable=False), 2)
        self.receiving = Receiving(uploads, "default", lambda word: self.said.append(line(word)), self.now)
        return True

    def send(self, word: ToWorker) -> None:
        if self.receiving is not None:
            self.receiving.order(parse_line(line(word)))

    def hear(self, topic: str, payload: bytes) -> None:
        """Take in what was published, if it is for this one."""
        if self.receiving is not None and topic.endswith("/" + self.tag):
            self.receiving.receive(topic, payload)

    def received(self, now: float) -> Iterator[ToWorker | ToServer]:
        if self.receiving is not None and now - self.ticked >= 0.5:
            self.ticked = now
            self.receiving.tick(up=True)
        while self.said:
            word = parse_line(self.said.popleft())
            self.all_said.append(word)
            yield word

    def stop(self) -> None:
        self.receiving = None
        self.said.clear()


class HelpedAir(Air):
    """An air in which workers listen, too."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[Played] = []
        self.chunks = 0
        self.on_chunk: Callable[[int], None] = lambda count: None

    def to_server(self, topic: str, payload: bytes) -> None:
        if "/up/" not in topic or topic.endswith("/up/blob"):
            super().to_server(topic, payload)
            return
        self.chunks += 1
        self.on_chunk(self.chunks)
        for _ in range(2 if self.doubled else 1):
            for worker in self.workers:
                worker.hear(topic, payload)


class Helped:
    """A fleet with workers."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.fleet = Fleet(folder)
        self.air = HelpedAir()
        self.air.devices = self.fleet.air.devices
        for device in self.air.devices.values():
            device.air = self.air
        self.fleet.air = self.air
        self.uploads = UploadWorkers(
            self.fleet.store, lambda tag: pytest.fail(tag), 0, lambda: None, lambda: self.air.now, 2
        )
        self.air.workers = [Played(i, folder / "blobs", lambda: self.air.now) for i in range(count)]
        self.uploads._workers = list(self.air.workers)
        self.uploads._news.is_set = lambda: True  # type: ignore[method-assign]

    def run(self) -> State:
        with self.uploads:
            return self.fleet.run(uploads=self.uploads)

    def stored(self) -> list[Arrived]:
        return [w for r in self.air.workers for w in r.all_said if isinstance(w, Arrived)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> State:
    """How a job ends without workers."""
    return Fleet(tmp_path_factory.mktemp("alone")).run()


@pytest.fixture
def helped(tmp_path: Path) -> Helped:
    return Helped(tmp_path)


@pytest.mark.slow
def test_a_job_with_upload_workers_ends_in_the_same_models(helped: Helped, expected: State) -> None:
    state = helped.run()
    assert [r["model"] for r in state.history] == [r["model"] for r in expected.history]
    assert len(helped.stored()) == 9  # three devices, three rounds
    assert all(r.all_said for r in helped.air.workers)  # each has its part
    assert {r.load for r in helped.air.workers} == {0}


def test_what_upload_workers_take_in_counts_as_devices_bytes(helped: Helped) -> None:
    helped.run()
    ups = [up for _, up in helped.fleet.storage.traffic().values()]
    assert min(ups) > 3 * 100_000


def test_boards_that_know_no_upload_workers_are_served_as_ever(helped: Helped, expected: State) -> None:
    helped.air.devices["a"].abilities = None
    assert helped.run().model == expected.model
    assert {s.device for s in helped.stored()} == {"b", "c"}


def test_messages_that_come_twice_change_nothing(helped: Helped, expected: State) -> None:
    helped.air.doubled = True
    assert helped.run().model == expected.model


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_upload_worker_that_dies_midway_costs_nothing(helped: Helped, expected: State, at: int) -> None:
    def chunk(count: int) -> None:
        if count == at:
            for worker in helped.air.workers[:1] if at % 2 else helped.air.workers:
                worker.stop()

    helped.air.on_chunk = chunk
    state = helped.run()
    assert state.model == expected.model
    for summary in state.history:
        assert [d["progress"] for d in summary["devices"].values()] == ["folded"] * 3
    assert max(r.life for r in helped.air.workers) == 2


def test_upload_workers_that_never_start_leave_the_rest_to_the_server(helped: Helped, expected: State) -> None:
    for worker in helped.air.workers:
        worker.start = lambda now: False  # type: ignore[method-assign]
    assert helped.run().model == expected.model
    assert helped.stored() == []


# What an upload worker says counts only for what it was given.


@pytest.fixture
def pair(helped: Helped) -> Iterator[tuple[UploadWorkers, Played, BlobRef]]:
    with helped.uploads as uploads:
        ref = BlobStore(helped.fleet.folder / "elsewhere", durable=False).put(b"w" * (3 * LEAF))
        uploads.born("a", 7, 0.0, 0.0, (TO,))
        worker = helped.air.workers[0]
        assert uploads.add("a", 1, 1, ref, 0.0) == []
        yield uploads, worker, ref


def test_wants_name_the_upload_worker(pair: tuple[UploadWorkers, Played, BlobRef]) -> None:
    uploads, worker, ref = pair
    wants = uploads.collect(0.0)
    assert [(d, w.sha256, w.to) for d, w in wants] == [("a", ref.sha256, worker.tag)]


@pytest.mark.parametrize(
    "word",
    [
        Arrived("a", 1, 2, DIGEST), Arrived("a", 2, 1, DIGEST), Arrived("b", 1, 1, DIGEST), Arrived("a", 1, 1, DIGEST),
        FailedUpload("a", 1, 2, "no", "gone"), FailedUpload("b", 1, 1, "no", "gone"),
        Asks("a", DIGEST, "data", 0, 1, None),
    ],
    ids=lambda w: str(w)[:60],
)  # fmt: skip
def test_what_is_not_of_its_part_is_dropped(pair: tuple[UploadWorkers, Played, BlobRef], word: ToServer) -> None:
    uploads, worker, ref = pair
    uploads.collect(0.0)
    worker.said.append(line(word))
    assert uploads.collect(0.0) == []
    assert uploads.outcomes() == []
    assert uploads.fetching("a", 1, 1, ref)


def test_what_another_upload_worker_says_of_it_is_dropped(
    helped: Helped, pair: tuple[UploadWorkers, Played, BlobRef]
) -> None:
    uploads, _, _ = pair
    uploads.collect(0.0)
    helped.air.workers[1].said.append(line(FailedUpload("a", 1, 1, "no", "gone")))
    uploads.collect(0.0)
    assert uploads.outcomes() == []


def test_an_update_that_isn_t_there_is_fetched_by_the_server(pair: tuple[UploadWorkers, Played, BlobRef]) -> None:
    uploads, worker, ref = pair
    uploads.collect(0.0)
    worker.said.append(line(Arrived("a", 1, 1, ref.sha256)))
    wants = uploads.collect(0.0)
    assert [(d, w.sha256, w.to) for d, w in wants] == [("a", ref.sha256, None)]
    assert uploads.outcomes() == []


def test_one_that_is_gone_or_dropped_ends(pair: tuple[UploadWorkers, Played, BlobRef]) -> None:
    uploads, worker, ref = pair
    assert uploads.devices() == ["a"]
    assert uploads.digests() == {ref.sha256}
    assert uploads.progress("a") == (0, 3)
    uploads.gone("a", ref.sha256, 0.0)
    assert [type(o) for o in uploads.outcomes()] == [FailedUpload]
    uploads.add("a", 1, 2, ref, 0.0)
    assert uploads.keep("a", 1, 2) == []
    assert uploads.keep("a", 1, 3) == [ref.sha256]
    assert uploads.devices() == []
    assert worker.load == 0


def test_the_same_blob_goes_to_the_same_upload_worker_and_others_elsewhere(
    helped: Helped, pair: tuple[UploadWorkers, Played, BlobRef]
) -> None:
    uploads, _, ref = pair
    for name in "bc":
        uploads.born(name, 1, 0.0, 0.0, (TO,))
    uploads.add("b", 1, 1, ref, 0.0)
    uploads.add("c", 1, 1, BlobRef(DIGEST, LEAF, DIGEST), 0.0)
    assert [r.load for r in helped.air.workers] == [2 * ref.size, LEAF]


def test_a_board_that_was_set_back_to_an_older_version_is_fetched_from_by_the_server(
    pair: tuple[UploadWorkers, Played, BlobRef],
) -> None:
    uploads, worker, ref = pair
    wants = uploads.born("a", 8, 0.0, 0.0, ())
    assert [w.to for _, w in wants] == [None]
    assert uploads.fetching("a", 1, 1, ref)
    assert worker.load == 0


# What an upload worker does with what comes.


def test_chunks_that_nobody_asked_for_are_counted_and_not_looked_at(tmp_path: Path) -> None:
    said: list[ToServer] = []
    store = BlobStore(tmp_path, durable=False)
    receiving = Receiving(Uploads(store), "default", said.append, lambda: 0.0)
    topic = Topics("default").up_to("a", "0" * 16)
    for _ in range(3):
        receiving.receive(topic, b"x" * 1000)
    for number in range(2 * MOST_NAMES):
        receiving.receive(Topics("default").up_to(f"d{number}", "0" * 16), b"x")
    receiving.receive("something/else", b"x")
    receiving.tick(up=True)
    assert said[0] == Took("a", 3000, 0)
    assert len(said) == MOST_NAMES + 1
    assert said[-1] == Beat(1)


def test_who_floods_a_upload_worker_is_put_into_quarantine_and_the_others_go_on(helped: Helped) -> None:
    air, flood = helped.air, b"x" * int(BURST * BYTES_PER_POINT)
    air.devices["c"].silent = True
    quarantine = Quarantine(lambda: air.now + 1.0)

    def chunk(count: int) -> None:
        if count == 1:
            for _ in range(2):
                air.workers[0].hear(Topics("default").up_to("c", air.workers[0].tag), flood)

    air.on_chunk = chunk
    with helped.uploads:
        state = helped.fleet.run(uploads=helped.uploads, quarantine=quarantine)
    rows = quarantine.rows()
    assert rows["c"]["times"] >= 1
    assert "the server didn't ask for" in rows["c"]["reason"]
    assert set(rows) == {"c"}
    first = {n: d["progress"] for n, d in state.history[0]["devices"].items()}
    assert (first["a"], first["b"]) == ("folded", "folded")


# Words.

WORDS = [
    Begin("mqtt://h", "s", "0" * 16, "/b", 4, 131072, None, None, None, 0, 1),
    Fetch("a", 1, 2, BlobRef(DIGEST, 9, DIGEST), None, 0.5),
    Asks("a", DIGEST, "data", 0, 3, None), Arrived("a", 1, 2, DIGEST), FailedUpload("a", 1, 2, "because", "malformed"),
    Took("a", 7, 1), Beat(0),
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS, ids=lambda w: w.kind)
def test_words_are_read_back_and_checked(word: ToWorker | ToServer) -> None:
    assert parse_line(line(word)) == word
    body = json.loads(line(word))
    for key in body:
        for wrong in ({k: v for k, v in body.items() if k != key}, {**body, key: [[1]]}):
            with pytest.raises(ProtocolError):
                parse_line(json.dumps(wrong).encode() + b"\n")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_word_are_one_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_line(raw + b"\n")


def test_a_line_without_end_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="4096 bytes"):
        read(io.BytesIO(b"x" * (2 * MAX_LINE)))
    assert read(io.BytesIO(b"")) is None


def test_upload_workers_with_a_bucket_or_several_jobs_are_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="upload_workers"):
        ServerConfig(blobs="s3://bucket/prefix", upload_workers=2)
    with pytest.raises(ConfigError, match="upload_workers"):
        ServerConfig(upload_workers=65)
    nothing: tuple[None, ...] = (None, None, None)
    with pytest.raises(ConfigError, match="several jobs"):
        upload_workers(ServerConfig(upload_workers=1), *nothing, jobs=2).__enter__()
    with upload_workers(ServerConfig(), *nothing, jobs=2) as workers:
        assert workers is None


# Its process.


def begin(store: BlobStore, port: int) -> Callable[[str], Begin]:
    url = f"mqtt://127.0.0.1:{port}"
    return lambda tag: Begin(url, "default", tag, str(store.root), 4, 131072, None, None, None, 0, os.getpid())


@pytest.mark.slow
def test_a_process_that_cannot_begin_is_left_alone_for_a_while(tmp_path: Path) -> None:
    def broken(tag: str) -> Begin:
        made = begin(BlobStore(tmp_path), 1)(tag)
        object.__setattr__(made, "parent", -1)
        return made

    worker = UploadWorker(broken, lambda: None)
    for turn in range(MAX_SHORT_RUNS):
        assert worker.start(float(turn))
        until = time.monotonic() + 20
        while worker.alive and time.monotonic() < until:
            list(worker.received(float(turn)))
            time.sleep(0.01)
        assert not worker.alive
    assert not worker.start(10.0)
    assert UploadWorker(begin(BlobStore(tmp_path), 1), lambda: None).pid is None


@pytest.mark.slow
@pytest.mark.mosquitto
def test_a_upload_worker_s_process_takes_in_an_update_and_a_new_one_goes_on_after_kill_9(tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / "mosquitto.conf"
    configuration.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    broker = subprocess.Popen([find_mosquitto(), "-c", str(configuration)], stderr=subprocess.DEVNULL)
    store, board = BlobStore(tmp_path / "server"), BlobStore(tmp_path / "board", durable=False)
    ref = board.put(os.urandom(40 * LEAF + 5))
    link = Link(f"mqtt://127.0.0.1:{port}", "board")
    topics = Topics("default")
    asked: dict[str | None, list[BlobRequest]] = {}
    killed = 0
    try:
        link.start(patient=True)
        with UploadWorkers(store, begin(store, port), 1, link.wake, time.monotonic) as uploads:
            uploads.born("a", 1, 0.0, time.monotonic(), (TO,))
            wants = uploads.add("a", 1, 1, ref, time.monotonic())
            until, outcomes = time.monotonic() + 30, uploads.outcomes()
            while not outcomes and time.monotonic() < until:
                link.get(0.1)
                wants += uploads.collect(time.monotonic())
                for _, want in wants if link.connected else ():
                    asked.setdefault(want.to, []).append(want)
                    chunks = [c for c in BlobSender(board).answer(want) if isinstance(c, bytes)]
                    for chunk in chunks if killed or want.part == "leaves" else chunks[:1]:
                        link.publish(topics.up_to("a", want.to), chunk, 0)
                wants = [] if link.connected else wants
                if not killed and uploads.progress("a") not in (None, (0, 41)):
                    killed = uploads.workers[0].pid or 0
                    os.kill(killed, signal.SIGKILL)
                outcomes = uploads.outcomes()
            taken = uploads.taken()
            last = uploads.workers[0].pid
    finally:
        link.close()
        broker.kill()
        broker.wait()
    assert outcomes == [Arrived("a", 1, 1, ref.sha256)]
    assert store.read(ref.sha256) == board.read(ref.sha256)
    assert len(asked) == 2
    assert None not in asked
    first, second = asked.values()
    assert min(w.first for w in first if w.part == "data") == 0
    assert {w.part for w in second} == {"data"}
    assert min(w.first for w in second) == 3  # what had come is there
    assert sum(size for device, size in taken if device == "a") > ref.size
    assert not Path(f"/proc/{last}").exists()
