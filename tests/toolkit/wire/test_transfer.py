import random
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest, parse_message
from fedprune.wire.transfer import MAX_TRIES, WIDE_WINDOW_LEAVES, WINDOW_LEAVES, Pull

pytestmark = pytest.mark.board


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def chunks(answer: Iterator[bytes] | BlobNotFound) -> list[Chunk]:
    assert not isinstance(answer, BlobNotFound)
    return [Chunk.parse(raw) for raw in answer]


@dataclass
class Network:
    """A sender and the ways to and from it, which lose, repeat, reorder and damage."""

    serve: BlobSender
    loss: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0
    damage: float = 0.0
    max_packet: int = 256 * 1024
    seed: int = 0
    now: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)
    missing: set[tuple[str, int]] = field(default_factory=set)
    widest: int = 0
    messages: int = 0

    def run(self, pull: Pull, steps: int = 10_000) -> None:
        """Until the blob is here; counts what is asked for and not yet here, on its own."""
        rng = random.Random(self.seed)
        in_flight: list[bytes] = []
        self._send(pull.start(self.now), in_flight, rng)
        for _ in range(steps):
            if pull.is_done:
                return
            if in_flight:
                at = rng.randrange(len(in_flight)) if rng.random() < self.reorder else 0
                self._deliver(pull, in_flight.pop(at), in_flight, rng)
            else:
                self.now += 1
                self._send(pull.on_tick(self.now), in_flight, rng)
        pytest.fail(f"not done after {steps} steps: {pull.progress}")

    def _send(self, wants: list[BlobRequest], in_flight: list[bytes], rng: random.Random) -> None:
        self.messages += len(wants)
        for want in wants:
            rows = [(want.part, i) for i in range(want.first, want.first + want.count)]
            self.asked += rows
            self.missing.update(rows)
            self.widest = max(self.widest, len(self.missing))
            read = parse_message(want.to_bytes())
            assert isinstance(read, BlobRequest)
            for _ in range(self._copies(rng)):
                answer = self.serve.answer(read, self.max_packet)
                assert not isinstance(answer, BlobNotFound)
                for raw in answer:
                    assert len(raw) <= self.max_packet
                    in_flight.extend([raw] * self._copies(rng))

    def _copies(self, rng: random.Random) -> int:
        return 0 if rng.random() < self.loss else 2 if rng.random() < self.repeat else 1

    def _deliver(self, pull: Pull, raw: bytes, in_flight: list[bytes], rng: random.Random) -> None:
        sent = Chunk.parse(raw)
        if rng.random() < self.damage:
            at = rng.randrange(len(raw))
            raw = raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :]
        try:
            chunk = Chunk.parse(raw)
        except ProtocolError:
            return
        if (chunk.sha256, chunk.part, chunk.first) == (sent.sha256, sent.part, sent.first):
            leaf_pairs = zip(chunk.leaves(), sent.leaves(), strict=True)
            self.missing -= {(chunk.part, i) for (i, payload), (_, right) in leaf_pairs if payload == right}
        self._send(pull.on_chunk(chunk, self.now), in_flight, rng)


def attempt(network: Network, pull: Pull) -> str:
    """What the protocol error says that ended the pull, or nothing."""
    try:
        network.run(pull)
    except ProtocolError as error:
        return str(error)
    return ""


