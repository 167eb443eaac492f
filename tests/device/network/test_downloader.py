"""The way of an offer's blobs over MQTT: weights in the shorter form where that can be decoded, and whole otherwise."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError, StorageError
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest, Offer, parse_message
from fedprune.wire.topics import Topics
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.uplink import Uplink
from support.fakes.messages import DIGEST
from support.fakes.web_server import Handler, WebPlace
from support.waiting import until

pytestmark = pytest.mark.board


class Source:
    """A link that keeps requests, to a server with an offer whose weights can also be decoded from less."""

    unsent = 0

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        self.weights = self.store.put(np.random.default_rng(0).bytes(3 * LEAF_BYTES + 9))
        self.graph = self.store.put(b"graph" * 10_000)
        self.less = self.store.put(b"less")
        self.new: list[BlobRequest] = []
        self.requested: set[str] = set()

    def get(self, timeout: float | None = 0.0) -> None:
        return None

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        message = parse_message(payload)
        assert isinstance(message, BlobRequest)
        self.new.append(message)
        self.requested.add(message.sha256)
        return True

    def offer(self, base_digest: str | None = None) -> Offer:
        plain = Offer("job", 1, 1, 7, DIGEST, DIGEST, (1,), 3, self.weights, self.graph, self.graph, {})
        return structs.replace(plain, weights_codec="int8", coded=self.less, held=base_digest)

    def chunks(self) -> Iterator[Chunk]:
        """What answers all requests so far."""
        requests, self.new = self.new, []
        for request in requests:
            answer = BlobSender(self.store).answer(request)
            assert not isinstance(answer, BlobNotFound)
            yield from map(Chunk.parse, answer)

    def feed(self, downloader: Downloader) -> float:
        """Answer everything; returns the seconds that the download took."""
        while (took := downloader.turn(2.0)) is None:
            assert self.new
            for chunk in list(self.chunks()):
                downloader.on_chunk(chunk, 1.0)
        return took


def digests(*refs: BlobRef) -> set[str]:
    return {r.sha256 for r in refs}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "device", durable=False)


@pytest.fixture
def downloader(source: Source, store: BlobStore) -> Downloader:
    connection = BoardConnection(source, MessageChannel("d", Topics("site").site))
    return Downloader(store, connection, Uplink(connection))


def test_nothing_is_asked_for_before_the_connection_is_there(downloader: Downloader, source: Source) -> None:
    downloader.begin(source.offer(), 0.0, is_connected=False)
    assert not source.requested
    downloader.on_connect(1.0)
    assert source.feed(downloader) == 2.0
    assert source.requested == digests(source.less, source.graph), "what can be decoded, instead of the weights"


@pytest.mark.parametrize("plainly", [False, True])
def test_what_can_not_be_decoded_is_pulled_whole(downloader: Downloader, source: Source, plainly: bool) -> None:
    downloader.begin(source.offer(base_digest=None if plainly else "f" * 64), 0.0, without_codec=plainly)
    source.feed(downloader)
    assert source.requested == digests(source.weights, source.graph)


def test_what_could_be_decoded_and_is_gone_is_done_without(
    downloader: Downloader, source: Source, store: BlobStore
) -> None:
    downloader.begin(source.offer(), 0.0)
    source.new = [request for request in source.new if request.sha256 != source.less.sha256]
    for _ in range(2):
        downloader.on_blob_not_found(source.less.sha256, 0.0)
    source.feed(downloader)
    assert store.has(source.weights.sha256)


@pytest.mark.parametrize("gone", [0, 1])
def test_increments_of_which_one_is_gone_are_done_without(
    downloader: Downloader, source: Source, store: BlobStore, gone: int
) -> None:
    mask, *increments = (source.store.put(name * LEAF_BYTES) for name in (b"m", b"1", b"2"))
    downloader.begin(structs.replace(source.offer(), coded=None, mask=mask, increments=tuple(increments)), 0.0)
    assert {r.sha256 for r in source.new} == digests(source.graph, *increments)
    source.new = [request for request in source.new if request.sha256 != increments[gone].sha256]
    for _ in range(2):
        downloader.on_blob_not_found(increments[gone].sha256, 0.0)
    asked = [request.sha256 for request in source.new if request.sha256 == source.graph.sha256]
    assert len(asked) == 1, "what is on its way is not requested again"
    source.feed(downloader)
    assert store.has(source.weights.sha256)
    assert store.has(mask.sha256)


def test_weights_or_a_graph_that_are_gone_end_it(downloader: Downloader, source: Source) -> None:
    downloader.begin(source.offer(), 0.0, without_codec=True)
    downloader.on_blob_not_found("0" * 64, 1.0)  # somebody else's
    for ref in (source.weights, source.graph):
        with pytest.raises(ProtocolError, match=ref.sha256[:12]):
            downloader.on_blob_not_found(ref.sha256, 0.0)


def test_what_a_server_names_wrongly_is_found_out_where_it_is_read(
    downloader: Downloader, source: Source, store: BlobStore
) -> None:
    data = source.store.read(source.weights.sha256)
    wrong = replace(source.weights, sha256="ab" * 32)
    downloader.begin(
        structs.replace(source.offer(), weights=wrong, training=source.less, inference=source.less),
        0.0,
        without_codec=True,
    )
    while downloader.turn(1.0) is None:
        want = source.new.pop(0)
        payload = (
            leaf_table(data) if want.part == "leaves" else data[want.first * LEAF_BYTES :][: want.count * LEAF_BYTES]
        )
        payload = b"less" if want.sha256 == source.less.sha256 else payload
        downloader.on_chunk(Chunk(want.sha256, want.part, want.first, payload), 0.0)
    with pytest.raises(StorageError):
        store.read(wrong.sha256)


def test_the_web_server_is_asked_first_and_what_it_gave_is_not_requested_again(
    downloader: Downloader, source: Source
) -> None:
    weights = source.store.put(np.random.default_rng(1).bytes(20 * LEAF_BYTES))
    started, go_on = threading.Event(), threading.Event()

    def cut(handler: Handler, data: bytes) -> bool:
        if started.is_set():
            handler.say(404, b"")
            return True
        if len(data) < weights.size:
            return False
        started.set()
        assert go_on.wait(60)
        handler.give(data, until=9 * LEAF_BYTES)
        return True

    with WebPlace(source.store) as web:
        web.behave = cut
        downloader.begin(structs.replace(source.offer(), weights=weights, blobs_at=web.url), 0.0, without_codec=True)
        assert started.wait(60)
        downloader.on_connect(0.5)
        downloader.repeat_requests(0.5)
        assert not source.requested
        go_on.set()
        until(lambda: downloader.turn(1.0) is None and not downloader.is_fetching_from_web)
    assert min(r.first for r in source.new if r.sha256 == weights.sha256) == 8  # leaves are taken eight at a time
