"""Blobs go to devices chunk by chunk, in turns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.messages import BlobNotFound, BlobRequest
from fedprune_server.transfer.downloads import MAX_QUEUED_REQUESTS, Downloads


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path, durable=False)


@pytest.fixture
def downloads(store: BlobStore) -> Downloads:
    return Downloads(BlobSender(store), max_packet=LEAF_BYTES + 512)


def chunk_order(downloads: Downloads) -> list[str]:
    """Who gets a chunk, in order, until nothing is left."""
    order = []
    while (item := downloads.next_chunk()) is not None:
        order.append(item[0])
    return order


def test_devices_take_turns(store: BlobStore, downloads: Downloads) -> None:
    digest = store.put(b"x" * (3 * LEAF_BYTES)).sha256
    for device in "abc":
        downloads.add(device, BlobRequest(digest, "data", 0, 3))
    assert chunk_order(downloads) == list("abcabcabc")


def test_a_device_with_many_wants_does_not_hold_up_one_with_few(store: BlobStore, downloads: Downloads) -> None:
    digest = store.put(b"x" * (9 * LEAF_BYTES)).sha256
    for first in range(9):
        downloads.add("greedy", BlobRequest(digest, "data", first, 1))
    downloads.add("modest", BlobRequest(digest, "data", 0, 1))
    assert chunk_order(downloads).index("modest") <= 2


def test_thousands_of_devices_wait_without_a_chunk_each(store: BlobStore) -> None:
    opened: set[str] = set()

    class Watched(BlobSender):
        def answer(self, want: BlobRequest, max_packet: int = 0) -> Iterator[bytes]:
            def chunks() -> Iterator[bytes]:
                opened.add(want.sha256)
                yield b"1"
                yield b"2"
                opened.remove(want.sha256)

            return chunks()

    downloads = Downloads(Watched(store))
    for number in range(1000):
        downloads.add(f"d{number}", BlobRequest(f"{number:064x}", "data", 0, 3))
    max_opened, count = 0, 0
    while downloads.next_chunk() is not None:
        max_opened, count = max(max_opened, len(opened)), count + 1
    assert count == 2000
    assert max_opened <= 32


def test_the_same_want_is_answered_once(store: BlobStore, downloads: Downloads) -> None:
    digest = store.put(b"x" * LEAF_BYTES).sha256
    for _ in range(5):
        downloads.add("a", BlobRequest(digest, "data", 0, 1))
    assert chunk_order(downloads) == ["a"]


@pytest.mark.parametrize(("first", "count", "further_chunks"), [(1, 7, 2), (3, 5, 0), (0, 4, 3)])
def test_what_is_asked_for_again_before_it_was_sent_is_sent_once(
    store: BlobStore, downloads: Downloads, first: int, count: int, further_chunks: int
) -> None:
    digest = store.put(b"x" * (8 * LEAF_BYTES)).sha256
    downloads.add("a", BlobRequest(digest, "data", 0, 8))
    assert [downloads.next_chunk() is not None for _ in range(3)] == [True] * 3
    downloads.add("a", BlobRequest(digest, "data", first, count))
    assert chunk_order(downloads) == ["a"] * (5 + further_chunks), (
        "those that were sent may be lost, the others aren't sent twice"
    )


@pytest.mark.parametrize("changed", [{"most": 2}, {"first": 8, "count": 3}, {"part": "leaves"}, {"count": 12}])
def test_other_requests_are_answered_after_the_one_under_way(
    store: BlobStore, downloads: Downloads, changed: dict[str, Any]
) -> None:
    asked = BlobRequest(store.put(b"x" * (12 * LEAF_BYTES)).sha256, "data", 0, 8)
    downloads.add("a", asked)
    assert downloads.next_chunk() is not None
    downloads.add("a", replace(asked, **changed))
    number = {"leaves": 1}.get(str(changed.get("part")), changed.get("count", 8))
    assert chunk_order(downloads) == ["a"] * (7 + number)


def test_a_device_that_asks_again_keeps_its_turn(store: BlobStore, downloads: Downloads) -> None:
    digest = store.put(b"x" * (3 * LEAF_BYTES)).sha256
    for number in range(40):
        downloads.add(f"d{number}", BlobRequest(digest, "data", 0, 3))
    downloads.add("d39", BlobRequest(digest, "data", 0, 3, number=7))  # for the same pieces
    assert downloads.next_chunk() is not None
    downloads.add("d0", BlobRequest(digest, "data", 0, 3))
    order = chunk_order(downloads)
    assert order.index("d0") < 40
    assert len(order) == 40 * 3 - 1 + 1


def test_wants_beyond_the_limit_are_dropped(store: BlobStore, downloads: Downloads) -> None:
    digest = store.put(b"x" * (200 * LEAF_BYTES)).sha256
    for first in range(200):
        downloads.add("a", BlobRequest(digest, "data", first, 1))
    assert len(chunk_order(downloads)) == MAX_QUEUED_REQUESTS


def test_a_blob_that_is_not_here_is_gone(downloads: Downloads) -> None:
    downloads.add("a", BlobRequest("0" * 64, "data", 0, 1))
    assert downloads.next_chunk() == ("a", BlobNotFound("0" * 64))
    assert not downloads
