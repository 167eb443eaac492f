"""A blob that shares leaves with one that is here: only the others travel."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import Offer
from fedprune.wire.transfer import Pull
from fedprune_device.network.http_download import reuse_leaves
from fedprune_device.storage.state_directory import DeviceStore

pytestmark = pytest.mark.board

DIGEST = "ab" * 32
LETTERS = {letter: random.Random(letter).randbytes(LEAF_BYTES) for letter in "abcdefgh"}


def blob(text: str, tail: str = "") -> bytes:
    """Leaves that letters stand for, and a last one that is shorter."""
    return b"".join(LETTERS[letter] for letter in text) + tail.encode()


def pull_leaves(source: BlobStore, target: BlobStore, ref: BlobRef, lend: Any = None) -> list[int]:
    """Leaves that had to travel, in the order in which they came."""
    pull, travelled = Pull(ref, target.partial(ref), lend=lend or partial(reuse_leaves, target)), list[int]()
    wants = pull.start(0.0)
    while not pull.is_done:
        answers = [BlobSender(source).answer(want) for want in wants]
        chunks = [Chunk.parse(raw) for answer in answers if isinstance(answer, Iterator) for raw in answer]
        assert chunks
        travelled += [i for c in chunks if c.part == "data" for i, _ in c.leaves()]
        wants = [w for c in chunks for w in pull.on_chunk(c, 0.0)]
    return travelled


@given(
    st.lists(st.tuples(st.text("abcdefgh", max_size=6), st.sampled_from(["", "x", "y"])), max_size=4),
    st.text("abcdefgh", min_size=1, max_size=10),
    st.sampled_from(["", "x", "y"]),
)
@settings(max_examples=60, deadline=None)
def test_only_leaves_that_nobody_has_travel(donors: list[tuple[str, str]], text: str, tail: str) -> None:
    with TemporaryDirectory() as folder:
        source, target = (BlobStore(Path(folder) / name, durable=False) for name in "ab")
        for donor in donors:
            target.put(blob(*donor))
        ref = source.put(blob(text, tail))
        if target.has(ref.sha256):
            return
        here = {leaf for leaves, end in donors for leaf in (*leaves, end)}
        lacking = [i for i, leaf in enumerate([*text, *([tail] if tail else [])]) if leaf not in here]
        assert pull_leaves(source, target, ref) == lacking
        assert target.read(ref.sha256) == blob(text, tail)


def test_a_leaf_that_has_rotted_in_the_donor_travels(tmp_path: Path) -> None:
    source, target = BlobStore(tmp_path / "a", durable=False), BlobStore(tmp_path / "b", durable=False)
    with target.path(target.put(blob("abcd")).sha256).open("r+b") as file:
        file.seek(LEAF_BYTES + 7)
        file.write(b"rot")
    ref = source.put(blob("abcdefgh"))
    assert pull_leaves(source, target, ref) == [1, 4, 5, 6, 7]
    assert target.read(ref.sha256) == blob("abcdefgh")


def offer(number: int, weights: BlobRef, **fields: Any) -> Offer:
    graph = BlobRef.of(b"graph")
    return Offer("job", number, 1, 7, DIGEST, DIGEST, (1,), 2, weights, graph, graph, {}, **fields)


def test_the_last_weights_stay_until_the_next_ones_are_here(tmp_path: Path) -> None:
    weights = [blob("ab"), blob("ac"), blob("ad")]
    refs = [BlobRef.of(w) for w in weights]
    with DeviceStore(tmp_path) as store:
        for number, ref in enumerate(refs):
            store.accept(offer(number, ref))
            store.delete_unneeded_blobs()
            before = {refs[number - 1].sha256} if number else set()
            assert set(store.blobs.names()) == before
            if number == 1:
                store.accept(offer(number, ref, mask=BlobRef.of(b"")))  # another one comes before they are here
                store.delete_unneeded_blobs()
                assert set(store.blobs.names()) == before
            store.blobs.put(weights[number])
            store.delete_unneeded_blobs()
            assert store.blobs.names() == [ref.sha256]
            store.finish_offer()
            store.delete_unneeded_blobs()
            assert store.blobs.names() == [ref.sha256]
        store.accept(offer(9, BlobRef.of(blob("ae"))))
    with DeviceStore(tmp_path) as store:  # also through a restart
        store.delete_unneeded_blobs()
        assert store.blobs.names() == [refs[2].sha256]
        assert store.reclaimable_bytes(offer(10, BlobRef.of(blob("af")))) >= 2 * LEAF_BYTES
        store.drop_donor()
        store.delete_unneeded_blobs()
        assert store.blobs.names() == []
