"""Hostile devices: what anybody may send costs neither the daemon its life nor the server its disk."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import State
from fedprune.wire.messages import (
    Birth,
    BlobNotFound,
    BlobRequest,
    Death,
    Finished,
    Hello,
    Refusal,
    RoundProgress,
    UpdateAnnouncement,
)
from fedprune.wire.topics import Topics
from support.fakes.fleet import Fleet, Watcher, counted_devices, fill
from support.fakes.tiny_job import JOB


def test_what_a_probe_adds_is_not_kept(fleet: Fleet) -> None:
    sent_probe = {"cores": 4, "memory_total": 2**33, "memory_available": 2**32, "seconds": 1.0, "ballast": "x" * 60_000}
    device = fleet.air.devices["a"]
    device.send_birth = lambda: device.say(Birth("a", 1, device.profile, 10, "test", sent_probe))  # type: ignore[method-assign]
    probe = fleet.run().devices["a"].probe
    assert probe is not None
    assert probe["cores"] == 4
    assert "ballast" not in probe


def test_a_probe_that_makes_no_sense_is_told_and_the_device_takes_no_part(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.job = replace(JOB, devices=2)
    device = fleet.air.devices["a"]
    device.send_birth = lambda: device.say(Birth("a", 1, device.profile, 10, "test", {"cores": -1}))  # type: ignore[method-assign]
    assert counted_devices(fleet.run()) == [["b", "c"]] * 3
    assert "device a is excluded: probe report" in caplog.text


def test_further_devices_than_allowed_are_ignored(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(20):
        stranger = Birth(f"x{number}", 1, "raspberry-pi-5" if number % 2 else "toaster", 10, "test")
        fleet.air.to_server(Topics("default").up(stranger.device), stranger.to_bytes())
    fleet.job = replace(JOB, devices=5, rounds=1, deadline_s=10)
    watcher = Watcher()
    daemon = fleet.daemon(max_devices=5, observers=[watcher])
    state = daemon.main_runner.state
    fleet.air.on_idle = daemon.stop
    daemon.run()
    assert len(state.devices) <= 5
    assert len(watcher.devices) == 5
    assert "at most 5 devices" in caplog.text


def test_reports_of_strangers_leave_nothing_behind(fleet: Fleet) -> None:
    watcher = Watcher()
    daemon = fleet.daemon(observers=[watcher])
    up = Topics("default").up("x", JOB.name)
    for message in (
        RoundProgress("x", JOB.name, 1, 1, "train", 1, 2),
        Refusal("x", JOB.name, 1, 1, "no", 30),
        UpdateAnnouncement("x", JOB.name, 1, 1, "0" * 64, BlobRef.of(b"x"), 1, 1),
    ):
        fleet.air.to_server(up, message.to_bytes())
    fleet.air.devices.clear()
    fleet.air.on_idle = daemon.stop
    daemon.run()
    assert list(watcher.devices) == []
    assert list(fleet.storage.log.events()) == []


SHORT = st.integers(0, 4)
DIGESTS = st.sampled_from(["0" * 64, BlobRef.of(fill("initial")).sha256])
REFS = st.builds(lambda n: BlobRef.of(bytes(n)), st.sampled_from([0, 1, 50_000, 100_000])) | st.builds(
    BlobRef, DIGESTS, st.sampled_from([0, 100_000, 2**40]), DIGESTS
)
PART_FIELDS = {"job": st.sampled_from([JOB.name, "other"]), "round": SHORT, "attempt": SHORT}
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=256)
PROBES = st.none() | st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=3).filter(
    lambda d: all(abs(v) < 2**63 for v in d.values() if isinstance(v, int))
)
COUNTS = SHORT | st.just(2**63 - 1)


def messages(name: str) -> st.SearchStrategy[object]:
    """Any valid message that may stand on a device's topic, and some that may not."""
    device = st.just(name)
    profile = st.sampled_from(["raspberry-pi-5", "toaster"]) | TEXTS
    return st.one_of(
        st.builds(Birth, device, COUNTS, profile, COUNTS, TEXTS, PROBES),
        st.builds(Death, device, COUNTS),
        st.builds(
            RoundProgress,
            device,
            phase=st.sampled_from(["download", "train"]),
            done=COUNTS,
            total=COUNTS,
            **PART_FIELDS,
        ),
        st.builds(Refusal, device, reason=TEXTS, exit_code=st.integers(0, 255), **PART_FIELDS),
        st.builds(
            UpdateAnnouncement,
            device,
            base=DIGESTS,
            weights=REFS,
            samples=COUNTS,
            steps=COUNTS,
            metrics=st.dictionaries(st.sampled_from(["accuracy_after", "x"]), st.floats(-1e308, 1e308), max_size=2),
            **PART_FIELDS,
        ),
        st.builds(
            BlobRequest, DIGESTS, st.sampled_from(["data", "leaves"]), COUNTS.map(lambda n: n % 2**31), st.just(1024)
        ),
        st.builds(BlobNotFound, DIGESTS),
        st.builds(Hello),
        st.builds(Finished, st.just(JOB.name)),
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(SHORT, st.sampled_from(["a", "b", "x"]).flatmap(lambda n: st.tuples(st.just(n), messages(n))))),
    st.sampled_from([0.0, 0.5]),
)
def test_no_valid_message_ends_the_daemon(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[int, tuple[str, object]]], density: float
) -> None:
    fleet = Fleet(tmp_path_factory.mktemp("fuzz"), replace(JOB, devices=1, rounds=2, density=density, deadline_s=20))
    get, call_count = fleet.air.get, [0]

    def get_or_lose_link(timeout: float | None = 0.0) -> object:
        """Each message comes after some of the others, so that it meets every phase of a round."""
        call_count[0] += 1
        while messages and call_count[0] > 5 * messages[-1][0]:
            name, message = messages.pop()[1]
            fleet.air.to_server(Topics("default").up(name), message.to_bytes())  # type: ignore[attr-defined]
        return get(timeout)

    fleet.air.get = get_or_lose_link  # type: ignore[method-assign, assignment]
    daemon = fleet.daemon()

    def idle() -> None:
        if daemon.is_busy:
            time.sleep(0.0005)
        fleet.air.now += 0.5
        if fleet.air.now > 300 and not messages:
            daemon.stop()  # whoever poses as a device may well keep a round from coming to its end

    fleet.air.on_idle = idle
    daemon.run(until_finished=True)
    assert State.from_json(daemon.main_runner.state.to_json()) == daemon.main_runner.state


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["up", "up/blob"]), st.binary(max_size=100)), max_size=10))
def test_no_bytes_end_the_daemon(tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[str, bytes]]) -> None:
    fleet = Fleet(tmp_path_factory.mktemp("fuzz"), replace(JOB, rounds=1))
    for channel, payload in messages:
        fleet.air.to_server(f"fedprune/1/default/a/-/{channel}", payload)
    assert counted_devices(fleet.run()) == [["a", "b", "c"]]
