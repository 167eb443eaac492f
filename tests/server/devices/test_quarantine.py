"""Floods and what nobody can use end in quarantine; whatever honest fleets do, at any speed, never does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import MAX_REQUEST, Death, RoundProgress
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Pull
from fedprune_server.devices.quarantine import (
    FIRST_QUARANTINE_S,
    FORGIVEN_AFTER_S,
    MAX_POINTS,
    MAX_QUARANTINE_S,
    MAX_STRANGER_POINTS,
    MAX_STRIKES,
    POINTS_PER_S,
    QUARANTINE_FILE,
    STRANGERS,
    Quarantine,
    Quarantined,
    Released,
    read_quarantine_rows,
)
from fedprune_server.messaging.connection import RateLimitedLink
from support.fakes.fleet import Fleet, larger
from support.fakes.tiny_job import JOB
from support.nets import drawn_models as strategies  # noqa: F401 - its settings of Hypothesis

SITE = Topics("default")
WANT = 200
"""Bytes of a want, and some more."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quarantine(clock: Clock) -> Quarantine:
    quarantine = Quarantine(clock, wall=lambda: clock.now + 10**9)
    quarantine.add_known(["a", "b"])
    return quarantine


def accepted_count(quarantine: Quarantine, device: str, messages: int, size: int = WANT, *, chunk: bool = False) -> int:
    return sum(quarantine.charge_message(device, size, chunk=chunk) for _ in range(messages))


# --- floods


FLOODS: dict[str, Callable[[Quarantine], object]] = {
    "too many messages": lambda q: accepted_count(q, "a", 10_000),
    "large messages": lambda q: accepted_count(q, "a", 200, 256 * 1024),
    "chunks that the server didn't ask for": lambda q: accepted_count(q, "a", 500, 128 * 1024, chunk=True),
    "announces itself": lambda q: [q.charge_birth("a") for _ in range(300)],
    "messages that make no sense": lambda q: [q.charge_invalid("a") for _ in range(200)],
    "updates in a row": lambda q: [q.note_rejected_update("a", FailureKind.MALFORMED, "x") for _ in range(MAX_STRIKES)],
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_in_quarantine_and_the_others_are_heard(quarantine: Quarantine, clock: Clock, flood: str) -> None:
    FLOODS[flood](quarantine)

    news = quarantine.next_event()
    assert isinstance(news, Quarantined)
    assert (news.device, news.seconds) == ("a", FIRST_QUARANTINE_S)
    assert quarantine.next_event() is None
    assert accepted_count(quarantine, "a", 100) == 0
    assert accepted_count(quarantine, "b", 100) == 100
    assert [quarantine.should_ignore(topic) for topic in (SITE.up("a"), SITE.up("b"), "odd")] == [True, False, False]
    clock.now += FIRST_QUARANTINE_S
    assert quarantine.next_event() == Released("a")
    assert accepted_count(quarantine, "a", 100) == 100


def test_how_much_is_heard_before_is_bounded(quarantine: Quarantine) -> None:
    assert accepted_count(quarantine, "a", 100_000) <= MAX_POINTS
    assert quarantine.rows()["a"]["dropped"] >= 100_000 - MAX_POINTS
    assert accepted_count(quarantine, "b", 100_000, 128 * 1024, chunk=True) * 128 * 1024 <= MAX_POINTS * 4096


def test_each_time_is_twice_as_long_up_to_an_hour_and_is_forgiven_after_a_day(
    quarantine: Quarantine, clock: Clock
) -> None:
    durations = []
    for _ in range(9):
        accepted_count(quarantine, "a", 10_000)
        news = quarantine.next_event()
        assert isinstance(news, Quarantined)
        durations.append(news.seconds)
        clock.now += news.seconds
        assert quarantine.next_event() == Released("a")
    assert durations == [min(MAX_QUARANTINE_S, FIRST_QUARANTINE_S * 2**n) for n in range(9)]
    clock.now += FORGIVEN_AFTER_S + 1
    accepted_count(quarantine, "a", 10_000)
    assert quarantine.next_event() == Quarantined("a", "too many messages", FIRST_QUARANTINE_S)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b", "x1", "x2"]), st.integers(0, 10**6), st.booleans(), st.floats(0, 100))
    )
)
def test_points_never_exceed_the_allowance(steps: list[tuple[str, int, bool, float]]) -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    quarantine.add_known(["a", "b"])
    began, paid = clock.now, dict.fromkeys("ab", 0.0)
    for device, size, sends, seconds in steps:
        clock.now += seconds
        if sends:
            quarantine.credit_message(device)
        elif quarantine.charge_message(device, size) and device in paid:
            paid[device] += 1 + size / 4096
        if device in paid:
            assert paid[device] <= MAX_POINTS + POINTS_PER_S * (clock.now - began) + 2.0 * len(steps)
    assert quarantine.rows().keys() <= {STRANGERS, "a", "b"}


