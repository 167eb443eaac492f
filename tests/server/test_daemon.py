"""The daemon: a whole job over an air that doubles, delays and loses, with crashes at every point."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet import SIZE, Fleet, ToyDevice, fill, larger

from fedprune.blobs import BlobStore
from fedprune.coordination import Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.state import Progress as Part
from fedprune.coordination.state import Task
from fedprune.errors import ModelError, ProtocolError, StorageError, StorageFullError
from fedprune.profile_store import find
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.connection_news import ConnectionUp
from fedprune.wire.messages import Accepted, Birth, Cancelled, Finished, Gone, Progress, Refusal, Update, Want
from fedprune.wire.offer import Offer
from fedprune.wire.topics import Topics
from fedprune_server.daemon import Daemon
from fedprune_server.observation.onlooker import Shown
from fedprune_server.store.garbage import sweep
from fedprune_server.store.storage import Storage
from fedprune_server.terminal.table import Lines, Snapshot
from fedprune_server.work.offers import GRAPH_ROUNDS
from fedprune_server.work.update_size import UPDATE_SIZE
from toy import JOB


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that an undisturbed run ends with."""
    return Fleet(tmp_path_factory.mktemp("calm")).run().model


def last(device: ToyDevice, kind: type) -> object:
    return [m for m in device.heard if isinstance(m, kind)][-1]


def folded(state: State) -> list[list[str]]:
    """Per round the devices that counted."""
    return [[n for n, d in r["devices"].items() if d["progress"] == "folded"] for r in state.history]


def test_a_job_runs_from_births_to_the_last_model(fleet: Fleet) -> None:
    state = fleet.run()
    assert state.phase is Phase.FINISHED
    assert folded(state) == [["a", "b", "c"]] * 3


def test_every_device_hears_that_the_job_is_finished(fleet: Fleet) -> None:
    fleet.run()
    assert all(isinstance(d.heard[-1], Finished) for d in fleet.air.devices.values())


def test_messages_that_come_twice_change_nothing(fleet: Fleet, expected: str) -> None:
    fleet.air.doubled = True
    assert fleet.run().model == expected


def test_a_few_pulls_at_a_time_give_the_same_model(fleet: Fleet, expected: str) -> None:
    assert fleet.run(pulls=1).model == expected


def test_an_update_that_is_said_again_while_it_is_fetched_is_no_event(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]
    hear = device.hear
    said = []

    def eager(topic: str, payload: bytes) -> None:
        if b'"want"' in payload and device.pending is not None:
            said.append(device.pending)
            fleet.air.to_server(Topics("default").up("a", JOB.name), device.pending.to_bytes())
        hear(topic, payload)

    device.hear = eager  # type: ignore[method-assign]
    fleet.run()
    events = [body["device"] for _, _, kind, body in Storage.at(fleet.folder).log.events() if kind == "UpdateAnnounced"]
    assert len(said) >= 3
    assert events.count("a") == 3


def test_nobody_waits_behind_a_message_to_a_device_that_is_not_let_in_any_more(fleet: Fleet) -> None:
    fleet.air.shut.add("b")
    state = fleet.run()
    assert folded(state) == [["a", "c"]] * 3


def test_an_update_is_acknowledged_only_when_it_is_on_the_disk(fleet: Fleet) -> None:
    seen = []
    device = fleet.air.devices["a"]
    hear = device.hear

    def checked(topic: str, payload: bytes) -> None:
        hear(topic, payload)
        if isinstance(device.heard[-1], Accepted) and not topic.endswith("blob"):
            seen.append(fleet.store.has(device.heard[-1].weights))

    device.hear = checked  # type: ignore[method-assign]
    fleet.run()
    assert seen == [True] * 3


def test_a_silent_device_is_left_behind_at_the_deadline(fleet: Fleet) -> None:
    fleet.air.devices["b"].silent = True
    state = fleet.run()
    assert folded(state) == [["a", "c"]] * 3
    assert fleet.air.now >= 3 * JOB.deadline_s


