"""The way of an offer's blobs, with a server that answers when it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError
from fedprune.wire.chunk import MAX_PACKET, Chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest, Offer, parse
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender
from fedprune_device.network.connection import Channel, Connection
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.uplink import Uplink
from fedprune_device.storage.state_directory import DeviceStore

pytestmark = pytest.mark.board

TOPICS = Topics("site")
DIGEST = "ab" * 32


class Line:
    """A link that keeps what is wanted, until the server gets round to it."""

    unsent = 0

    def __init__(self, source: BlobStore) -> None:
        self.serve = BlobSender(source)
        self.wants: list[BlobRequest] = []

    def get(self, timeout: float | None = 0.0) -> None:
        return None

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        message = parse(payload)
        assert isinstance(message, BlobRequest)
        self.wants.append(message)
        return True

    def chunks(self) -> list[Chunk]:
        """What answers all wants so far."""
        wants, self.wants = self.wants, []
        found = [self.serve.answer(want, MAX_PACKET) for want in wants]
        return [Chunk.parse(raw) for pieces in found if not isinstance(pieces, BlobNotFound) for raw in pieces]


@pytest.fixture
def source(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "source", durable=False)


@pytest.fixture
def offer(source: BlobStore) -> Offer:
    weights = source.put(np.random.default_rng(0).bytes(3 * LEAF + 9))
    graph = source.put(b"graph")
    return Offer("j", 1, 1, 7, DIGEST, DIGEST, (4,), 3, weights, graph, graph, {})


@pytest.fixture
def line(source: BlobStore) -> Line:
    return Line(source)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DeviceStore]:
    with DeviceStore(tmp_path / "state") as made:
        yield made


@pytest.fixture
def supply(store: DeviceStore, line: Line) -> Downloader:
    connection = Connection(line, Channel("d", TOPICS.site))
    return Downloader(store, connection, Uplink(connection, store.blobs))


def pulled(supply: Downloader, line: Line, now: float) -> float | None:
    """Answer until it is there; seconds that it took."""
    for _ in range(50):
        took = supply.turn(now)
        if took is not None:
            return took
        for chunk in line.chunks():
            supply.chunk(chunk, now)
    return None


def test_nothing_is_asked_for_before_the_connection_is_there(supply: Downloader, line: Line, offer: Offer) -> None:
    supply.begin(offer, 0.0, asks=False)
    assert not line.wants
    supply.connected(1.0)
    assert line.wants
    assert pulled(supply, line, 2.0) == 2.0


def test_what_is_gone_at_the_server_ends_it_with_an_error(supply: Downloader, offer: Offer) -> None:
    supply.begin(offer, 0.0)
    supply.gone("0" * 64, 1.0)  # somebody else's
    with pytest.raises(ProtocolError, match="no longer has blob"):
        supply.gone(offer.weights.sha256, 1.0)


def test_who_stops_takes_nothing_more(supply: Downloader, line: Line, store: DeviceStore, offer: Offer) -> None:
    supply.begin(offer, 0.0)
    chunks = line.chunks()
    supply.stop()
    for chunk in chunks:
        supply.chunk(chunk, 1.0)
    assert supply.turn(1.0) is None
    assert not store.blobs.has(offer.training.sha256)
