"""A want that the way has doubled is answered once, by both sides; one that was said again is answered again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedprune.blobs.blob_ref import LEAF
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.messages import BlobRequest, Update, parse
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender
from fedprune_device.network.connection import Channel, Connection
from fedprune_device.network.uplink import Uplink
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads

TOPICS = Topics("lab")


class Kept:
    """A connection that keeps what it is handed."""

    connected, unsent = True, 0

    def __init__(self) -> None:
        self.queue: list[tuple[str, bytes]] = []

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        self.queue.append((topic, payload))
        return True

    def get(self, timeout: float | None = 0.0) -> None:
        return None

    def flush(self, timeout: float) -> bool:
        return True


def posted(link: Kept, store: BlobStore) -> Outbox:
    registry: Any = SimpleNamespace(
        sent=lambda *_: None, note_request_of=lambda *_: None, note_request_to=lambda *_: None
    )
    return Outbox(
        SiteLink(link, TOPICS),
        registry,
        Downloads(BlobSender(store)),
    )


def asked(link: Kept) -> list[BlobRequest]:
    """The wants that a side has said since the last look."""
    said, link.queue = link.queue, []
    wants = [parse(payload) for topic, payload in said if not topic.endswith("blob")]
    assert all(isinstance(w, BlobRequest) and w.number is not None for w in wants)
    return wants  # type: ignore[return-value]


def test_by_the_server(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, durable=False)
    plain = BlobRequest(store.put(bytes(2 * LEAF)).sha256, "data", 0, 2)
    board, server = Kept(), Kept()
    outbox, post = Uplink(Connection(board, Channel("pi", TOPICS.site)), store), posted(server, store)
    outbox.ask("job", [plain])
    outbox.ask("job", [plain])
    first, second = asked(board)
    chunks = []
    for want in (first, first, second, first, plain, plain):
        post.fetched("pi", want, {plain.sha256})
        post.send_chunks()
        chunks.append(len(server.queue))
        server.queue.clear()
    assert chunks == [1, 0, 1, 0, 1, 1]
    post.fetched("other", first, {plain.sha256})
    post.send_chunks()
    assert len(server.queue) == 1


def test_by_a_device(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, durable=False)
    ref = store.put(bytes(2 * LEAF))
    update = Update("pi", "job", 1, 1, "0" * 64, ref, 1, 1)
    board, server = Kept(), Kept()
    outbox, post = Uplink(Connection(board, Channel("pi", TOPICS.site)), store), posted(server, store)
    plain = BlobRequest(ref.sha256, "data", 0, 2)
    post.ask([("pi", plain), ("pi", plain)])
    post.deliver()
    first, second = asked(server)
    chunks = []
    for want in (first, first, second, plain, plain):
        outbox.answer(want, update, 0.0)
        chunks.append(len(board.queue))
        board.queue.clear()
    assert chunks == [1, 0, 1, 1, 1]
