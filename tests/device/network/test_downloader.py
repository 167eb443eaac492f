"""The way of an offer's blobs, with a server that answers when it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.messages import BlobRequest, Offer, parse
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


def test_nothing_is_asked_for_before_the_connection_is_there(supply: Downloader, line: Line, offer: Offer) -> None:
    supply.begin(offer, 0.0, asks=False)
    assert not line.wants
    supply.connected(1.0)
    assert {want.sha256 for want in line.wants} == {ref.sha256 for ref in offer.blobs()}
