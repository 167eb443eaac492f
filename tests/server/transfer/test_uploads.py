"""Updates are pulled a few at a time; who is stuck makes room, who lies is found out."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobRequest, UploadRequest, UploadResult
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.upload_place import ArrivedUpdate, FailedUpload, UploadEnd, UploadPlace
from fedprune_server.transfer.uploads import REQUEST_REPEAT_S, STALL_TIMEOUT_S, Uploads


class World:
    """Devices with one update each."""

    def __init__(self, folder: Path, concurrent: int = 2, leaves: int = 3) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        self.device = BlobStore(folder / "device", durable=False)
        self.uploads = Uploads(BucketSync(self.store), concurrent)
        self.leaves = leaves

    def ref(self, name: str) -> BlobRef:
        return self.device.put(name.encode() * (self.leaves * LEAF_BYTES // len(name)))

    def announce(self, name: str, now: float = 0.0) -> list[tuple[str, BlobRequest]]:
        return self.uploads.add(name, 1, 1, self.ref(name), now)

    def answer(self, wants: list[tuple[str, BlobRequest]], now: float = 0.0) -> list[tuple[str, BlobRequest]]:
        """Send what is wanted; returns what is wanted then."""
        then = []
        for device, want in wants:
            for raw in BlobSender(self.device).answer(want):
                assert isinstance(raw, bytes)
                then += self.uploads.on_chunk(device, Chunk.parse(raw), now)
        return then


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def finish(world: World, wants: list[tuple[str, BlobRequest]]) -> None:
    while wants:
        wants = world.answer(wants)


def test_without_a_place_for_uploads_a_device_that_could_upload_is_pulled_from(world: World) -> None:
    world.uploads.on_birth("a", 1, 0.0, 0.0, can_upload=True)
    finish(world, world.announce("a"))
    digest = world.ref("a").sha256
    assert world.uploads.take_outcomes() == [ArrivedUpdate("a", 1, 1, digest)]
    assert world.store.read(digest) == world.device.read(digest)


def test_an_announcement_that_comes_twice_starts_nothing_twice(world: World) -> None:
    assert world.announce("a")
    assert world.announce("a") == []


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
            world.uploads.on_chunk(name, Chunk.parse(raw), float(now))
        asked |= {device for device, _ in world.uploads.on_tick(float(now))}
    assert ("c" in asked) == passed


def test_what_had_arrived_before_a_drop_is_not_fetched_again(tmp_path: Path) -> None:
    world = World(tmp_path, leaves=80)
    world.answer(world.answer(world.announce("a")))
    before = world.uploads.progress("a")
    assert before is not None
    assert before[0] > 0
    world.uploads.drop("a")
    assert min(w.first for _, w in world.announce("a")) >= before[0]


def test_a_replaced_update_leaves_no_pieces_on_the_disk(tmp_path: Path) -> None:
    world = World(tmp_path, leaves=80)
    world.answer(world.answer(world.announce("a")))
    pieces = set((world.store.root / "partial").iterdir())
    assert pieces
    world.uploads.add("a", 1, 1, BlobRef.of(b"trained once more" * LEAF_BYTES), 0.0)
    assert not pieces & set((world.store.root / "partial").iterdir())


def test_after_a_reconnection_everything_is_asked_for_again(world: World) -> None:
    wants = world.announce("a")
    world.uploads.on_reconnect(1.0)
    assert world.uploads.on_tick(2.0) == []  # whether it is there nobody knows
    assert world.uploads.on_birth("a", 2, 0.0, 2.0) == wants


def test_a_device_on_a_new_connection_is_asked_again_and_on_the_same_one_not(world: World) -> None:
    assert world.uploads.on_birth("a", 1, 0.0, 0.0) == []
    wants = world.announce("a")
    assert world.uploads.on_birth("a", 1, 0.0, 1.0) == []
    assert world.uploads.on_birth("a", 2, 0.0, 2.0) == wants


def test_a_device_that_says_how_slow_its_way_is_is_given_that_time(world: World) -> None:
    world.uploads.on_birth("a", 1, 20.0, 0.0)
    world.announce("a")
    world.announce("b")
    assert {device for now in range(1, 40) for device, _ in world.uploads.on_tick(float(now))} == {"b"}


def test_a_reference_that_contradicts_itself_spoils_the_update(world: World) -> None:
    small = BlobRef.of(b"small")
    world.uploads.add("a", 1, 1, BlobRef(small.sha256, small.size, "0" * 64), 0.0)
    (outcome,) = world.uploads.take_outcomes()
    assert isinstance(outcome, FailedUpload)
    assert "contradicts itself" in outcome.reason


def test_a_device_s_name_for_its_update_is_not_taken_on_trust(world: World) -> None:
    data = b"a" * (3 * LEAF_BYTES)
    named = BlobRef("ab" * 32, len(data), BlobRef.of(data).leaves)
    wants = world.uploads.add("a", 1, 1, named, 0.0)
    while wants:
        _, want = wants.pop(0)
        payload = leaf_table(data) if want.part == "leaves" else data
        wants += world.uploads.on_chunk("a", Chunk(named.sha256, want.part, 0, payload), 0.0)
    (outcome,) = world.uploads.take_outcomes()
    assert isinstance(outcome, FailedUpload)
    assert "don't make up the blob" in outcome.reason
    assert not world.store.has(named.sha256)


def test_a_device_that_keeps_sending_damage_spoils_its_update(world: World) -> None:
    ref = world.ref("a")
    wants = world.announce("a")
    for _ in range(50):
        for _, want in wants:
            size = LEAF_BYTES if want.part == "data" else ref.leaf_count * 32
            wants = world.uploads.on_chunk("a", Chunk(ref.sha256, want.part, want.first, b"x" * size), 0.0)
    (outcome,) = world.uploads.take_outcomes()
    assert isinstance(outcome, FailedUpload)
    assert "damaged" in outcome.reason


def test_an_update_that_is_gone_is_spoilt(world: World) -> None:
    world.announce("a")
    world.uploads.on_blob_missing("a", world.ref("a").sha256, 0.0)
    assert isinstance(world.uploads.take_outcomes()[0], FailedUpload)


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
                world.uploads.on_birth(name, session, 0.0, now)
                there.add(name)
            elif kind == "drop":
                world.uploads.drop(name)
                running.discard(name)
                line = [n for n in line if n != name]
            elif kind == "lost":
                world.uploads.on_reconnect(now)
                line, running, there, all_there_at = [*sorted(running), *line], set(), set(), now + STALL_TIMEOUT_S
            if kind in ("add", "born"):
                for device in [n for n in line if n in there or now >= all_there_at][: 2 - len(running)]:
                    line.remove(device)
                    running.add(device)
            assert {n for n in "abcdef" if world.uploads.progress(n) is not None} == running


# Devices that upload to a web server.


class Place(UploadPlace):
    """A web server that takes what a test says."""

    accepts_uploads = True

    def __init__(self) -> None:
        super().__init__()
        self.awaited: dict[str, BlobRef] = {}
        self.bytes: dict[str, int] = {}
        self.end = self._ends.put

    def request_upload(self, device: str, ref: BlobRef) -> UploadRequest:
        self.awaited[device] = ref
        return UploadRequest(ref.sha256, "https://server.example/x")

    def drop(self, device: str) -> None:
        self.awaited.pop(device, None)

    def on_report(self, device: str) -> None:
        self.end(UploadEnd(device, self.awaited[device], stored=False))

    def arrived_bytes(self, device: str) -> int:
        return self.bytes.get(device, 0)


class Web(World):
    """A world whose devices can upload, all but those whose names are capitals."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.place = Place()
        self.uploads = Uploads(BucketSync(self.store), 2, place=self.place)

    def announce(self, name: str, now: float = 0.0) -> list[tuple[str, Any]]:
        return self.uploads.on_birth(name, 1, 0.0, now, can_upload=name.islower()) + super().announce(name, now)

    def store_update(self, name: str) -> None:
        self.store.put(self.device.read(self.ref(name).sha256))
        self.place.end(UploadEnd(name, self.ref(name), stored=True))


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return Web(tmp_path)


