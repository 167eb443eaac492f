"""A daemon that ends, or is killed at any point: what is kept, what is deleted, and the next one that continues."""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.core.errors import BusyError, ModelError, StorageFullError
from fedprune.wire.messages import Finished
from fedprune_server.observation.observer import LoopBlocked, TurnEnded, TurnEvent
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.storage import sqlite_engine
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import Fleet, counted_devices, fill, larger
from support.fakes.tiny_job import JOB


def test_old_weights_are_deleted_and_the_last_models_and_the_best_kept(fleet: Fleet) -> None:
    fleet.job = replace(JOB, rounds=6)
    state = fleet.run(keep=2)
    models = [r["model"] for r in state.history]
    best = state.best_round(JOB.recipe.judged_by)
    assert best is not None
    assert best["model"] not in models[-2:]
    assert [fleet.store.has(m) for m in models] == [m in (best["model"], *models[-2:]) for m in models]
    assert len([d.store.put(fill("x")) for d in fleet.air.devices.values()]) == 3
    # Three models, the last round's ranking, three parts and updates, the graph; what the last round needed stays.
    assert len(fleet.store.names()) <= 3 + 1 + 3 + 3 + 1


def test_a_total_of_bytes_ends_a_job_with_what_was_counted_before_a_crash(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedprune.server")
    fleet.job = replace(JOB, rounds=30, total_bytes=2_500_000)
    kill_at(fleet, "after saving", 30)
    with pytest.raises(KilledError):
        fleet.run()
    before = sum(sum(traffic) for traffic in Storage.open_in(fleet.folder).traffic().values())
    assert 0 < before < fleet.job.total_bytes
    fleet.restart()
    state = fleet.run()
    spent = sum(sum(traffic) for traffic in fleet.storage.traffic().values())
    assert spent * (state.round - 1) / state.round < fleet.job.total_bytes <= state.spent_bytes <= spent
    assert f"it ended after round {state.round} of 30: " in caplog.text
    assert "total_bytes" in caplog.text
    fleet.restart()
    assert fleet.run().round == state.round


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


def killed_once_saved(fleet: Fleet, last: Callable[[on.Event], bool], **options: Any) -> None:
    """Run a server that dies as soon as a certain event is saved."""
    save = fleet.storage.save

    def dying(state: State, events: Sequence[on.Event], *rest: object) -> None:
        save(state, events, *rest)  # type: ignore[arg-type]
        if any(map(last, events)):
            raise KilledError

    fleet.storage.save = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        fleet.run(**options)


def test_a_wrong_update_that_was_announced_before_a_crash_does_not_stop_the_next_server(fleet: Fleet) -> None:
    fleet.air.devices["a"].lie = larger
    killed_once_saved(fleet, lambda e: isinstance(e, on.UpdateAnnounced) and e.device == "a")
    fleet.restart()
    assert counted_devices(fleet.run()) == [["b", "c"]] * 3


@pytest.mark.parametrize("point", ["before saving", "after saving", "after sending"])
@pytest.mark.parametrize("count", [1, 4, 8, 13, 19])
@pytest.mark.at_push(5)
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
    assert counted_devices(state) == [["a", "b", "c"]] * 3


class LockedDatabase:
    """Another program that locks a server's database at its first turn, and does something each time that the server
    has waited for a while."""

    def __init__(self, fleet: Fleet, act: Callable[[int], None]) -> None:
        self.connection = sqlite3.connect(fleet.folder / DATABASE_FILE, isolation_level=None)
        self.waits = 0
        self._act, self._locks = act, True

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        kinds = [type(event.payload) for event in events]
        if LoopBlocked in kinds:
            self.waits += 1
            self._act(self.waits)
        elif self._locks and TurnEnded in kinds:
            self.connection.execute("BEGIN IMMEDIATE")
            self._locks = False


@pytest.fixture
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_engine, "SQLITE_RETRY_S", 0.01)


@pytest.mark.usefixtures("quick_locks")
def test_a_server_whose_database_is_locked_lives_and_goes_on_once_it_is_free(fleet: Fleet, expected: str) -> None:
    def act(waits: int) -> None:
        if waits == 3:
            lock.connection.close()

    lock = LockedDatabase(fleet, act)
    assert fleet.run(observers=[lock]).model == expected
    assert lock.waits == 3


@pytest.mark.usefixtures("quick_locks")
def test_a_server_that_waits_for_a_lock_can_be_stopped(fleet: Fleet, expected: str) -> None:
    def act(waits: int) -> None:
        daemon.stop()
        fleet.air.now += 1.0  # whoever has the lock gets some time to give it back

    lock = LockedDatabase(fleet, act)
    daemon = fleet.daemon(observers=[lock])
    with pytest.raises(BusyError):
        fleet.run_daemon(daemon)
    assert lock.waits > 3
    lock.connection.close()
    fleet.restart()
    assert fleet.run().model == expected
