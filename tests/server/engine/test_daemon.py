"""The daemon: a whole job over an air that doubles, delays and loses."""

from collections import deque
from dataclasses import replace
from pathlib import Path

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State
from fedprune.jobs.state import DeviceTask
from fedprune.jobs.state import Progress as Part
from fedprune.wire.messages import Accepted, BlobRequest, Cancelled, Refusal, UpdateAnnouncement
from fedprune.wire.topics import Topics
from fedprune_server.executor.retention import sweep_blobs
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import Fleet, ToyDevice, counted_devices, fill, larger
from support.fakes.tiny_job import JOB


def last(device: ToyDevice, kind: type) -> object:
    return [m for m in device.heard if isinstance(m, kind)][-1]


def test_a_job_runs_from_births_to_the_last_model(fleet: Fleet) -> None:
    state = fleet.run()
    assert state.phase is Phase.FINISHED
    assert counted_devices(state) == [["a", "b", "c"]] * 3


def test_messages_that_come_twice_change_nothing(fleet: Fleet, expected: str) -> None:
    fleet.air.doubled = True
    assert fleet.run().model == expected


def test_a_few_pulls_at_a_time_give_the_same_model(fleet: Fleet, expected: str) -> None:
    assert fleet.run(pulls=1).model == expected


def test_an_update_that_is_said_again_while_it_is_fetched_is_no_event(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]
    hear = device.hear
    announcements = []

    def eager(topic: str, payload: bytes) -> None:
        if b'"want"' in payload and device.pending is not None:
            announcements.append(device.pending)
            fleet.air.to_server(Topics("default").up("a", JOB.name), device.pending.to_bytes())
        hear(topic, payload)

    device.hear = eager  # type: ignore[method-assign]
    fleet.run()
    log = Storage.open_in(fleet.folder).log
    events = [body["device"] for _, _, kind, body in log.events() if kind == "UpdateAnnounced"]
    assert len(announcements) >= 3
    assert events.count("a") == 3


def test_nobody_waits_behind_a_message_to_a_device_that_is_not_let_in_any_more(fleet: Fleet) -> None:
    fleet.air.shut.add("b")
    assert counted_devices(fleet.run()) == [["a", "c"]] * 3


def test_an_update_is_acknowledged_only_when_it_is_on_the_disk(fleet: Fleet) -> None:
    on_disk = []
    device = fleet.air.devices["a"]
    hear = device.hear

    def check_disk(topic: str, payload: bytes) -> None:
        hear(topic, payload)
        if isinstance(device.heard[-1], Accepted) and not topic.endswith("blob"):
            on_disk.append(fleet.store.has(device.heard[-1].weights))

    device.hear = check_disk  # type: ignore[method-assign]
    fleet.run()
    assert on_disk == [True] * 3


def test_an_update_of_another_job_is_cancelled(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]
    device.pending = UpdateAnnouncement("a", "other", 1, 1, "0" * 64, device.store.put(fill("other")), 10, 5)
    fleet.run()
    assert next(m for m in device.heard if isinstance(m, Cancelled)).job == "other"


def test_a_refusal_leaves_the_round_to_the_others(fleet: Fleet) -> None:
    device = fleet.air.devices["c"]
    device.take = lambda offer: device.say(  # type: ignore[method-assign]
        Refusal("c", offer.job, offer.round, offer.attempt, "no room", 30)
    )
    state = fleet.run()
    assert counted_devices(state) == [["a", "b"]] * 3
    assert state.history[0]["devices"]["c"]["reason"] == "no room"
    assert state.history[0]["devices"]["c"]["kind"] == "no room"
    assert fleet.air.now < JOB.deadline_s


def test_an_update_that_the_worker_rejects_does_not_count(fleet: Fleet) -> None:
    fleet.worker.poison = {"a"}
    state = fleet.run()
    assert counted_devices(state) == [["b", "c"]] * 3
    assert "not finite" in state.history[0]["devices"]["a"]["reason"]


def test_an_update_of_the_wrong_size_is_rejected_before_a_byte_of_it_is_pulled(fleet: Fleet) -> None:
    liar = fleet.air.devices["a"]
    liar.lie = larger
    assert counted_devices(fleet.run()) == [["b", "c"]] * 3
    assert not any(isinstance(m, BlobRequest) for m in liar.heard)


def test_an_offer_that_gets_lost_is_said_again_before_the_deadline(fleet: Fleet) -> None:
    """A round of others, who answer after a second, doesn't wait for that."""
    fleet.air.lost = [Topics("default").down("b", JOB.name)]
    fleet.job = replace(JOB, rounds=40, deadline_s=600)
    for device in fleet.air.devices.values():
        device.training_s = 1.0
    state = fleet.run()
    assert counted_devices(state)[0] == ["a", "c"]
    assert ["a", "b", "c"] in counted_devices(state)
    assert fleet.air.now < fleet.job.deadline_s


def test_what_is_fetched_over_the_web_counts_as_sent(fleet: Fleet) -> None:
    fleet.air.lost = [Topics("default").down("b", JOB.name)]  # so that time passes
    daemon = fleet.daemon()
    for name in ("a", "stranger", None):
        daemon.main_runner.served_job.count_sent(name, 10**9)
    fleet.run_daemon(daemon)
    down = {name: bytes_ for name, (bytes_, _) in fleet.storage.traffic().items()}
    assert down.keys() == {"a", "b", "c"}
    assert 10**9 <= down["a"] < 10**9 + 10**8
    assert max(down["b"], down["c"]) < 10**8


def test_parts_of_updates_that_never_came_whole_do_not_stay(fleet: Fleet) -> None:
    device, hear = fleet.air.devices["a"], fleet.air.devices["a"].hear
    cut_updates = []

    def cut(topic: str, payload: bytes) -> None:
        """Answers the first want for an update's leaves, then dies."""
        hear(topic, payload)
        if not topic.endswith("blob") and isinstance(device.heard[-1], BlobRequest) and device.heard[-1].part == "data":
            device.hear = lambda topic, payload: None  # type: ignore[method-assign]
            cut_updates.append(device.heard[-1].sha256)
            device.air.inbox = deque(list(device.air.inbox)[:-1])  # of several chunks the last is lost
            device.die()

    device.hear = cut  # type: ignore[method-assign]
    fleet.job = replace(JOB, devices=2)
    fleet.air.devices["a"].session = 1
    fleet.run()
    assert cut_updates
    assert not list((fleet.store.root / "partial").iterdir())


def test_parts_that_a_crash_left_are_gone_on_with_or_deleted(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, durable=False)
    current, old = (BlobRef.of(fill(name)) for name in ("wanted", "old"))
    for ref in (current, old):
        (store.root / "partial" / ref.sha256).write_bytes(b"x")
        (store.root / "partial" / f"{ref.sha256}.leaves").write_bytes(b"x")
    model = store.put(fill("model")).sha256
    state = State(model=model, tasks={"a": DeviceTask(1, (4,), Part.PULLING, update=current.to_dict())})
    sweep_blobs(store, state, 1, "accuracy")
    assert {p.name[:64] for p in (store.root / "partial").iterdir()} == {current.sha256}
    assert store.names() == [model]


def test_an_update_that_its_device_has_lost_is_rejected(fleet: Fleet) -> None:
    device = fleet.air.devices["a"]

    def forget(update: UpdateAnnouncement) -> UpdateAnnouncement:
        device.store.delete(update.weights.sha256)
        return update

    device.lie = forget
    assert counted_devices(fleet.run()) == [["b", "c"]] * 3
