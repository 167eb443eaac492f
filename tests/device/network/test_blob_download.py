"""A device pulls weights in the shorter form where it can decode that, and whole otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError, StorageError
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest, Offer
from fedprune.wire.transfer import BlobSender
from fedprune_device.network.blob_download import BlobDownloads
from support.fakes.messages import DIGEST

pytestmark = pytest.mark.board


class Source:
    """A server's store, with an offer whose weights can also be decoded from less."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        self.weights = self.store.put(np.random.default_rng(0).bytes(3 * LEAF + 9))
        self.graph = self.store.put(b"graph" * 10_000)
        self.less = self.store.put(b"less")
        self.wants: list[BlobRequest] = []

    def offer(self, held: str | None = None) -> Offer:
        plain = Offer("job", 1, 1, 7, DIGEST, DIGEST, (1,), 3, self.weights, self.graph, self.graph, {})
        return replace(plain, weights_codec="int8", coded=self.less, held=held)

    def answers(self, wants: list[BlobRequest]) -> Iterator[bytes]:
        self.wants += wants
        for want in wants:
            chunks = BlobSender(self.store).answer(want)
            assert not isinstance(chunks, BlobNotFound)
            yield from chunks

    def feed(self, downloads: BlobDownloads) -> None:
        """Answer everything, until nothing is asked for any more."""
        wants = downloads.start(0.0)
        while wants:
            wants = [w for raw in list(self.answers(wants)) for w in downloads.chunk(Chunk.parse(raw), 0.0)]
        assert downloads.done

    def pulled(self) -> set[str]:
        return {w.sha256 for w in self.wants}


def digests(*refs: BlobRef) -> set[str]:
    return {r.sha256 for r in refs}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "device", durable=False)


def test_what_can_be_decoded_is_pulled_instead_of_the_weights(source: Source, store: BlobStore) -> None:
    source.feed(BlobDownloads(store, source.offer(), 0.0))
    assert source.pulled() == digests(source.less, source.graph)


@pytest.mark.parametrize("plainly", [False, True])
def test_what_can_not_be_decoded_is_pulled_whole(source: Source, store: BlobStore, plainly: bool) -> None:
    offer = source.offer(held=None if plainly else "f" * 64)
    source.feed(BlobDownloads(store, offer, 0.0, plainly=plainly))
    assert source.pulled() == digests(source.weights, source.graph)


def test_what_could_be_decoded_and_is_gone_is_done_without(source: Source, store: BlobStore) -> None:
    downloads = BlobDownloads(store, source.offer(), 0.0)
    downloads.start(0.0)
    assert {w.sha256 for w in downloads.gone(source.less.sha256, 0.0)} == digests(source.weights)
    assert downloads.gone(source.less.sha256, 0.0) == []
    source.feed(downloads)
    assert store.has(source.weights.sha256)


def test_weights_or_a_graph_that_are_gone_end_it(source: Source, store: BlobStore) -> None:
    for ref in (source.weights, source.graph):
        with pytest.raises(ProtocolError, match="no longer has"):
            BlobDownloads(store, source.offer(), 0.0, plainly=True).gone(ref.sha256, 0.0)


def test_what_a_server_names_wrongly_is_found_out_where_it_is_read(source: Source, store: BlobStore) -> None:
    data = source.store.read(source.weights.sha256)
    wrong = replace(source.weights, sha256="ab" * 32)
    downloads = BlobDownloads(store, replace(source.offer(), weights=wrong), 0.0, plainly=True)
    wants = downloads.start(0.0)
    while wants:
        want = wants.pop(0)
        if want.sha256 == wrong.sha256:
            payload = leaf_table(data) if want.part == "leaves" else data[want.first * LEAF :][: want.count * LEAF]
            wants += downloads.chunk(Chunk(want.sha256, want.part, want.first, payload), 0.0)
        else:
            wants += [w for raw in source.answers([want]) for w in downloads.chunk(Chunk.parse(raw), 0.0)]
    assert downloads.done
    with pytest.raises(StorageError, match="is damaged"):
        store.read(wrong.sha256)
