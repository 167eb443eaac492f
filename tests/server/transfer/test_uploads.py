"""Updates are pulled a few at a time; who is stuck makes room, who lies is found out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobRequest
from fedprune.wire.transfer import BlobSender
from fedprune_server.transfer.uploads import STALLED_S, Arrived, FailedUpload, Uploads


class World:
    """Devices with one update each."""

    def __init__(self, folder: Path, concurrent: int = 2, leaves: int = 3) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        self.device = BlobStore(folder / "device", durable=False)
        self.uploads = Uploads(self.store, concurrent)
        self.leaves = leaves

    def ref(self, name: str) -> BlobRef:
        return self.device.put(name.encode() * (self.leaves * LEAF // len(name)))

    def announce(self, name: str, now: float = 0.0) -> list[tuple[str, BlobRequest]]:
        return self.uploads.add(name, 1, 1, self.ref(name), now)

    def answer(self, wants: list[tuple[str, BlobRequest]], now: float = 0.0) -> list[tuple[str, BlobRequest]]:
        """Send what is wanted; returns what is wanted then."""
        then = []
        for device, want in wants:
            for raw in BlobSender(self.device).answer(want):
                assert isinstance(raw, bytes)
                then += self.uploads.chunk(device, Chunk.parse(raw), now)
        return then


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def finish(world: World, wants: list[tuple[str, BlobRequest]]) -> None:
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


@pytest.mark.parametrize(("every_s", "passed"), [(20, True), (3, False)])
def test_one_that_sends_a_leaf_now_and_then_makes_room_for_one_that_waits(
    tmp_path: Path, every_s: int, passed: bool
) -> None:
    world = World(tmp_path, leaves=80)
    wants = {name: world.announce(name) for name in "abc"}
    leaves = {
        name: BlobSender(world.device).answer(BlobRequest(world.ref(name).sha256, "data", 0, 80), 40_000)
        for name in "ab"
    }
    for name in "ab":
        world.answer(wants[name])  # the leaf tables
    asked: set[str] = set()
    for now in range(every_s, 61, every_s):
        for name, chunks in leaves.items():
            raw = next(iter(chunks))
            assert isinstance(raw, bytes)
            world.uploads.chunk(name, Chunk.parse(raw), float(now))
        asked |= {device for device, _ in world.uploads.tick(float(now))}
    assert ("c" in asked) == passed


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
    world.uploads.interrupted(1.0)
    assert world.uploads.tick(2.0) == []  # whether it is there nobody knows
    assert world.uploads.born("a", 2, 0.0, 2.0) == wants


def test_after_a_reconnection_nobody_who_is_away_takes_the_place_of_who_is_there(world: World) -> None:
    for name in "abcd":
        world.announce(name)
    world.uploads.interrupted(1.0)
    asked = [world.uploads.born(name, 2, 0.0, 2.0) for name in "dcb"]
    assert [{device for device, _ in wants} for wants in asked] == [{"d"}, {"c"}, set()]
    later = world.uploads.tick(1.0 + STALLED_S)  # a birth got lost, or a board that never says one
    assert {device for device, _ in later} <= {"c", "d"}


def test_after_a_reconnection_an_announcement_shows_that_its_device_is_there(world: World) -> None:
    wants = world.announce("a")
    world.uploads.interrupted(1.0)
    assert world.announce("a", 2.0) == wants
    assert world.uploads.born("a", 2, 0.0, 3.0) == []  # it was asked on this connection
    assert world.uploads.born("a", 2, 0.0, 4.0) == []


def test_a_device_on_a_new_connection_is_asked_again_and_on_the_same_one_not(world: World) -> None:
    assert world.uploads.born("a", 1, 0.0, 0.0) == []
    wants = world.announce("a")
    assert world.uploads.born("a", 1, 0.0, 1.0) == []
    assert world.uploads.born("a", 2, 0.0, 2.0) == wants


def test_a_device_that_says_how_slow_its_way_is_is_given_that_time(world: World) -> None:
    world.uploads.born("a", 1, 20.0, 0.0)
    world.announce("a")
    world.announce("b")
    asked = {device for now in range(1, 40) for device, _ in world.uploads.tick(float(now))}
    assert asked == {"b"}


def test_a_reference_that_contradicts_itself_spoils_the_update(world: World) -> None:
    small = BlobRef.of(b"small")
    world.uploads.add("a", 1, 1, BlobRef(small.sha256, small.size, "0" * 64), 0.0)
    (outcome,) = world.uploads.outcomes()
    assert isinstance(outcome, FailedUpload)
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
    assert isinstance(outcome, FailedUpload)
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
    assert isinstance(outcome, FailedUpload)
    assert "damaged" in outcome.reason


def test_an_update_that_is_gone_is_spoilt(world: World) -> None:
    world.announce("a")
    world.uploads.gone("a", world.ref("a").sha256, 0.0)
    assert isinstance(world.uploads.outcomes()[0], FailedUpload)


def test_a_chunk_that_nobody_waits_for_is_ignored(world: World) -> None:
    assert world.uploads.chunk("x", Chunk("0" * 64, "data", 0, b"x"), 0.0) == []


def test_uploads_of_a_round_that_is_over_are_dropped(world: World) -> None:
    world.announce("a")
    world.announce("b")
    assert world.uploads.keep("a", 1, 1) == []
    assert world.uploads.keep("b", 2, 1) == [world.ref("b").sha256]
    assert world.uploads.devices() == ["a"]
    assert world.uploads.progress("b") is None


STEPS = st.tuples(st.sampled_from(["add", "add", "born", "drop", "lost", "wait"]), st.sampled_from("abcdef"))


@given(st.lists(STEPS, max_size=40))
@settings(max_examples=60)
def test_whoever_is_there_and_waits_the_longest_is_next(steps: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world, now = World(Path(folder), leaves=1), 0.0
        line, running, there, all_there_at = list[str](), set[str](), set[str](), 0.0
        for session, (kind, name) in enumerate(steps):
            now += 5.0 if kind == "wait" else 0.01
            if kind == "add":
                world.announce(name, now)
                there.add(name)
                line += [] if name in running or name in line else [name]
            elif kind == "born":
                world.uploads.born(name, session, 0.0, now)
                there.add(name)
            elif kind == "drop":
                world.uploads.drop(name)
                running.discard(name)
                line = [n for n in line if n != name]
            elif kind == "lost":
                world.uploads.interrupted(now)
                line, running, there, all_there_at = [*sorted(running), *line], set(), set(), now + STALLED_S
            if kind in ("add", "born"):
                for device in [n for n in line if n in there or now >= all_there_at][: 2 - len(running)]:
                    line.remove(device)
                    running.add(device)
            assert {n for n in "abcdef" if world.uploads.progress(n) is not None} == running
