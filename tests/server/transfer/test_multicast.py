"""What many devices pull is published once, and everybody gets it, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.state import Progress, Task
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobNotFound, BlobRequest
from fedprune.wire.transfer import MAX_PATIENCE, PATIENCE, BlobSender, Pull
from fedprune_server.transfer.multicast import (
    GATHER_S,
    HOLD_S,
    ON_ITS_WAY_S,
    Audience,
    Multicast,
    Publication,
    shareable,
)

pytestmark = pytest.mark.soak

LEAVES = 100
DATA = random.Random(0).randbytes(LEAVES * LEAF - 5)

SILENCE_S = MAX_PATIENCE + ON_ITS_WAY_S + GATHER_S
"""Seconds in which a device that lacks something is sent a chunk, whether or not it arrives."""

LIMIT_S = 3600.0
"""Virtual seconds of a test. A device's last leaf is sent at least once in `SILENCE_S`, so 28 times in all. At a loss
of 0.3, the chance that any of 8 devices loses any of 100 leaves that often is below 800 * 0.3**28 = 2e-12. In 600 s, a
leaf may be sent only 10 times (the patience doubles from 5 to 120 s), and 800 * 0.3**10 = 0.5%."""


class Site:
    """A store, a state with one offer per device, and what is published from them; time passes as the test says."""

    def __init__(self, folder: Path, devices: int, data: bytes = DATA) -> None:
        self.store = BlobStore(folder / "server", durable=False)
        self.ref = self.store.put(data)
        self.names = [f"d{i}" for i in range(devices)]
        offer = {"weights": self.ref.to_dict(), "slabs": [self.ref.to_dict()]}
        tasks = {n: Task(1, (1,), progress=Progress.OFFERED, offer=offer) for n in self.names}
        self.state = State(model="0" * 64, tasks=tasks)
        self.sharing = Multicast(self.store, Audience(self.state))
        self.folder = folder
        self.now = 0.0
        self.to_all = self.to_one = 0

    def want(
        self, device: str, first: int, count: int, part: str = "data", *, shared: bool = True
    ) -> list[BlobRequest]:
        return self.sharing.add(device, BlobRequest(self.ref.sha256, part, first, count, shared or None), self.now)

    def published(self) -> list[int]:
        """Leaves that are published now, in order."""
        found = []
        while (item := self.sharing.next(self.now)) is not None:
            assert isinstance(item, Publication)
            found += [i for i, _ in Chunk.parse(item.chunk).leaves()]
        return found


class Reader:
    """A device that pulls the blob, and loses what `lost` says."""

    def __init__(self, site: Site, name: str, at: float, lost: Callable[[], bool]) -> None:
        self.site, self.name, self.at, self.lost = site, name, at, lost
        self.store = BlobStore(site.folder / name, durable=False)
        self.pull = Pull(site.ref, self.store.partial(site.ref), shared=True)
        self.begun = False
        self.sent_at = at
        self.asked_at: dict[tuple[str, int], float] = {}

    def turn(self) -> None:
        if not self.begun and self.site.now >= self.at:
            self.begun, self.sent_at = True, self.site.now
            self.ask(self.pull.start(self.site.now))
        elif self.begun and not self.pull.done:
            assert self.site.now - self.sent_at < SILENCE_S
            self.ask(self.pull.on_tick(self.site.now))

    def hear(self, chunk: bytes) -> None:
        if not self.begun or self.pull.done:
            return
        self.sent_at = self.site.now
        if not self.lost():
            self.ask(self.pull.on_chunk(Chunk.parse(chunk), self.site.now))

    def ask(self, wants: list[BlobRequest]) -> None:
        for want in wants:
            for leaf in ((want.part, want.first + i) for i in range(want.count)):
                assert self.site.now - self.asked_at.get(leaf, -PATIENCE) >= PATIENCE  # an answer has its time
                self.asked_at[leaf] = self.site.now
            for alone in self.site.sharing.add(self.name, want, self.site.now):
                self.answer(alone)

    def answer(self, want: BlobRequest) -> None:
        found = BlobSender(self.site.store).answer(want)
        assert not isinstance(found, BlobNotFound)
        for chunk in found:
            self.site.to_one += len(chunk)
            self.hear(chunk)


def spread(site: Site, readers: list[Reader], limit_s: float = LIMIT_S) -> None:
    """Let time pass until everybody has the blob."""
    by_name = {r.name: r for r in readers}
    while not all(r.pull.done for r in readers):
        for reader in readers:
            reader.turn()
        while (item := site.sharing.next(site.now)) is not None:
            if isinstance(item, Publication):
                site.to_all += len(item.chunk)
                for reader in readers:
                    reader.hear(item.chunk)
            else:
                by_name[item[0]].answer(item[1])
        site.now += 0.1
        assert site.now < limit_s
    assert all(r.store.read(site.ref.sha256) == DATA for r in readers)


def never() -> bool:
    return False


def test_a_hundred_devices_cost_one_publication(tmp_path: Path) -> None:
    site = Site(tmp_path, 100)
    spread(site, [Reader(site, n, 0.002 * i, never) for i, n in enumerate(site.names)])
    assert site.to_one == 0
    assert site.to_all <= 1.02 * len(DATA)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 8), st.floats(0, 0.3), st.floats(0, 12), st.integers(0, 99))
@example(devices=6, loss=0.27734375, span=5.75, seed=51)  # one leaf is lost ten times in a row
def test_everybody_gets_it_whatever_is_lost_and_whoever_is_late(
    tmp_path_factory: pytest.TempPathFactory, devices: int, loss: float, span: float, seed: int
) -> None:
    site, luck = Site(tmp_path_factory.mktemp("site"), devices), random.Random(seed)
    readers = [Reader(site, n, luck.uniform(0, span), lambda: luck.random() < loss) for n in site.names]
    spread(site, readers)


def test_a_leaf_waits_for_those_who_have_not_asked_for_it_but_not_for_long(tmp_path: Path) -> None:
    site = Site(tmp_path, 3)
    site.want("d0", 0, 8)
    site.want("d1", 0, 4)
    assert site.published() == []
    site.now = 0.5
    site.want("d2", 0, 2)
    assert site.published() == [0, 1]
    site.now = GATHER_S + 0.01
    assert site.published() == [2, 3, 4, 5, 6, 7]


def test_who_asks_for_what_was_just_published_is_not_answered_again(tmp_path: Path) -> None:
    site = Site(tmp_path, 2)
    for name in site.names:
        site.want(name, 0, 4)
    assert site.published() == [0, 1, 2, 3]
    site.now = 1.0
    assert site.want("d0", 0, 4) == []
    assert site.published() == []
    site.now = 10.0
    assert site.published() == []


def test_leaves_that_several_missed_are_published_again_and_others_answered_alone(tmp_path: Path) -> None:
    site = Site(tmp_path, 3)
    for name in site.names:
        site.want(name, 0, 4)
    assert site.published() == [0, 1, 2, 3]
    site.now = ON_ITS_WAY_S + 0.5
    assert site.want("d0", 1, 2) == site.want("d1", 2, 1) == []
    site.now += GATHER_S
    found = [site.sharing.next(site.now), site.sharing.next(site.now)]
    assert ("d0", BlobRequest(site.ref.sha256, "data", 1, 1)) in found
    again = next(p for p in found if isinstance(p, Publication))
    assert [i for i, _ in Chunk.parse(again.chunk).leaves()] == [2]
    assert not site.sharing


def test_who_comes_when_all_others_are_done_is_answered_at_once_and_alone(tmp_path: Path) -> None:
    site = Site(tmp_path, 2)
    for name in site.names:
        site.want(name, 0, LEAVES)
    assert site.published() == list(range(LEAVES))
    site.now = 60.0
    assert site.want("d1", 8, 4) == [BlobRequest(site.ref.sha256, "data", 8, 4)]


def test_a_small_blob_is_not_repeated_while_it_is_on_its_way(tmp_path: Path) -> None:
    """Links are slow, and each device asks again at a time of its own: all of them would get what one may lack."""
    site = Site(tmp_path, 30, b"small")
    for name in site.names[:20]:
        assert site.want(name, 0, 1) == []
    assert site.published() == [0]
    for name in site.names[:20]:
        site.now += ON_ITS_WAY_S / 21
        assert site.want(name, 0, 1) == []
        assert site.published() == []
    site.now += ON_ITS_WAY_S
    for name in site.names[:10]:
        site.now += 0.6
        alone = site.want(name, 0, 1)
        while (item := site.sharing.next(site.now)) is not None:
            assert not isinstance(item, Publication)
            assert item[0] == name
            alone.append(item[1])
        assert len(alone) == 1
    for name in site.names[20:]:  # who has heard nothing yet hears by it that shared topics reach it
        site.now += 0.6
        assert site.want(name, 0, 1) == []
        assert site.published() == [0]
    site.sharing.drop(site.names[0])
    site.now += 0.6
    assert site.want(site.names[0], 0, 1) == []
    assert site.published() == [0]


def test_leaves_wait_for_offers_that_are_still_being_made_and_leaf_tables_do_not(tmp_path: Path) -> None:
    site = Site(tmp_path, 3)
    site.state.tasks["d2"].progress = Progress.EXTRACTING
    for name in ("d0", "d1"):
        site.want(name, 0, 1, "leaves")
        assert len(site.published()) == 1
        site.now += 0.6
        site.want(name, 0, 4)
    site.now = 30.0
    assert site.published() == []
    site.state.tasks["d2"].progress = Progress.OFFERED
    site.now += 0.6
    assert site.published() == []  # the last one has just been told
    site.want("d2", 0, 4)
    site.now += GATHER_S
    assert site.published() == [0, 1, 2, 3]


def test_offers_of_a_moment_ago_count(tmp_path: Path) -> None:
    site = Site(tmp_path, 3)
    offered = dict(site.state.tasks)
    site.state.tasks.clear()
    assert site.want("d0", 0, 1) != []  # nobody has an offer, and this is remembered for a moment
    site.state.tasks |= offered
    site.now = 0.01
    assert [site.want(n, 0, LEAVES) for n in site.names] == [[], [], []]
    assert site.published() == list(range(LEAVES))


def test_the_first_do_not_wait_for_ever_for_the_last(tmp_path: Path) -> None:
    site = Site(tmp_path, 3)
    site.state.tasks["d2"].progress = Progress.EXTRACTING
    site.want("d0", 0, 2)
    site.now = HOLD_S + 0.1
    site.published()
    site.now += GATHER_S
    assert site.published() == [0, 1]


@pytest.mark.parametrize("case", ["says nothing", "one device", "not slabs", "not here"])
def test_other_wants_are_answered_alone(tmp_path: Path, case: str) -> None:
    site = Site(tmp_path, 1 if case == "one device" else 2)
    if case == "not slabs":
        for task in site.state.tasks.values():
            task.offer = {"weights": site.ref.to_dict()}
    if case == "not here":
        site.store.delete(site.ref.sha256)
    shared = case != "says nothing"
    assert site.want("d0", 0, 4, shared=shared) == [BlobRequest(site.ref.sha256, "data", 0, 4, shared or None)]
    assert not site.sharing


def test_a_device_that_goes_is_waited_for_no_more(tmp_path: Path) -> None:
    site = Site(tmp_path, 2)
    site.want("d0", 0, 4)
    assert site.sharing
    site.sharing.drop("d0")
    assert not site.sharing
    site.now = 5.0
    assert site.published() == []


def test_wants_beyond_the_end_and_deleted_blobs_are_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, 2)
    site.want("d0", LEAVES - 1, 50)
    site.want("d1", 2**31 - 1, 50)
    site.store.delete(site.ref.sha256)
    for site.now in (1.0, 1.0 + GATHER_S):
        assert site.published() == []
    assert not site.sharing


def test_what_may_be_shared_is_nobody_s_own() -> None:
    refs: dict[str, dict[str, object]] = defaultdict(lambda: BlobRef.of(str(len(refs)).encode()).to_dict())
    offer = {
        **{n: refs[n] for n in ("weights", "training", "inference", "mask")},
        "lowered": {"int8": refs["lowered"]},
    }
    assert shareable(offer) == set()
    found = shareable({**offer, "slabs": [refs["slab"]]})
    names = {n for n, ref in refs.items() if ref["sha256"] in found}
    assert names == {"training", "inference", "mask", "lowered", "slab"}
