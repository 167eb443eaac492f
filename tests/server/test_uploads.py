"""Updates are pulled a few at a time; who is stuck makes room, who lies is found out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprune.blobs import BlobStore
from fedprune.wire.blob_ref import LEAF, BlobRef, leaf_table
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import Want
from fedprune.wire.transfer import Serve
from fedprune_server.uploads import STALLED_S, Arrived, Spoilt, Uploads


class World:
    """Devices with one update each."""

    def __init__(self, folder: Path, concurrent: int = 2, leaves: int = 3) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        self.device = BlobStore(folder / "device", durable=False)
        self.uploads = Uploads(self.store, concurrent)
        self.leaves = leaves

    def ref(self, name: str) -> BlobRef:
        return self.device.put(name.encode() * (self.leaves * LEAF // len(name)))

    def announce(self, name: str, now: float = 0.0) -> list[tuple[str, Want]]:
        return self.uploads.add(name, 1, 1, self.ref(name), now)

    def answer(self, wants: list[tuple[str, Want]], now: float = 0.0) -> list[tuple[str, Want]]:
        """Send what is wanted; returns what is wanted then."""
        then = []
        for device, want in wants:
            for raw in Serve(self.device).answer(want):
                assert isinstance(raw, bytes)
                then += self.uploads.chunk(device, Chunk.parse(raw), now)
        return then


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def finish(world: World, wants: list[tuple[str, Want]]) -> None:
    while wants:
        wants = world.answer(wants)


def test_an_update_arrives_whole(world: World) -> None:
    finish(world, world.announce("a"))
    digest = world.ref("a").sha256
    assert world.uploads.outcomes() == [Arrived("a", 1, 1, digest)]
    assert world.store.read(digest) == world.device.read(digest)


def test_the_very_update_that_is_fetched_or_waits_is_known(world: World) -> None:
    wants = [w for name in "abc" for w in world.announce(name)]
    assert all(world.uploads.fetching(name, 1, 1, world.ref(name)) for name in "abc")
    assert not world.uploads.fetching("a", 1, 2, world.ref("a"))
    assert not world.uploads.fetching("a", 1, 1, world.ref("b"))
    finish(world, wants)
    assert not any(world.uploads.fetching(name, 1, 1, world.ref(name)) for name in "abc")


def test_only_a_few_are_pulled_at_a_time(world: World) -> None:
    wants = [w for name in "abcd" for w in world.announce(name)]
    assert {device for device, _ in wants} == {"a", "b"}


def test_those_that_wait_have_their_turn(world: World) -> None:
    finish(world, [w for name in "abcd" for w in world.announce(name)])
    assert [o.device for o in world.uploads.outcomes()] == ["a", "b", "c", "d"]


def test_an_announcement_that_comes_twice_starts_nothing_twice(world: World) -> None:
    assert world.announce("a")
    assert world.announce("a") == []


def test_one_that_is_stuck_makes_room_for_one_that_waits(world: World) -> None:
    for name in "abc":
        world.announce(name)
    wants = world.uploads.tick(STALLED_S + 1)
    assert "c" in {device for device, _ in wants}


def test_what_had_arrived_before_a_drop_is_not_fetched_again(tmp_path: Path) -> None:
    world = World(tmp_path, leaves=80)
    world.answer(world.answer(world.announce("a")))
    before = world.uploads.progress("a")
    assert before is not None
    assert before[0] > 0
    world.uploads.drop("a")
    wants = world.announce("a")
    assert min(w.first for _, w in wants) >= before[0]


def test_after_a_reconnection_everything_is_asked_for_again(world: World) -> None:
    wants = world.announce("a")
    assert world.uploads.restart(1.0) == wants


def test_a_reference_that_contradicts_itself_spoils_the_update(world: World) -> None:
    small = BlobRef.of(b"small")
    world.uploads.add("a", 1, 1, BlobRef(small.sha256, small.size, "0" * 64), 0.0)
    (outcome,) = world.uploads.outcomes()
    assert isinstance(outcome, Spoilt)
    assert "contradicts itself" in outcome.reason


def test_a_device_s_name_for_its_update_is_not_taken_on_trust(world: World) -> None:
    data = b"a" * (3 * LEAF)
    named = BlobRef("ab" * 32, len(data), BlobRef.of(data).leaves)
    wants = world.uploads.add("a", 1, 1, named, 0.0)
    while wants:
        _, want = wants.pop(0)
        payload = leaf_table(data) if want.part == "leaves" else data
        wants += world.uploads.chunk("a", Chunk(named.sha256, want.part, 0, payload), 0.0)
    (outcome,) = world.uploads.outcomes()
    assert isinstance(outcome, Spoilt)
    assert "don't make up the blob" in outcome.reason
    assert not world.store.has(named.sha256)


def test_a_device_that_keeps_sending_damage_spoils_its_update(world: World) -> None:
    ref = world.ref("a")
    wants = world.announce("a")
    for _ in range(50):
        for _, want in wants:
            size = LEAF if want.part == "data" else ref.leaf_count * 32
            wants = world.uploads.chunk("a", Chunk(ref.sha256, want.part, want.first, b"x" * size), 0.0)
    (outcome,) = world.uploads.outcomes()
    assert isinstance(outcome, Spoilt)
    assert "damaged" in outcome.reason


def test_an_update_that_is_gone_is_spoilt(world: World) -> None:
    world.announce("a")
    world.uploads.gone("a", world.ref("a").sha256, 0.0)
    assert isinstance(world.uploads.outcomes()[0], Spoilt)


def test_a_chunk_that_nobody_waits_for_is_ignored(world: World) -> None:
    assert world.uploads.chunk("x", Chunk("0" * 64, "data", 0, b"x"), 0.0) == []


def test_uploads_of_a_round_that_is_over_are_dropped(world: World) -> None:
    world.announce("a")
    world.announce("b")
    assert world.uploads.keep("a", 1, 1) == []
    assert world.uploads.keep("b", 2, 1) == [world.ref("b").sha256]
    assert world.uploads.devices() == ["a"]
    assert world.uploads.progress("b") is None
