"""A message never waits behind a model: on both sides only so many bytes of chunks are handed to the connection."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, HEADER_STRUCT, Chunk
from fedprune.wire.messages import BlobRequest, Cancelled, UpdateAnnouncement, parse_message
from fedprune.wire.queues import HIGH_WATER
from fedprune.wire.topics import Topics
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.network.update_sender import UpdateSender
from fedprune_device.network.uplink import Uplink
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads

TOPICS = Topics("lab")
LEAVES = 400


class Slow:
    """A connection that sends nothing until it is told to, in the order in which it was handed things."""

    connected = True

    def __init__(self) -> None:
        self.queue: list[tuple[str, bytes]] = []
        self.sent: list[tuple[str, bytes]] = []
        self.up = True

    @property
    def room(self) -> bool:
        return True

    @property
    def unsent(self) -> int:
        return sum(len(payload) for _, payload in self.queue)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        if self.up:
            self.queue.append((topic, payload))
        return self.up

    def send(self) -> None:
        self.sent.append(self.queue.pop(0))

    def ahead(self, kind: type[Any]) -> int:
        """Bytes that go out before the first message of a type."""
        at = next(
            i for i, (t, p) in enumerate(self.queue) if not t.endswith("blob") and isinstance(parse_message(p), kind)
        )
        return sum(len(payload) for _, payload in self.queue[:at])

    def leaves(self) -> set[tuple[str, int]]:
        """Leaves that went out, and for whom."""
        rows = [(t, Chunk.parse(p)) for t, p in self.sent if t.endswith("blob")]
        return {(topic.split("/")[3], index) for topic, chunk in rows for index, _ in chunk.leaves()}

    def get(self, timeout: float | None = 0.0) -> None:
        return None

    def flush(self, timeout: float) -> bool:
        return True


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path, durable=False)


@pytest.fixture
def digest(store: BlobStore) -> str:
    return store.put(bytes(LEAVES * LEAF_BYTES)).sha256


def outbox_of_server(link: Slow, store: BlobStore) -> Outbox:
    registry: Any = SimpleNamespace(
        count_sent=lambda *_: None,
        transfers=SimpleNamespace(note_download_request=lambda *_: None, note_upload_request=lambda *_: None),
    )
    return Outbox(SiteLink(link, TOPICS), registry, Downloads(BlobSender(store)))


def test_a_server_s_message_has_a_bounded_number_of_bytes_in_front_of_it(store: BlobStore, digest: str) -> None:
    link, devices = Slow(), [f"pi{i}" for i in range(20)]
    post = outbox_of_server(link, store)
    for device in devices:
        for first in range(0, LEAVES, 50):
            post.serve_request(device, BlobRequest(digest, "data", first, 50), {digest})
    for _ in range(1000):
        post.send_chunks()
    post.send("pi0", Cancelled("job", 1, 1, "enough"), "job")
    post.deliver()

    assert 0 < link.ahead(Cancelled) < HIGH_WATER + DEFAULT_MAX_PACKET

    while link.queue:
        link.send()
        post.send_chunks()
    assert link.leaves() == {(device, i) for device in devices for i in range(LEAVES)}


def outbox(link: Slow, store: BlobStore) -> UpdateSender:
    connection = BoardConnection(link, MessageChannel("pi", TOPICS.site))
    return UpdateSender(connection, Uplink(connection), store)


def update(store: BlobStore, digest: str) -> UpdateAnnouncement:
    return UpdateAnnouncement("pi", "job", 1, 1, "ab" * 32, store.ref(digest), 1, 1)


def test_a_want_that_comes_twice_while_it_waits_is_answered_once(store: BlobStore, digest: str) -> None:
    link = Slow()
    board, pending = outbox(link, store), update(store, digest)
    for _ in range(3):
        for first in range(0, LEAVES, 100):
            board.on_blob_request(BlobRequest(digest, "data", first, 100), pending, 0.0)
    while link.queue:
        link.send()
        board.send_chunks()

    chunks = [p for t, p in link.sent if t.endswith("blob")]
    return_bytes = 100  # the first one is no longer waiting when it comes again
    assert sum(len(p) - HEADER_STRUCT.size for p in chunks) <= (LEAVES + 2 * return_bytes) * LEAF_BYTES


def test_what_was_wanted_on_a_connection_that_is_lost_is_not_sent_on_the_next(store: BlobStore, digest: str) -> None:
    link = Slow()
    board = outbox(link, store)
    board.on_blob_request(BlobRequest(digest, "data", 0, LEAVES), update(store, digest), 0.0)
    link.queue.clear()
    board.drop_chunks()
    board.send_chunks()
    assert link.queue == []

    board.on_blob_request(BlobRequest(digest, "data", 0, LEAVES), update(store, digest), 0.0)
    link.queue.clear()
    link.up = False
    board.send_chunks()
    link.up = True
    board.send_chunks()
    assert link.queue == []


def take_requests(link: Slow) -> list[BlobRequest]:
    """The requests that a side has made since the last look."""
    sent, link.queue = link.queue, []
    requests = [parse_message(payload) for topic, payload in sent if not topic.endswith("blob")]
    assert all(isinstance(r, BlobRequest) and r.number is not None for r in requests)
    return requests  # type: ignore[return-value]


def test_a_request_that_the_way_has_doubled_is_answered_once_by_the_server(store: BlobStore, digest: str) -> None:
    board, server = Slow(), Slow()
    uplink = Uplink(BoardConnection(board, MessageChannel("pi", TOPICS.site)))
    post = outbox_of_server(server, store)
    plain = BlobRequest(digest, "data", 0, 2)
    uplink.request_chunks("job", [plain])
    uplink.request_chunks("job", [plain])
    first, second = take_requests(board)
    chunks = []
    for device, want in (("pi", first), ("pi", first), ("pi", second), ("pi", plain), ("pi", plain), ("other", first)):
        post.serve_request(device, want, {digest})
        post.send_chunks()
        chunks.append(len(server.queue))
        server.queue.clear()
    assert chunks == [1, 0, 1, 1, 1, 1]


def test_a_request_that_the_way_has_doubled_is_answered_once_by_a_device(store: BlobStore, digest: str) -> None:
    board, server = Slow(), Slow()
    sender, post = outbox(board, store), outbox_of_server(server, store)
    plain = BlobRequest(digest, "data", 0, 2)
    post.send_requests([("pi", plain), ("pi", plain)])
    post.deliver()
    first, second = take_requests(server)
    chunks = []
    for want in (first, first, second, plain, plain):
        sender.on_blob_request(want, update(store, digest), 0.0)
        chunks.append(len(board.queue))
        board.queue.clear()
    assert chunks == [1, 0, 1, 1, 1]