def kinds(wants: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(device, want.kind) for device, want in wants]


def test_who_can_upload_is_asked_to_and_the_others_are_pulled_from_in_their_turn(web: Web) -> None:
    assert kinds([w for name in "aBc" for w in web.announce(name)]) == [("a", "upload"), ("B", "want")]
    assert list(web.place.awaited) == ["a"]
    web.store_update("a")
    assert kinds(web.uploads.collect(1.0)) == [("c", "upload")]
    assert web.uploads.take_outcomes() == [ArrivedUpdate("a", 1, 1, web.ref("a").sha256)]
    assert web.uploads.collect(1.0) == []


@pytest.mark.parametrize("reason", ["no route", None])
def test_what_can_t_be_uploaded_is_pulled_in_the_same_place(web: Web, reason: str | None) -> None:
    web.announce("a")
    wants = web.uploads.on_upload_result("a", UploadResult(web.ref("a").sha256, reason), 1.0)
    assert kinds(wants) == [("a", "want")]
    assert web.place.awaited == {}
    (_, request), *_ = web.uploads.on_birth("a", 2, 0.0, 2.0, can_upload=True)
    assert request.kind == "want"  # and not asked to upload it again
    finish(web, wants)
    assert [o.device for o in web.uploads.take_outcomes()] == ["a"]
    assert kinds(web.uploads.add("a", 2, 1, web.ref("b"), 3.0)) == [("a", "upload")]  # but the next one


