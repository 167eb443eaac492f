"""A device makes its weights of slabs, and pulls them whole where that can't be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError, StorageError
from fedprune.model.recipe import Recipe
from fedprune.updates.width_deltas import slab
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest, Offer
from fedprune.wire.transfer import PATIENCE, BlobSender
from fedprune_device.network.blob_download import BlobDownloads
from fedprune_device.network.offer_checks import same_work, slabs_fit
from fedprune_device.storage.state_directory import DeviceStore
from support.fakes.agent_fleet import TOPICS

pytestmark = pytest.mark.board


class Source:
    """A server's store with a ladder of three widths."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        whole = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
        self.files = [{"w": np.ascontiguousarray(whole[:n, : n // 2])} for n in (100, 200, 300)]
        self.weights = [self.store.put(tensorfile.encode(f)) for f in self.files]
        self.slabs = [self.weights[0]]
        for below, above in zip(self.files, self.files[1:], strict=False):
            place = {"w": tuple(np.arange(n) for n in below["w"].shape)}
            self.slabs.append(self.store.put(tensorfile.encode(slab(below, above, place))))
        self.graph = self.store.put(b"graph" * 10_000)
        self.wants: list[BlobRequest] = []

    def offer(self, step: int, **changes: Any) -> Offer:
        slabs: tuple[BlobRef, ...] | None = tuple(self.slabs[: step + 1])
        fields = {"architecture": "a" * 64, "selection": "b" * 64, "widths": (1,), "classes": 3}
        offer = Offer(
            "job", 1, 1, 7, **fields, weights=self.weights[step], training=self.graph, inference=self.graph,
            recipe=Recipe().to_dict(), slabs=slabs,
        )  # fmt: skip
        return replace(offer, **changes)

    def answers(self, wants: list[BlobRequest]) -> Iterator[bytes]:
        self.wants += wants
        for want in wants:
            found = BlobSender(self.store).answer(want)
            assert not isinstance(found, BlobNotFound)
            yield from found

    def feed(self, downloads: BlobDownloads, now: float = 0.0, *, shared: bool = True) -> None:
        """Answer everything, until nothing is asked for any more."""
        wants = downloads.start(now)
        while wants:
            chunks = list(self.answers(wants))
            wants = [w for raw in chunks for w in downloads.chunk(Chunk.parse(raw), now, shared=shared)]

    def pulled(self) -> set[str]:
        return {w.sha256 for w in self.wants}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "device", durable=False)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_weights_are_made_of_slabs_to_the_bit(source: Source, store: BlobStore, step: int) -> None:
    offer = source.offer(step)
    downloads = BlobDownloads(store, offer, 0.0)
    assert not downloads.done
    source.feed(downloads)
    assert downloads.done
    assert store.read(offer.weights.sha256) == tensorfile.encode(source.files[step])
    assert source.pulled() == {r.sha256 for r in (*source.slabs[: step + 1], source.graph)}
    assert all(w.shared for w in source.wants)


def test_it_listens_to_what_it_lacks_and_to_nothing_wider(source: Source, store: BlobStore) -> None:
    downloads = BlobDownloads(store, source.offer(1), 0.0)
    wanted = {TOPICS.shared(r.sha256, "job") for r in (*source.slabs[:2], source.graph)}
    assert downloads.listens(TOPICS) == wanted
    source.feed(downloads)
    assert downloads.listens(TOPICS) == frozenset()


def test_what_others_asked_for_is_taken(source: Source, store: BlobStore) -> None:
    """All chunks come by themselves, the last ones first; the leaf table alone must be asked for."""
    downloads = BlobDownloads(store, source.offer(2), 0.0)
    tables = [w for w in downloads.start(0.0) if w.part == "leaves"]
    for raw in source.answers(tables):
        downloads.chunk(Chunk.parse(raw), 0.0, shared=True)
    for ref in (*source.slabs, source.graph):
        for first in reversed(range(ref.leaf_count)):
            for raw in source.answers([BlobRequest(ref.sha256, "data", first, 1)]):
                downloads.chunk(Chunk.parse(raw), 0.0, shared=True)
    assert downloads.done


def test_slabs_of_other_weights_are_found_out_and_the_weights_pulled_whole(source: Source, store: BlobStore) -> None:
    other = source.store.put(tensorfile.encode({"w": source.files[2]["w"] + np.float32(1)}))
    downloads = BlobDownloads(store, source.offer(2, weights=other), 0.0)
    source.feed(downloads)
    assert downloads.done
    assert store.has(other.sha256)
    assert other.sha256 in source.pulled()


@pytest.mark.parametrize("junk", [b"no tensor file", tensorfile.encode({"v": np.zeros(3, np.float32)})])
def test_what_is_no_slab_costs_nothing_but_the_way(source: Source, store: BlobStore, junk: bytes) -> None:
    source.slabs[1] = source.store.put(junk)
    downloads = BlobDownloads(store, source.offer(2), 0.0)
    source.feed(downloads)
    assert downloads.done
    assert store.read(source.weights[2].sha256) == tensorfile.encode(source.files[2])


def test_a_slab_that_is_gone_is_done_without(source: Source, store: BlobStore) -> None:
    downloads = BlobDownloads(store, source.offer(2), 0.0)
    downloads.start(0.0)
    wants = downloads.gone(source.slabs[1].sha256, 0.0)
    assert {w.sha256 for w in wants} == {source.weights[2].sha256}
    assert downloads.gone(source.slabs[1].sha256, 0.0) == []
    source.feed(downloads)
    assert downloads.done


def test_weights_or_a_graph_that_are_gone_end_it(source: Source, store: BlobStore) -> None:
    for sha256 in (source.weights[0].sha256, source.graph.sha256):
        with pytest.raises(ProtocolError, match="no longer has"):
            BlobDownloads(store, source.offer(0), 0.0).gone(sha256, 0.0)


def test_a_device_that_hears_nothing_on_shared_topics_asks_on_its_own(source: Source, store: BlobStore) -> None:
    downloads = BlobDownloads(store, source.offer(2), 0.0)
    downloads.start(0.0)
    wants = downloads.tick(PATIENCE + 1)
    assert downloads.deaf
    assert wants
    assert not any(w.shared for w in wants)
    assert downloads.listens(TOPICS) == frozenset()
    source.feed(downloads, PATIENCE + 1, shared=False)
    assert downloads.done


def test_a_device_that_hears_something_goes_on_listening(source: Source, store: BlobStore) -> None:
    downloads = BlobDownloads(store, source.offer(2), 0.0)
    raw = next(source.answers([w for w in downloads.start(0.0) if w.part == "leaves"]))
    downloads.chunk(Chunk.parse(raw), 0.1, shared=True)
    assert all(w.shared for w in downloads.tick(PATIENCE + 1))
    assert not downloads.deaf


def test_without_slabs_or_where_they_do_not_fit_nothing_is_different(source: Source, store: BlobStore) -> None:
    plain = BlobDownloads(store, source.offer(2, slabs=None), 0.0)
    assert plain.listens(TOPICS) == frozenset()
    assert not any(w.shared for w in plain.start(0.0))
    source.feed(plain)
    assert source.pulled() == {source.weights[2].sha256, source.graph.sha256}
    source.wants.clear()
    tight = BlobDownloads(BlobStore(store.root / "new"), source.offer(2), 0.0, slabs=False)
    source.feed(tight)
    assert tight.done
    assert source.pulled() == {source.weights[2].sha256, source.graph.sha256}


def test_slabs_stay_on_the_disk_until_the_weights_are_made(source: Source, tmp_path: Path) -> None:
    offer = source.offer(2)
    with DeviceStore(tmp_path / "state") as board:
        board.accept(offer)
        board.blobs.put(source.store.read(source.slabs[1].sha256))
        board.collect()
        assert board.blobs.has(source.slabs[1].sha256)
        source.feed(BlobDownloads(board.blobs, offer, 0.0))
        board.collect()
        assert set(board.blobs.names()) == {offer.weights.sha256, source.graph.sha256}


def test_slabs_do_not_make_an_offer_other_work(source: Source) -> None:
    assert same_work(source.offer(2), source.offer(2, slabs=None, attempt=2))
    assert not same_work(source.offer(2), source.offer(1))


def coded(source: Source, **changes: Any) -> Offer:
    """An offer with slabs whose weights can also be decoded from less."""
    return source.offer(2, weights_codec="zlib", coded=source.store.put(b"less"), **changes)


def test_what_can_be_decoded_is_pulled_before_all_slabs_and_on_its_own_topic(source: Source, store: BlobStore) -> None:
    offer = coded(source)
    downloads = BlobDownloads(store, offer, 0.0)
    assert downloads.listens(TOPICS) == {TOPICS.shared(source.graph.sha256, "job")}
    source.feed(downloads)
    assert downloads.done
    assert source.pulled() == {offer.coded.sha256, source.graph.sha256}
    assert {w.sha256 for w in source.wants if w.shared} == {source.graph.sha256}


def test_who_asks_for_nothing_that_is_shared_does_not_take_itself_for_deaf(source: Source, store: BlobStore) -> None:
    store.put(source.store.read(source.graph.sha256))
    for offer, slabs in ((coded(source), True), (source.offer(2), False)):
        downloads = BlobDownloads(store, offer, 0.0, slabs=slabs)
        downloads.start(0.0)
        downloads.tick(PATIENCE + 1)
        assert not downloads.deaf
        source.feed(downloads, PATIENCE + 1, shared=False)
        assert downloads.done


@pytest.mark.parametrize("slabs", [True, False])
@pytest.mark.parametrize("why", ["held is not here", "plainly"])
def test_what_can_not_be_decoded_is_made_of_slabs_or_pulled_whole(
    source: Source, store: BlobStore, why: str, slabs: bool
) -> None:
    offer = coded(source, held=None if why == "plainly" else "f" * 64)
    downloads = BlobDownloads(store, offer, 0.0, slabs=slabs, plainly=why == "plainly")
    source.feed(downloads)
    assert downloads.done
    assert store.has(offer.weights.sha256)
    way = source.slabs if slabs else [offer.weights]
    assert source.pulled() == {r.sha256 for r in (*way, source.graph)}


def test_what_could_be_decoded_and_is_gone_is_done_without(source: Source, store: BlobStore) -> None:
    offer = coded(source)
    downloads = BlobDownloads(store, offer, 0.0)
    downloads.start(0.0)
    assert {w.sha256 for w in downloads.gone(offer.coded.sha256, 0.0)} == {offer.weights.sha256}
    source.feed(downloads)
    assert downloads.done
    assert store.has(offer.weights.sha256)


def test_room_for_slabs_counts_what_codecs_need_beside_them(source: Source, tmp_path: Path) -> None:
    offer = coded(source, codec="int8")
    with DeviceStore(tmp_path / "state") as board:
        # As received, twice the weights, what serves, what was left out before and after; and both ways of the weights.
        needed = 6 * offer.weights.size + 2 * source.graph.size + offer.coded.size
        room = SimpleNamespace(blobs=board.blobs, free_bytes=lambda: needed + sum(r.size for r in source.slabs))
        assert slabs_fit(offer, room)  # type: ignore[arg-type]
        room.free_bytes = lambda: needed + sum(r.size for r in source.slabs) - 1
        assert not slabs_fit(offer, room)  # type: ignore[arg-type]


def test_what_a_server_names_wrongly_is_found_out_where_it_is_read(source: Source, store: BlobStore) -> None:
    data = source.store.read(source.weights[2].sha256)
    wrong = replace(source.weights[2], sha256="ab" * 32)
    downloads = BlobDownloads(store, source.offer(2, weights=wrong, slabs=None), 0.0)
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