@given(
    size=st.integers(0, 40 * LEAF_BYTES),
    window=st.integers(1, 12),
    chunk=st.integers(1, 12),
    loss=st.sampled_from([0.0, 0.02, 0.3]),
    repeat=st.sampled_from([0.0, 0.3]),
    reorder=st.sampled_from([0.0, 0.5, 1.0]),
    damage=st.sampled_from([0.0, 0.05]),
    max_packet=st.sampled_from([64 * 1024, 256 * 1024]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_blob_arrives_whole_through_a_bad_network_and_never_asks_for_more_than_the_window(
    size: int,
    window: int,
    chunk: int,
    loss: float,
    repeat: float,
    reorder: float,
    damage: float,
    max_packet: int,
    seed: int,
) -> None:
    data = noise(size, seed)
    with tempfile.TemporaryDirectory() as folder:
        source, target = BlobStore(Path(folder, "a"), durable=False), BlobStore(Path(folder, "b"), durable=False)
        ref = source.put(data)
        network = Network(BlobSender(source), loss, repeat, reorder, damage, max_packet, seed)
        pull = Pull(ref, target.partial(ref), chunk_leaves=min(chunk, window), window_leaves=window, patience_s=3)
        error = attempt(network, pull)
        assert network.widest <= window
        if error:
            assert damage  # a leaf that is damaged again and again is reported
            assert "damaged 8 times" in error
            assert not target.has(ref.sha256)
            return
        assert target.read(ref.sha256) == data
        assert pull.progress == (ref.leaf_count, ref.leaf_count)
        assert pull.outstanding == 0


@given(leaves=st.integers(2, 60), window=st.integers(1, 16), chunk=st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_on_a_good_network_nothing_is_asked_for_twice(leaves: int, window: int, chunk: int) -> None:
    data = noise(leaves * LEAF_BYTES - 5)
    with tempfile.TemporaryDirectory() as folder:
        source, target = BlobStore(Path(folder, "a"), durable=False), BlobStore(Path(folder, "b"), durable=False)
        ref = source.put(data)
        network = Network(BlobSender(source))
        network.run(Pull(ref, target.partial(ref), chunk_leaves=min(chunk, window), window_leaves=window))

        assert sorted(network.asked) == sorted({("leaves", 0), *(("data", i) for i in range(leaves))})
        assert network.now == 0


def test_a_leaf_table_of_several_pieces_is_pulled_in_pieces(tmp_path: Path) -> None:
    data = bytes(1100 * LEAF_BYTES)
    source, target = BlobStore(tmp_path / "a", durable=False), BlobStore(tmp_path / "b", durable=False)
    ref = source.put(data)
    network = Network(BlobSender(source), loss=0.1, reorder=0.5, max_packet=64 * 1024, seed=4)

    network.run(Pull(ref, target.partial(ref), window_leaves=64))

    assert {row for row in network.asked if row[0] == "leaves"} == {("leaves", 0), ("leaves", 1)}
    assert target.read(ref.sha256) == data


@pytest.fixture
def source(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "source", durable=False)


@pytest.fixture
def target(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "target", durable=False)


def test_an_interrupted_pull_asks_only_for_what_is_missing(source: BlobStore, target: BlobStore) -> None:
    data = noise(20 * LEAF_BYTES)
    ref = source.put(data)
    first = Pull(ref, target.partial(ref), chunk_leaves=1, window_leaves=4)
    serve, wants = BlobSender(source), first.start(0)
    for _ in range(3):
        wants = [w for want in wants for c in chunks(serve.answer(want, 64 * 1024)) for w in first.on_chunk(c, 0)]
    had = first.progress[0]
    network = Network(serve)

    network.run(Pull(ref, target.partial(ref)))

    assert 0 < had < 20
    assert len(network.asked) == 20 - had
    assert target.read(ref.sha256) == data


def test_a_slow_link_is_not_taken_for_a_broken_one(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(64 * LEAF_BYTES))
    pull = Pull(ref, target.partial(ref), chunk_leaves=1, window_leaves=8, patience_s=5)
    serve, now, asked = BlobSender(source), 0.0, []
    queue = pull.start(now)
    while not pull.is_done:  # every leaf takes 4 s, so that it waits behind seven others for 28 s
        want = queue.pop(0)
        asked.append(want)
        for raw in list(serve.answer(want, 64 * 1024)):  # type: ignore[arg-type]
            for _ in range(4):
                now += 1
                queue += pull.on_tick(now)
            queue += pull.on_chunk(Chunk.parse(raw), now)

    assert (sum(w.count for w in asked) - 64 - 1) <= 8


def test_where_leaves_come_at_once_the_window_grows_and_a_few_wants_do(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(600 * LEAF_BYTES))
    network = Network(BlobSender(source))

    network.run(Pull(ref, target.partial(ref)))

    assert WINDOW_LEAVES < network.widest <= WIDE_WINDOW_LEAVES
    assert network.messages < 600 / 10


def test_where_leaves_are_long_on_their_way_the_window_stays_small(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(200 * LEAF_BYTES))
    pull, serve, now = Pull(ref, target.partial(ref)), BlobSender(source), 0.0
    queue = pull.start(now)
    while queue:
        for chunk in chunks(serve.answer(queue.pop(0))):
            now += 1.1
            queue += pull.on_chunk(chunk, now)
            assert pull.outstanding <= WINDOW_LEAVES

    assert pull.is_done


def test_a_lost_leaf_that_others_have_overtaken_does_not_wait_for_a_stall(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(64 * LEAF_BYTES))
    pull = Pull(ref, target.partial(ref), chunk_leaves=1, window_leaves=4, patience_s=5)
    serve, now, lost_at, again_at = BlobSender(source), 0.0, None, None
    queue = pull.start(now)
    while again_at is None:
        for chunk in chunks(serve.answer(queue.pop(0), 64 * 1024)):
            now += 1
            late = pull.on_tick(now)
            if any(w.first <= 3 < w.first + w.count and w.part == "data" for w in late) and lost_at is not None:
                again_at = now
            if chunk.part == "data" and chunk.first == 3 and lost_at is None:
                lost_at = now
                continue
            queue += late + pull.on_chunk(chunk, now)

    assert lost_at is not None
    assert again_at - lost_at < 15
    assert not pull.is_done


def test_the_repetition_of_an_overtaken_leaf_gets_the_whole_patience(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(4 * LEAF_BYTES))
    pull, serve = Pull(ref, target.partial(ref), patience_s=5), BlobSender(source)
    (table,) = chunks(serve.answer(pull.start(0.0)[0]))
    (want,) = pull.on_chunk(table, 0.0)
    for leaf in (0, 3):  # 1 and 2 are lost
        (chunk,) = chunks(serve.answer(replace(want, first=leaf, count=1)))
        pull.on_chunk(chunk, 1.0)

    asked = {second: wants for second in range(5, 25) if (wants := pull.on_tick(second))}

    assert [(w.first, w.count) for w in asked[6]] == [(1, 2)]
    assert list(asked) == [6, 12, 23]  # no answer within 5 s, nor then within 10 s
    assert pull.stalls == 2


def test_what_was_not_asked_for_is_ignored(source: BlobStore, target: BlobStore) -> None:
    data = noise(8 * LEAF_BYTES)
    ref = source.put(data)
    pull = Pull(ref, target.partial(ref), chunk_leaves=1, window_leaves=2)
    (want,) = pull.start(0)
    (table,) = chunks(BlobSender(source).answer(want))
    pull.on_chunk(table, 0)

    def leaf(index: int) -> Chunk:
        return Chunk(ref.sha256, "data", index, data[index * LEAF_BYTES : (index + 1) * LEAF_BYTES])

    for foreign in (
        leaf(7),
        table,
        Chunk("ab" * 32, "data", 0, data[:LEAF_BYTES]),
        Chunk(ref.sha256, "data", 2**32 - 1, b"x"),
    ):
        assert pull.on_chunk(foreign, 0) == []
    assert pull.progress == (0, 8)
    pull.on_chunk(leaf(0), 0)
    assert pull.on_chunk(leaf(0), 0) == []
    assert pull.progress == (1, 8)


def test_a_leaf_that_stays_damaged_ends_the_pull(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(4 * LEAF_BYTES))
    with source.path(ref.sha256).open("r+b") as file:
        file.seek(2 * LEAF_BYTES)
        file.write(b"damaged")

    with pytest.raises(ProtocolError, match=f"leaf 2 of blob .* damaged {MAX_TRIES} times"):
        Network(BlobSender(source)).run(Pull(ref, target.partial(ref)))
    assert not target.has(ref.sha256)


def test_a_wrong_leaf_table_ends_the_pull(source: BlobStore, target: BlobStore) -> None:
    ref = source.put(noise(4 * LEAF_BYTES))

    lie = BlobRef(ref.sha256, ref.size, "ab" * 32)
    with pytest.raises(ProtocolError, match=f"leaf table of blob .* damaged {MAX_TRIES} times"):
        Network(BlobSender(source)).run(Pull(lie, target.partial(lie)))


def test_a_blob_deleted_between_two_wants_is_gone(source: BlobStore) -> None:
    ref = source.put(noise(4 * LEAF_BYTES))
    serve = BlobSender(source)
    answer = serve.answer(BlobRequest(ref.sha256, "data", 0, 4), 64 * 1024)
    assert not isinstance(answer, BlobNotFound)
    got = [next(answer)]
    source.delete(ref.sha256)

    got += answer  # the file is open: what was being sent is sent
    assert b"".join(bytes(Chunk.parse(raw).payload) for raw in got) == noise(4 * LEAF_BYTES)
    assert serve.answer(BlobRequest(ref.sha256, "data", 0, 4)) == BlobNotFound(ref.sha256)


@pytest.mark.parametrize("blob_part", ["data", "leaves"])
def test_wants_beyond_the_end_get_what_there_is(source: BlobStore, blob_part: str) -> None:
    ref = source.put(noise(4 * LEAF_BYTES + 9))
    serve = BlobSender(source)

    assert sum(len(c.payload) for c in chunks(serve.answer(BlobRequest(ref.sha256, blob_part, 0, 1000)))) == (
        ref.size if blob_part == "data" else 5 * 32
    )
    assert chunks(serve.answer(BlobRequest(ref.sha256, blob_part, 2**31 - 1, 1024))) == []


PULLING = """
    import sys, time
    from pathlib import Path
    from fedprune.blobs.blob_store import BlobStore
    from fedprune.wire.chunk import Chunk
    from fedprune.wire.blob_sender import BlobSender
    from fedprune.wire.transfer import Pull

    source, target = BlobStore(Path(sys.argv[1])), BlobStore(Path(sys.argv[2]))
    ref = source.ref(sys.argv[3])
    pull, serve = Pull(ref, target.partial(ref), chunk_leaves=1, window_leaves=4), BlobSender(source)
    wants = pull.start(0)
    while wants:
        for raw in serve.answer(wants.pop(0), 65536):
            wants += pull.on_chunk(Chunk.parse(raw), 0)
            print(pull.progress[0], flush=True)
            time.sleep(0.002)
"""


@pytest.mark.system
def test_a_process_killed_in_the_middle_of_a_pull_resumes_where_it_was(source: BlobStore, target: BlobStore) -> None:
    data = noise(200 * LEAF_BYTES + 1)
    ref = source.put(data)
    arguments = [sys.executable, "-c", textwrap.dedent(PULLING), str(source.root), str(target.root), ref.sha256]
    leaf_count = 0
    for stop_at in (40, 120):
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) < leaf_count:
                    pytest.fail(f"went back from {leaf_count} to {int(line)}")
                leaf_count = int(line)
                if leaf_count >= stop_at:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
        assert not target.has(ref.sha256)
    network = Network(BlobSender(source))

    network.run(Pull(ref, BlobStore(target.root).partial(ref)))

    assert target.read(ref.sha256) == data
    assert len(network.asked) <= 201 - leaf_count