def test_who_has_heard_nothing_is_asked_again(web: Web) -> None:
    web.announce("a")
    assert web.uploads.on_announcement("a", REQUEST_REPEAT_S - 1) == []
    assert kinds(web.uploads.on_announcement("a", REQUEST_REPEAT_S + 1)) == [("a", "upload")]
    web.place.bytes["a"] = 2 * LEAF_BYTES
    web.uploads.on_tick(2 * REQUEST_REPEAT_S)
    assert web.uploads.progress("a") == (2, 3)
    assert web.uploads.on_announcement("a", 2 * REQUEST_REPEAT_S + 1) == []  # it is on its way
    assert kinds(web.uploads.on_birth("a", 2, 0.0, 2 * REQUEST_REPEAT_S + 2, can_upload=True)) == [("a", "upload")]


def test_a_lost_connection_to_the_broker_stops_no_upload(web: Web) -> None:
    web.announce("a")
    web.announce("B")
    web.uploads.on_reconnect(1.0)
    assert list(web.place.awaited) == ["a"]
    web.store_update("a")
    web.uploads.collect(2.0)
    assert [o.device for o in web.uploads.take_outcomes()] == ["a"]


def test_an_upload_that_is_stuck_makes_room_for_one_that_waits(web: Web) -> None:
    for name in "abc":
        web.announce(name)
    assert web.uploads.on_tick(STALL_TIMEOUT_S - 1) == []
    assert kinds(web.uploads.on_tick(STALL_TIMEOUT_S + 1)) == [("c", "upload"), ("a", "want")]  # a pull is resumed
    assert set(web.place.awaited) == {"c"}
    web.store_update("c")
    assert kinds(web.uploads.collect(STALL_TIMEOUT_S + 2)) == [("b", "want")]


@pytest.mark.parametrize("direct", [False, True])
def test_who_can_upload_no_longer_is_pulled_from(web: Web, direct: bool) -> None:
    web.place.is_direct = direct
    web.announce("a")
    wants = web.uploads.on_birth("a", 2, 0.0, 1.0)
    assert kinds(wants) == [("a", "want")]
    assert web.place.awaited == {}
    finish(web, wants)
    assert [o.device for o in web.uploads.take_outcomes()] == ["a"]


def test_what_nobody_awaits_any_more_is_not_taken(web: Web) -> None:
    web.announce("a")
    assert web.uploads.keep("a", 1, 2) == [web.ref("a").sha256]
    assert web.place.awaited == {}
    web.store_update("a")
    web.uploads.collect(1.0)
    assert not any(isinstance(o, ArrivedUpdate) for o in web.uploads.take_outcomes())


def test_who_turns_out_to_be_able_is_asked_to_upload_what_isn_t_here_yet(web: Web) -> None:
    for name in "ABC":  # as a server that has just started knows them
        web.announce(name)
    for name, kind in (("A", [("A", "upload")]), ("C", [])):
        assert kinds(web.uploads.on_birth(name, 1, 0.0, 1.0, can_upload=True)) == kind
    wants = web.uploads.on_birth("B", 2, 0.0, 1.0)
    while wants:
        wants = web.answer([(device, want) for device, want in wants if want.kind == "want"])
    assert [o.device for o in web.uploads.take_outcomes()] == ["B"]
    assert set(web.place.awaited) == {"A", "C"}


def test_uploads_that_don_t_pass_through_the_server_need_no_place_and_pulls_do(web: Web) -> None:
    web.place.is_direct = True
    assert kinds([w for name in "abcd" for w in web.announce(name)]) == [(name, "upload") for name in "abcd"]
    pulled = [w for n in "abc" for w in web.uploads.on_upload_result(n, UploadResult(web.ref(n).sha256, "no"), 1.0)]
    assert kinds(pulled) == [("a", "want"), ("b", "want")]
    assert web.uploads.on_tick(2 * STALL_TIMEOUT_S)[0][0] == "c"  # only pulls take turns
    assert list(web.place.awaited) == ["d"]
    web.uploads.on_reconnect(2 * STALL_TIMEOUT_S)
    assert "d" not in [device for device, _ in web.uploads.on_birth("d", 2, 0.0, 3 * STALL_TIMEOUT_S, can_upload=True)]
    assert kinds(web.uploads.on_announcement("d", 3 * STALL_TIMEOUT_S)) == [("d", "upload")]


def test_an_upload_past_the_server_leaves_its_place_to_a_pull(web: Web) -> None:
    web.place.is_direct = True
    for name in "ABC":
        web.announce(name)
    assert kinds(web.uploads.on_birth("A", 1, 0.0, 1.0, can_upload=True)) == [("A", "upload"), ("C", "want")]