def test_names_that_nobody_knows_cost_no_memory_and_share_an_allowance(
    quarantine: Quarantine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    heard_of = sum(quarantine.charge_message(f"x{n}", 1000) for n in range(200_000))

    assert 0.5 * MAX_STRANGER_POINTS < heard_of < MAX_STRANGER_POINTS
    assert quarantine.rows().keys() == {STRANGERS}
    assert quarantine.next_event() is None
    assert caplog.text.count("unknown devices, or clients in members' names, send") == 1
    assert quarantine.charge_message("a", 1000)
    clock.now += 10
    assert quarantine.charge_message("x", 1000)


def test_updates_that_an_honest_board_may_bring_are_no_strikes(quarantine: Quarantine) -> None:
    for kind in set(FailureKind) - {FailureKind.MALFORMED}:
        for _ in range(MAX_STRIKES):
            quarantine.note_rejected_update("a", kind, "x")
    assert quarantine.next_event() is None


def test_a_counted_update_clears_the_strikes(quarantine: Quarantine) -> None:
    for _ in range(10):
        quarantine.note_rejected_update("a", FailureKind.MALFORMED, "x")
        quarantine.note_counted_update("a")
    assert quarantine.next_event() is None


# --- honest fleets


@pytest.mark.parametrize(("window", "chunk"), [(32, 4), (MAX_REQUEST, MAX_REQUEST), (MAX_REQUEST, 1)])
def test_a_board_may_fetch_and_deliver_as_fast_as_it_can(
    quarantine: Quarantine, tmp_path: Path, window: int, chunk: int
) -> None:
    """Both ways, 64 MB in no time at all, and every message that takes part is heard."""
    data = np.random.default_rng(0).bytes(64 * 2**20)
    here, there = BlobStore(tmp_path / "here", durable=False), BlobStore(tmp_path / "there", durable=False)
    ref = there.put(data)
    serve = BlobSender(there)

    # The server pulls: it says how much it asks for, and each chunk is heard.
    pull = Pull(ref, here.partial(ref), window_leaves=window, chunk_leaves=chunk)
    wants = pull.start(0.0)
    while not pull.is_done:
        want = wants.pop(0)
        quarantine.credit_leaves("a", want.count)
        quarantine.credit_message("a")
        for raw in serve.answer(want, 128 * 1024 + 600):
            assert quarantine.charge_message("a", len(raw), chunk=True)
            wants += pull.on_chunk(Chunk.parse(raw), 0.0)

    # The board pulls: each of its wants is heard, since it was offered the blob.
    fetched = BlobStore(tmp_path / "board", durable=False)
    pull = Pull(ref, fetched.partial(ref), window_leaves=window, chunk_leaves=chunk)
    wants = pull.start(0.0)
    while not pull.is_done:
        want = wants.pop(0)
        assert quarantine.charge_message("a", len(want.to_bytes()))
        quarantine.charge_request("a", want.sha256, serve.leaf_count(want.sha256))
        for raw in serve.answer(want):
            wants += pull.on_chunk(Chunk.parse(raw), 0.0)
    assert quarantine.next_event() is None
    assert quarantine.rows() == {}


# --- in the daemon


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def folded_devices(state: State) -> list[list[str]]:
    return [[n for n, d in r["devices"].items() if d["progress"] == "folded"] for r in state.history]


def test_a_flood_costs_its_sender_its_part_and_nobody_else(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    flooding = fleet.air.devices["a"]
    take = flooding.take

    def flood(offer: object) -> None:
        for _ in range(10_000):
            flooding.say(RoundProgress("a", JOB.name, 1, 1, "train", 1, 2))
        take(offer)  # type: ignore[arg-type]

    flooding.take = flood  # type: ignore[method-assign, assignment]
    state = fleet.run()

    assert folded_devices(state)[0] == ["b", "c"]
    assert all({"b", "c"} <= set(names) for names in folded_devices(state))
    assert state.history[0]["devices"]["a"]["reason"].startswith("it is in quarantine: too many messages")
    assert "device a is in quarantine for 60 s" in caplog.text
    assert caplog.text.count("quarantine for") < 5


def test_a_wire_is_guarded_before_anything_is_parsed(quarantine: Quarantine, fleet: Fleet) -> None:
    guarded = RateLimitedLink(fleet.air, quarantine)
    guarded.get()  # the connection is up
    for _ in range(5000):
        fleet.air.to_server(SITE.up("a"), Death("a", 1).to_bytes())
    fleet.air.to_server(SITE.up("b"), Death("b", 1).to_bytes())
    got = [guarded.get() for _ in range(5002)]

    assert sum(isinstance(g, tuple) and "/a/" in g[0] for g in got) <= MAX_POINTS
    assert sum(isinstance(g, Quarantined) for g in got) == 1
    assert any(isinstance(g, tuple) and "/b/" in g[0] for g in got)


def test_a_blob_can_be_fetched_for_nothing_only_a_few_times(quarantine: Quarantine) -> None:
    for _ in range(100_000):
        if not quarantine.charge_message("a", WANT):
            break
        quarantine.charge_request("a", "0" * 64, 100)
    news = quarantine.next_event()
    assert isinstance(news, Quarantined)
    assert news.reason == "too many messages"


# --- what people see


def test_what_happened_is_kept_for_status(tmp_path: Path, clock: Clock) -> None:
    quarantine = Quarantine(clock, tmp_path / QUARANTINE_FILE, wall=lambda: clock.now)
    quarantine.add_known(["a", "b"])
    quarantine.save()
    assert not (tmp_path / QUARANTINE_FILE).exists()
    accepted_count(quarantine, "a", 10_000)
    clock.now += 10
    quarantine.save()
    row = read_quarantine_rows(tmp_path)["a"]
    assert row["until"] == pytest.approx(clock.now + FIRST_QUARANTINE_S - 10)
    assert row["times"] == 1
    assert "b" not in read_quarantine_rows(tmp_path)
    clock.now += FIRST_QUARANTINE_S
    quarantine.next_event()
    quarantine.save()
    assert read_quarantine_rows(tmp_path)["a"]["until"] is None
    # A server that starts anew knows of nothing, and says so.
    clock.now += 100
    Quarantine(clock, tmp_path / QUARANTINE_FILE).save()
    assert read_quarantine_rows(tmp_path) == {}


def test_a_device_whose_updates_no_board_makes_is_not_heard_until_its_time_is_over(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """Updates that are too large: three of them, and it is left out for a minute; then it is asked to come back."""
    caplog.set_level("INFO")
    fleet.job = replace(JOB, devices=2, rounds=12, deadline_s=20)
    fleet.air.devices["a"].lie = larger
    daemon = fleet.daemon()

    def idle() -> None:
        if not daemon.is_busy:
            fleet.air.now += 0.5
        if fleet.air.now > 400:
            daemon.stop()

    fleet.air.on_idle = idle
    daemon.run()
    state = daemon.main_runner.state
    assert "3 malformed updates in a row" in caplog.text
    assert "the quarantine of device a has ended" in caplog.text
    assert all("a" not in names for names in folded_devices(state))
    assert len(folded_devices(state)) == 12
