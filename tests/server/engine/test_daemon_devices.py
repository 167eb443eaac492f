"""Who takes part in a daemon's job: names, profiles, presence, and messages that make no sense."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.planning.profile_store import find_profile
from fedprune.wire.messages import Birth, BlobNotFound, BlobRequest, Offer, Refusal, RoundProgress
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import Fleet, ToyDevice, Watcher, counted_devices, fill
from support.fakes.tiny_job import JOB


def test_a_device_may_fetch_only_what_it_was_offered(fleet: Fleet) -> None:
    secret = fleet.store.put(fill("secret")).sha256
    spy = fleet.air.devices["a"]
    take = spy.take

    def curious(offer: Offer) -> None:
        spy.say(BlobRequest(secret, "data", 0, 1))
        take(offer)

    spy.take = curious  # type: ignore[method-assign]
    fleet.run()
    assert BlobNotFound(secret) in spy.heard


def test_a_device_with_an_unknown_profile_is_remembered_until_it_can_take_part(fleet: Fleet) -> None:
    fleet.job = replace(JOB, devices=2)
    odd = fleet.air.devices["a"]
    odd.profile, good = "toaster", odd.profile
    fleet.run()
    unplanned = Storage.open_in(fleet.folder).unplanned_devices()
    assert unplanned["a"]["profile"] == "toaster"
    assert "no hardware profile called 'toaster'" in unplanned["a"]["excluded"]
    odd.profile = good
    fleet.restart()
    fleet.run()
    assert Storage.open_in(fleet.folder).unplanned_devices() == {}


def test_a_device_that_can_not_start_is_left_out_with_its_reason_until_it_starts(fleet: Fleet) -> None:
    board = fleet.air.devices.pop("a")
    watcher = Watcher()
    daemon = fleet.daemon(observers=[watcher])
    board.say(Birth("a", 1, board.profile, 0, "test", trouble="the samples can't be read"))
    board.die()
    fleet.air.on_idle = daemon.stop
    daemon.run()
    assert watcher.devices["a"].activity.startswith("excluded")
    assert "the samples can't be read" in watcher.devices["a"].activity
    assert fleet.storage.unplanned_devices()["a"]["cannot_start"]
    fleet.restart()
    board.session = 2
    fleet.air.devices["a"] = board
    assert "a" in counted_devices(fleet.run())[-1]
    assert fleet.storage.unplanned_devices() == {}


def test_two_boards_of_one_name_are_warned_of_and_shown(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    watcher = Watcher()
    daemon = fleet.daemon(observers=[watcher])
    device = fleet.air.devices["a"]

    def idle() -> None:
        if not daemon.is_busy and fleet.air.now == 0.0:
            fleet.air.now = 1.0
            twin = Birth("a", device.session + 1, "jetson-orin-nano", 7, "test", None, None)
            fleet.air.to_server("fedprune/1/default/a/-/up", twin.to_bytes())
        elif not daemon.is_busy:
            daemon.stop()

    fleet.air.on_idle = idle
    daemon.run()
    warnings = [r.getMessage() for r in caplog.records if "another board called a" in r.getMessage()]
    assert len(warnings) == 1
    assert "now it is a jetson-orin-nano with 7 samples" in warnings[0]
    assert "two boards of this name?" in watcher.devices["a"].activity


def test_the_end_of_one_connection_leaves_a_board_online_that_has_another(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    device = fleet.air.devices["a"]
    ended: list[bool] = []

    def idle() -> None:
        if not daemon.is_busy and not ended:
            ended.append(True)
            device.die()
        elif not daemon.is_busy:
            daemon.stop()

    fleet.job = replace(JOB, devices=9)
    fleet.air.on_idle = idle
    daemon.run()
    state = daemon.main_runner.state
    assert ended
    assert state.devices["a"].online


def test_a_board_that_counts_as_offline_and_speaks_is_asked_to_announce_itself(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    device = fleet.air.devices["a"]
    steps = iter(range(3))

    def idle() -> None:
        if daemon.is_busy:
            return
        step = next(steps, None)
        if step == 0:
            fleet.air.lost.append(device.topics.down("a"))  # nobody answers what follows the will
            device.die()
        elif step == 1:
            fleet.air.now += 11.0
            device.say(RoundProgress("a", JOB.name, 1, 1, "train", 0, 1))
        elif step is None:
            daemon.stop()

    fleet.air.on_idle = idle
    daemon.run()
    assert daemon.main_runner.state.devices["a"].online


@pytest.mark.parametrize("profile", ["x" * 256, "../x", "raspberry-pi-5.json", "a\nb", ""])
def test_a_profile_is_named_by_a_plain_name(fleet: Fleet, profile: str) -> None:
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].profile = profile
    assert counted_devices(fleet.run()) == [["b", "c"]] * 3


def test_a_refusal_is_told_on_one_line(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    device = fleet.air.devices["c"]
    device.take = lambda offer: device.say(  # type: ignore[method-assign]
        Refusal("c", offer.job, offer.round, offer.attempt, "no room\n12:00 job toy is finished", 30)
    )
    assert fleet.run().history[0]["devices"]["c"]["reason"] == "no room 12:00 job toy is finished"
    assert not [r for r in caplog.records if "\n" in r.getMessage()]


def test_profiles_of_a_folder_of_ones_own_are_found(fleet: Fleet, tmp_path: Path) -> None:
    user_profile = replace(find_profile("raspberry-pi-5"), name="greenhouse-pi")
    (tmp_path / "greenhouse-pi.json").write_text(user_profile.to_json())
    fleet.air.devices["a"].profile = "greenhouse-pi"
    assert fleet.run(profiles=(tmp_path,)).devices["a"].profile["name"] == "greenhouse-pi"


def test_a_message_in_the_name_of_another_device_is_ignored(fleet: Fleet) -> None:
    ghost = ToyDevice("ghost", fleet.folder / "devices", fleet.air)
    ghost.topics = Topics("default")
    ghost.say = lambda message: fleet.air.to_server(ghost.topics.up("a"), message.to_bytes())  # type: ignore[method-assign, attr-defined]
    ghost.send_birth()
    assert "ghost" not in fleet.run().devices


def test_a_device_that_died_while_the_server_was_away_is_asked_no_more(fleet: Fleet) -> None:
    ghost = fleet.air.devices["c"]
    fleet.job = replace(JOB, devices=2)
    hear, heard = ghost.hear, []

    def vanish(topic: str, payload: bytes) -> None:
        """In the second round the whole connection breaks down, and this device doesn't come back."""
        hear(topic, payload)
        offer = ghost.heard[-1]
        if isinstance(offer, Offer) and offer.round == 2 and not heard:
            heard.append(offer)
            ghost.hear = lambda topic, payload: None  # type: ignore[method-assign]
            ghost.pulls, ghost.pending = {}, None
            fleet.air.inbox.append(ConnectionUp())

    ghost.hear = vanish  # type: ignore[method-assign]
    state = fleet.run()
    assert state.devices["c"].failures
    assert sorted(state.history[2]["devices"]) == ["a", "b"]


def test_what_an_earlier_start_could_not_do_says_nothing_of_a_board_that_runs(fleet: Fleet) -> None:
    board = fleet.air.devices["a"]
    board.session, take = 3, board.take

    def late(offer: Offer) -> None:
        board.say(Birth("a", 2, board.profile, 0, "test", trouble="the samples can't be read"))
        take(offer)

    board.take = late  # type: ignore[method-assign]
    assert counted_devices(fleet.run()) == [["a", "b", "c"]] * JOB.rounds
    assert fleet.storage.unplanned_devices() == {}


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_board_that_never_brings_an_update_costs_one_wait_and_is_excluded_by_name(
    tmp_path: Path, is_silent: bool
) -> None:
    healthy, faulty = (Fleet(tmp_path / at, replace(JOB, rounds=12, deadline_s=600)) for at in ("healthy", "faulty"))
    healthy.run()
    faulty.air.devices["c"].silent = is_silent
    faulty.worker.poison = set() if is_silent else {"c"}
    state = faulty.run()
    assert counted_devices(state) == [["a", "b"]] * 12
    assert [name for name, device in state.devices.items() if device.excluded] == ["c"]
    assert faulty.air.now <= 4 * healthy.air.now