def test_a_late_update_is_cancelled(fleet: Fleet) -> None:
    slow = fleet.air.devices["b"]
    slow.silent = True
    fleet.run()
    slow.pending = Update("b", JOB.name, 1, 1, "0" * 64, slow.store.put(fill("late")), 10, 5)
    fleet.restart()
    fleet.run()
    assert isinstance(last(slow, Cancelled), Cancelled)
    assert slow.pending is None


def test_an_update_of_another_job_is_cancelled(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]
    device.pending = Update("a", "other", 1, 1, "0" * 64, device.store.put(fill("other")), 10, 5)
    fleet.run()
    assert next(m for m in device.heard if isinstance(m, Cancelled)).job == "other"


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"job": "other", "round": 1, "attempt": 1}, "this server runs another job"),
        ({"job": JOB.name, "round": 1, "attempt": 1}, "the round is over"),
        ({"job": JOB.name, "round": 2, "attempt": 2}, None),
        ({"job": JOB.name, "round": 2, "attempt": 1}, None),
    ],
)
def test_a_device_that_works_in_vain_is_told_so_as_it_comes_back(
    fleet: Fleet, held: dict[str, object], told: str | None
) -> None:
    state = State(model=fleet.worker.initial(), round=2, phase=Phase.TRAINING, ranking="r" * 64)
    state.tasks["a"] = Task(1, (4,), Part.PULLING, weights="")
    fleet.storage.save(state, (), 0.0)
    daemon = fleet.daemon()
    birth = Birth("a", 7, "raspberry-pi-5", 10, "test", held=held)
    daemon._take((Topics("default").up("a"), birth.to_bytes()))
    assert not fleet.air.devices["a"].heard  # nothing is said before what it follows from is saved
    daemon._commit()
    reasons = [m.reason for m in fleet.air.devices["a"].heard if isinstance(m, Cancelled)]
    assert reasons == ([told] if told else [])


def test_a_refusal_leaves_the_round_to_the_others(fleet: Fleet) -> None:
    device = fleet.air.devices["c"]
    device.take = lambda offer: device.say(  # type: ignore[method-assign]
        Refusal("c", offer.job, offer.round, offer.attempt, "no room", 30)
    )
    state = fleet.run()
    assert folded(state) == [["a", "b"]] * 3
    assert state.history[0]["devices"]["c"]["reason"] == "no room"
    assert fleet.air.now < JOB.deadline_s


def test_an_update_that_the_worker_rejects_does_not_count(fleet: Fleet) -> None:
    fleet.worker.poison = {"a"}
    state = fleet.run()
    assert folded(state) == [["b", "c"]] * 3
    assert "not finite" in state.history[0]["devices"]["a"]["reason"]


def test_an_update_of_the_wrong_size_is_rejected_before_a_byte_of_it_is_pulled(fleet: Fleet) -> None:
    liar = fleet.air.devices["a"]
    liar.lie = larger
    state = fleet.run()
    assert folded(state) == [["b", "c"]] * 3
    assert not any(isinstance(m, Want) for m in liar.heard)


def test_an_update_without_what_is_frozen_counts_and_one_of_the_offers_size_does_not(fleet: Fleet) -> None:
    execute, refs = fleet.worker.execute, {}
    for name in ("a", "b"):
        device = fleet.air.devices[name]
        refs[name] = device.store.put(fill("trained part", name, size=SIZE // 2))
        device.lie = lambda update: replace(update, weights=refs[update.device])

    def with_size(command: do.Command) -> on.Event:
        event = execute(command)
        if isinstance(event, on.Extracted):
            return replace(event, offer={**event.offer, UPDATE_SIZE: SIZE // 2})
        return event

    fleet.worker.execute = with_size  # type: ignore[method-assign]
    state = fleet.run()
    assert folded(state) == [["a", "b"]] * 3
    reason = f"size of the update: expected {SIZE // 2} bytes, got {SIZE}"
    assert state.history[0]["devices"]["c"]["reason"] == reason


def test_a_wrong_update_that_was_announced_before_a_crash_does_not_stop_the_next_server(fleet: Fleet) -> None:
    liar = fleet.air.devices["a"]
    liar.lie = larger
    save = fleet.storage.save

    def dying(state: State, events: Sequence[on.Event], *rest: object) -> None:
        save(state, events, *rest)  # type: ignore[arg-type]
        if any(isinstance(e, on.UpdateAnnounced) and e.device == "a" for e in events):
            raise KilledError

    fleet.storage.save = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        fleet.run()
    fleet.restart()
    assert folded(fleet.run()) == [["b", "c"]] * 3


def test_what_a_failed_event_leaves_behind_stops_nothing(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    handle, failed = daemon._coordinator.handle, []

    def failing(event: on.Event, now: float) -> list[object]:
        if not failed:
            failed.append(event)
            raise ProtocolError("our own fault")
        return list(handle(event, now))

    daemon._coordinator.handle = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(ProtocolError):
        daemon._handle(on.DeviceDied("a", 1))
    daemon._handle(on.DeviceBorn("a", 1, {"name": "raspberry-pi-5"}, 10))
    assert "a" in daemon.state.devices


def test_an_offer_that_gets_lost_is_said_again_before_the_deadline(fleet: Fleet) -> None:
    fleet.air.lost = [Topics("default").down("b", JOB.name)]
    state = fleet.run()
    assert folded(state) == [["a", "b", "c"]] * 3
    assert fleet.air.now < JOB.deadline_s


def test_what_is_fetched_over_the_web_counts_as_sent(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.air.lost = [Topics("default").down("b", JOB.name)]  # so that time passes
    make, asked = fleet.daemon, 0

    def fetched() -> dict[str, int]:
        nonlocal asked
        asked += 1
        return {"a": 10**9, "stranger": 5}

    def daemon(**options: object) -> Daemon:
        made = make(**options)
        made.web_bytes = fetched
        return made

    monkeypatch.setattr(fleet, "daemon", daemon)
    fleet.run()
    down = {name: bytes_ for name, (bytes_, _) in fleet.storage.traffic().items()}
    assert down.keys() == {"a", "b", "c"}
    assert 10**9 <= down["a"] < asked * 10**9 + 10**8
    assert max(down["b"], down["c"]) < 10**8


def test_a_device_that_is_heard_of_is_not_offered_the_same_again(fleet: Fleet) -> None:
    slow = fleet.air.devices["b"]
    take, offers = slow.take, []

    def working(offer: Offer) -> None:
        """Seventy seconds of training with a word every ten."""
        offers.append(offer)
        begun, said = fleet.air.now, [fleet.air.now]
        idle = fleet.air.on_idle

        def tell() -> None:
            idle()
            if fleet.air.now - begun >= 70:
                fleet.air.on_idle = idle
                take(offer)
            elif fleet.air.now - said[0] >= 10:
                said[0] = fleet.air.now
                slow.say(Progress("b", offer.job, offer.round, offer.attempt, "train", 1, 7))

        fleet.air.on_idle = tell

    slow.take = working  # type: ignore[method-assign]
    assert folded(fleet.run()) == [["a", "b", "c"]] * 3
    assert len(offers) == 3


def test_parts_of_updates_that_never_came_whole_do_not_stay(fleet: Fleet) -> None:
    device, hear = fleet.air.devices["a"], fleet.air.devices["a"].hear
    seen = []

    def cut(topic: str, payload: bytes) -> None:
        """Answers the first want for an update's leaves, then dies."""
        hear(topic, payload)
        if not topic.endswith("blob") and isinstance(device.heard[-1], Want) and device.heard[-1].part == "data":
            device.hear = lambda topic, payload: None  # type: ignore[method-assign]
            seen.append(device.heard[-1].sha256)
            device.air.inbox = deque(list(device.air.inbox)[:-1])  # of several chunks the last is lost
            device.die()

    device.hear = cut  # type: ignore[method-assign]
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].session = 1
    fleet.run()
    assert seen
    assert not list((fleet.store.root / "partial").iterdir())


def test_parts_that_a_crash_left_are_gone_on_with_or_deleted(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, durable=False)
    wanted, old = (BlobRef.of(fill(name)) for name in ("wanted", "old"))
    for ref in (wanted, old):
        (store.root / "partial" / ref.sha256).write_bytes(b"x")
        (store.root / "partial" / f"{ref.sha256}.leaves").write_bytes(b"x")
    model = store.put(fill("model")).sha256
    state = State(model=model, tasks={"a": Task(1, (4,), Part.PULLING, update=wanted.to_dict())})
    sweep(store, state, 1)
    assert {p.name[:64] for p in (store.root / "partial").iterdir()} == {wanted.sha256}
    assert store.names() == [model]


def test_an_update_that_its_device_has_lost_is_rejected(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]

    def forget(update: Update) -> Update:
        device.store.delete(update.weights.sha256)
        return update

    device.lie = forget
    state = fleet.run()
    assert folded(state) == [["b", "c"]] * 3


def test_a_device_may_fetch_only_what_it_was_offered(fleet: Fleet) -> None:
    secret = fleet.store.put(fill("secret")).sha256
    spy = fleet.air.devices["a"]
    take = spy.take

    def curious(offer: Offer) -> None:
        spy.say(Want(secret, "data", 0, 1))
        take(offer)

    spy.take = curious  # type: ignore[method-assign]
    fleet.run()
    assert Gone(secret) in spy.heard


@pytest.mark.parametrize(
    ("density", "line"), [(0.0, "density 1 (keeps 100% of"), (0.5, "density 0.5, as the job says: k")]
)
def test_who_joins_is_told_of_with_the_share_of_weights_that_it_gets(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, density: float, line: str
) -> None:
    fleet.job = replace(JOB, density=density, rounds=1)
    monkeypatch.setattr("fedprune.plan.Plan.gains", lambda plan: "gained much")
    with caplog.at_level(logging.DEBUG, "fedprune"):
        fleet.run()
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert any(level == "INFO" and line in text and "% of the weights" in text for level, text in said)
    assert {level for level, text in said if "gained" in text} == (set() if density else {"DEBUG"})


def test_a_device_with_an_unknown_profile_takes_no_part(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].profile = "toaster"
    state = fleet.run()
    assert folded(state) == [["b", "c"]] * 3
    assert "device a takes no part: there is no hardware profile called 'toaster'" in caplog.text


def test_a_device_with_an_unknown_profile_is_remembered_until_it_can_take_part(fleet: Fleet) -> None:
    fleet.job = replace(JOB, devices=2)
    odd = fleet.air.devices["a"]
    odd.profile, good = "toaster", odd.profile
    fleet.run()
    kept = Storage.at(fleet.folder).outsiders()
    assert kept["a"]["profile"] == "toaster"
    assert "no hardware profile called 'toaster'" in kept["a"]["excluded"]
    odd.profile = good
    fleet.restart()
    fleet.run()
    assert Storage.at(fleet.folder).outsiders() == {}


def test_the_table_shows_the_accuracy_of_what_a_device_serves(fleet: Fleet) -> None:
    averages = fleet.air.devices["b"]
    averages.lie = lambda update: replace(update, metrics={**update.metrics, "accuracy_average": 0.5})
    shown = []

    class Rounds(Lines):
        def round_over(self, snapshot: Snapshot, summary: Mapping[str, Any]) -> None:
            shown.append({row.device: row.accuracy for row in snapshot.rows})

    fleet.run(onlookers=[Shown(Rounds())])
    assert shown == [{"a": 0.25, "b": 0.5, "c": 0.25}] * JOB.rounds


def test_the_table_shows_why_a_device_takes_no_part(fleet: Fleet) -> None:
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].profile = "toaster"
    daemon = fleet.daemon()
    fleet.air.on_idle = daemon.stop
    daemon.run()
    row = next(r for r in daemon.view.snapshot().rows if r.device == "a")
    assert row.profile == "toaster"
    assert row.state.startswith("takes no part: there is no hardware profile")


def test_two_boards_of_one_name_are_warned_of_and_shown(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    daemon = fleet.daemon()
    device = fleet.air.devices["a"]

    def idle() -> None:
        if not daemon.busy and fleet.air.now == 0.0:
            fleet.air.now = 1.0
            twin = Birth("a", device.session + 1, "jetson-orin-nano", 7, "test", None, None)
            fleet.air.to_server("fedprune/1/default/a/-/up", twin.to_bytes())
        elif not daemon.busy:
            daemon.stop()

    fleet.air.on_idle = idle
    daemon.run()
    warnings = [r.getMessage() for r in caplog.records if "another board called a" in r.getMessage()]
    assert len(warnings) == 1
    assert "now it is a jetson-orin-nano with 7 samples" in warnings[0]
    assert "two boards of this name?" in next(r.state for r in daemon.view.snapshot().rows if r.device == "a")


def test_the_end_of_one_connection_leaves_a_board_online_that_has_another(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    device = fleet.air.devices["a"]
    ended: list[bool] = []

    def idle() -> None:
        if not daemon.busy and not ended:
            ended.append(True)
            device.die()
        elif not daemon.busy:
            daemon.stop()

    fleet.job = replace(JOB, devices=9)
    fleet.air.on_idle = idle
    state = daemon.run()
    assert ended
    assert state.devices["a"].online


def test_a_board_that_counts_as_offline_and_speaks_is_asked_to_announce_itself(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    device = fleet.air.devices["a"]
    steps = iter(range(3))

    def idle() -> None:
        if daemon.busy:
            return
        step = next(steps, None)
        if step == 0:
            fleet.air.lost.append(device.topics.down("a"))  # nobody answers what follows the will
            device.die()
        elif step == 1:
            fleet.air.now += 11.0
            device.say(Progress("a", JOB.name, 1, 1, "train", 0, 1))
        elif step is None:
            daemon.stop()

    fleet.air.on_idle = idle
    assert daemon.run().devices["a"].online


@pytest.mark.parametrize("profile", ["x" * 256, "../x", ".", "raspberry-pi-5.json", "a\nb", "Ä", ""])
def test_a_profile_is_named_by_a_plain_name(fleet: Fleet, profile: str) -> None:
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].profile = profile
    assert folded(fleet.run()) == [["b", "c"]] * 3


def test_a_refusal_is_told_on_one_line(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    device = fleet.air.devices["c"]
    device.take = lambda offer: device.say(  # type: ignore[method-assign]
        Refusal("c", offer.job, offer.round, offer.attempt, "no room\n12:00 job toy is finished", 30)
    )
    state = fleet.run()
    assert state.history[0]["devices"]["c"]["reason"] == "no room 12:00 job toy is finished"
    assert not [r for r in caplog.records if "\n" in r.getMessage()]


def test_profiles_of_a_folder_of_ones_own_are_found(fleet: Fleet, tmp_path: Path) -> None:
    own = replace(find("raspberry-pi-5"), name="greenhouse-pi")
    (tmp_path / "greenhouse-pi.json").write_text(own.to_json())
    fleet.air.devices["a"].profile = "greenhouse-pi"
    state = fleet.run(profiles=(tmp_path,))
    assert state.devices["a"].profile["name"] == "greenhouse-pi"


def test_a_device_can_not_name_a_file_of_the_server(fleet: Fleet, tmp_path: Path) -> None:
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].profile = str(tmp_path / "profile.json")
    assert "a" not in fleet.run().devices


@pytest.mark.parametrize(
    ("channel", "payload"),
    [("up", b"{"), ("up", b'{"v":1,"type":"birth"}'), ("up/blob", b"FPC"), ("down", b"{}"), ("up", b"\xff" * 300_000)],
)
def test_nonsense_is_ignored(fleet: Fleet, expected: str, channel: str, payload: bytes) -> None:
    fleet.air.inbox.append((f"fedprune/1/default/x/-/{channel}", payload))
    assert fleet.run().model == expected


def test_a_message_in_the_name_of_another_device_is_ignored(fleet: Fleet) -> None:
    other = ToyDevice("ghost", fleet.folder / "devices", fleet.air)
    other.topics = Topics("default")
    other.say = lambda message: fleet.air.to_server(other.topics.up("a"), message.to_bytes())  # type: ignore[method-assign, attr-defined]
    other.birth()
    assert "ghost" not in fleet.run().devices


def test_a_late_death_of_an_earlier_session_means_nothing(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]
    device.session = 5
    device.birth()
    device.session = 4
    device.die()
    device.session = 5
    assert folded(fleet.run()) == [["a", "b", "c"]] * 3


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
    assert not state.devices["c"].online
    assert sorted(state.history[2]["devices"]) == ["a", "b"]


def test_old_weights_are_deleted_and_the_last_models_kept(fleet: Fleet) -> None:
    fleet.job = replace(JOB, rounds=6)
    state = fleet.run(keep=2)
    models = [r["model"] for r in state.history]
    assert [fleet.store.has(m) for m in models] == [False] * 4 + [True] * 2
    updates = [d.store.put(fill("x")) for d in fleet.air.devices.values()]
    assert len(updates) == 3
    # Two models, the last round's ranking, three parts and three updates, the graph; what the last round needed stays.
    assert len(fleet.store.names()) <= 2 + 1 + 3 + 3 + 1


def test_bytes_are_counted_per_device(fleet: Fleet) -> None:
    fleet.run()
    traffic = fleet.storage.traffic()
    for name in "abc":
        down, up = traffic[name]
        assert down > 3 * 100_000 + 70_000
        assert 3 * 100_000 < up < 4 * 100_000


def test_counted_bytes_survive_a_crash(fleet: Fleet) -> None:
    kill_at(fleet, "after saving", 19)
    with pytest.raises(KilledError):
        fleet.run()
    before = Storage.at(fleet.folder).traffic()
    fleet.restart()
    fleet.run()
    assert all(fleet.storage.traffic()[n][1] > before[n][1] > 100_000 for n in "abc")


def test_a_device_that_comes_after_the_end_hears_of_it(fleet: Fleet) -> None:
    late = fleet.air.devices.pop("c")
    fleet.job = replace(JOB, devices=2)
    fleet.run()
    fleet.air.devices["c"] = late
    fleet.restart()
    fleet.run()
    assert isinstance(late.heard[-1], Finished)


def test_an_error_of_the_worker_ends_the_daemon(fleet: Fleet) -> None:
    def fail(command: object) -> on.Event:
        raise ModelError("no such operator")

    fleet.worker.execute = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelError, match="no such operator"):
        fleet.run()


def test_a_full_disk_ends_the_daemon_and_loses_nothing(fleet: Fleet, expected: str) -> None:
    save, count = fleet.storage.save, [0]

    def full(*arguments: object) -> None:
        count[0] += 1
        if count[0] == 20:
            raise StorageFullError("no room")
        save(*arguments)  # type: ignore[arg-type]

    fleet.storage.save = full  # type: ignore[method-assign]
    with pytest.raises(StorageFullError):
        fleet.run()
    fleet.restart()
    assert fleet.run().model == expected


class KilledError(BaseException):
    """What a SIGKILL is to a process."""


def kill_at(fleet: Fleet, point: str, count: int) -> None:
    """Let the server die at the count-th passage of a point."""
    passed = [0]

    def step() -> None:
        passed[0] += 1
        if passed[0] == count:
            raise KilledError

    if point in ("before saving", "after saving"):
        save = fleet.storage.save

        def dying(*arguments: object) -> None:
            if point == "before saving":
                step()
            save(*arguments)  # type: ignore[arg-type]
            if point == "after saving":
                step()

        fleet.storage.save = dying  # type: ignore[method-assign]
    else:
        publish = fleet.air.publish

        def dying_publish(topic: str, payload: bytes, qos: int = 1) -> bool:
            sent = publish(topic, payload, qos)
            step()
            return sent

        fleet.air.publish = dying_publish  # type: ignore[method-assign]


def test_graphs_stay_while_offers_may_name_them_and_no_longer(tmp_path: Path) -> None:
    rounds, same, last_words = 3 * GRAPH_ROUNDS, 3, 12
    calm, killed = (Fleet(tmp_path / n, replace(JOB, rounds=rounds), graph_rounds=same) for n in ("calm", "killed"))
    graphs = [BlobRef.of(calm.worker.graph(at)).sha256 for at in range(0, rounds + 1, same)]
    old = [g for i, g in enumerate(graphs) if (i + 1) * same <= rounds - GRAPH_ROUNDS]
    calm.run(keep=1)
    assert [g for g in graphs if not calm.store.has(g)] == old

    save = killed.storage.save

    def dying(state: State, events: Sequence[on.Event], *rest: object) -> None:
        save(state, events, *rest)  # type: ignore[arg-type]
        if any(isinstance(e, on.Scored) and e.round == last_words for e in events):
            raise KilledError

    killed.storage.save = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        killed.run(keep=1)
    killed.restart()
    state = killed.storage.load()
    assert state is not None
    sweep(killed.store, state, 1)  # as a server that is started does
    delete, deleted = killed.store.delete, []

    def noted(digest: str) -> None:
        deleted.append(digest)
        delete(digest)

    killed.store.delete = noted  # type: ignore[method-assign]
    killed.run(keep=1)
    assert [g for g in deleted if g in graphs] == old[last_words // same :]  # when it was time, and not before
    assert sorted(killed.store.names()) == sorted(calm.store.names())


@pytest.mark.parametrize("point", ["before saving", "after saving", "after sending"])
@pytest.mark.parametrize("count", [1, 4, 8, 13, 19])
def test_a_server_killed_anywhere_goes_on_to_the_same_model(
    fleet: Fleet, expected: str, point: str, count: int
) -> None:
    publish = fleet.air.publish
    kill_at(fleet, point, count)
    with pytest.raises(KilledError):
        fleet.run()
    fleet.air.publish = publish  # type: ignore[method-assign]
    fleet.restart()
    state = fleet.run()
    assert state.model == expected
    assert folded(state) == [["a", "b", "c"]] * 3


def test_a_command_that_was_saved_but_not_done_is_repeated(fleet: Fleet) -> None:
    save = fleet.storage.save

    def dying(state: State, events: Sequence[on.Event], *rest: object) -> None:
        save(state, events, *rest)  # type: ignore[arg-type]
        if any(isinstance(e, on.Extracted) and e.device == "b" for e in events):
            raise KilledError

    fleet.storage.save = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        fleet.run()
    assert not any(isinstance(m, Offer) for m in fleet.air.devices["b"].heard)
    fleet.restart()
    fleet.run()
    assert any(isinstance(m, Offer) and m.round == 1 for m in fleet.air.devices["b"].heard)


def test_a_missing_blob_ends_the_daemon_with_an_error_that_names_it(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    fleet.store.delete(daemon.state.model)
    with pytest.raises(StorageError, match=daemon.state.model):
        daemon.run(until_finished=True)


def test_the_database_says_what_happened(fleet: Fleet) -> None:
    fleet.run()
    kinds = [kind for _, _, kind, _ in Storage.at(fleet.folder).log.events()]
    assert kinds.count("UpdateStored") == 9
    assert kinds.count("Evaluated") == 3
