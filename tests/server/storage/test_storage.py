"""The server's database: an event and its state are saved together or not at all, and the log of events."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import events as on
from fedprune.core.errors import StorageError, StorageFullError
from fedprune.jobs.state import JobDevice
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.storage import Storage
from support.fakes.stored_job import born, second_round_state
from support.fakes.tiny_job import ARCHITECTURE, JOB


@pytest.fixture
def storage(url: str) -> Iterator[Storage]:
    with Storage(url) as storage:
        yield storage


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Storage]:
    """A state folder's own database."""
    with Storage.open_in(tmp_path) as storage:
        yield storage


def test_a_state_comes_back_as_it_was(storage: Storage, url: str) -> None:
    assert storage.load() is None
    storage.save(second_round_state(), [born("a")], 1.0, {"a": (7, 8)})
    storage.put_settings({"job": JOB.to_dict()})
    storage.put_unplanned_devices({"x": {"excluded": "no profile", "session": 2}})
    with Storage(url, create=False) as reopened:
        assert reopened.load() == second_round_state()
        assert reopened.rounds() == second_round_state().history
        assert reopened.incomplete_rounds() == []
        assert reopened.settings() == {"job": JOB.to_dict()}
        assert reopened.unplanned_devices() == {"x": {"excluded": "no profile", "session": 2}}
        assert reopened.traffic()["a"] == (7, 8)
        assert reopened.devices()[0]["online"] is True
        assert reopened.log.last_message_times() == (1.0, {"a": 1.0})
        with pytest.raises(StorageError, match=r"read-?only"):
            reopened.put_settings({})


KILLED = """\
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # so that the file is written to before the commit
connection.execute("CREATE TABLE kept (x)")
connection.execute("BEGIN")
connection.executemany("INSERT INTO kept VALUES (?)", [("x" * 4000,)] * 100)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_crash_cut_off_is_undone_by_a_reader(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert path.with_name(f"{DATABASE_FILE}-journal").stat().st_size > 0
    assert Storage.read_settings(tmp_path) is None
    assert not path.with_name(f"{DATABASE_FILE}-journal").exists()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.booleans()), max_size=8))
def test_what_is_saved_step_by_step_is_what_was_there_last(
    storage: Storage, steps: list[tuple[str, int, bool]]
) -> None:
    state = State(model="m" * 64)
    coordinator = SynchronousCoordinator(JOB, ARCHITECTURE, state)
    changes, logged = 0, len(list(storage.log.events()))
    storage.save(state, (), 0.0)
    for name, session, alive in steps:
        event = born(name, session) if alive else on.DeviceDied(name, session)
        before = state.to_json()
        coordinator.handle(event, 0.0)
        changes += state.to_json() != before
        storage.save(state, [event], 0.0)
    with Storage(storage.database.engine.url.render_as_string(hide_password=False)) as reopened:
        assert reopened.load() == state
        assert len(list(reopened.log.events())) == logged + changes


def test_a_state_in_another_ones_place_leaves_nothing_of_it(storage: Storage, url: str) -> None:
    storage.save(second_round_state(), (), 1.0)
    state = State(model="o" * 64, history=second_round_state().history)
    state.devices["z"] = JobDevice(1, True, {"name": "board"}, None, 5)
    storage.save(state, (), 2.0)
    with Storage(url) as reopened:
        assert reopened.load() == state


def test_old_rounds_devices_stay_on_the_disk_and_leave_the_memory(
    storage: Storage, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = second_round_state()
    state.history += [{**state.history[0], "round": n} for n in (2, 3)]
    storage.save(state, (), 1.0)
    all_rounds = storage.rounds()
    state.drop_old_summaries(7)
    assert [len(r["devices"]) for r in state.history] == [0, 3, 3]
    monkeypatch.setattr("fedprune_server.storage.storage.MAX_PARTS_IN_MEMORY", 7)
    with Storage(url) as reopened:
        assert reopened.load() == state
        state.round = 9
        assert reopened.save(state, (), 2.0)
        assert reopened.rounds() == all_rounds


def test_an_event_that_changed_nothing_costs_no_write(storage: Storage) -> None:
    state = second_round_state()
    storage.save(state, [born("a")], 1.0, {"a": (1, 1)})
    storage.save(state, [on.UpdateAnnounced("a", 1, 1, "w" * 64, {}, 10, 5)], 2.0, {"a": (1, 900)})
    assert [kind for _, _, kind, _ in storage.log.events()] == ["DeviceBorn"]


def test_every_commit_waits_for_the_disk(file: Storage) -> None:
    with file.database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_full_disk_says_so_and_loses_nothing(file: Storage, tmp_path: Path) -> None:
    before = State(model="a" * 64)
    file.save(before, (), 1.0)
    with file.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFullError, match="no room left"):
        file.save(State(model="b" * 64), [on.UpdateRejected("a", 1, 1, "x" * 100_000)], 2.0)
    with Storage.open_in(tmp_path) as reopened:
        assert reopened.load() == before


@pytest.mark.parametrize("content", [b"this is no database, but a text of some length" * 100, b"\0" * 5000])
def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATABASE_FILE).write_bytes(content)
    with pytest.raises(StorageError, match=DATABASE_FILE):
        Storage.open_in(tmp_path)


def test_a_damaged_page_is_found_when_opening(tmp_path: Path) -> None:
    with Storage.open_in(tmp_path) as storage:
        for number in range(50):
            storage.save(replace(second_round_state(), ranking=f"{number:064d}"), [born(f"device{number}")], 1.0)
    path = tmp_path / DATABASE_FILE
    raw = bytearray(path.read_bytes())
    assert len(raw) > 3 * 4096
    raw[4096 : 2 * 4096] = b"\xa5" * 4096
    path.write_bytes(raw)
    with pytest.raises(StorageError):
        Storage.open_in(tmp_path)


def test_a_state_that_is_no_state_is_an_error(storage: Storage) -> None:
    storage.save(State(model="a" * 64), (), 1.0)
    with storage.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE meta SET value = '{\"format\": 7}' WHERE key = 'state'")
    with pytest.raises(StorageError):
        storage.load()


def test_looking_at_a_folder_without_a_database_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=DATABASE_FILE):
        Storage.open_existing(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity/authority.key").touch()
    with pytest.raises(StorageError, match="identity"):
        Storage.open_existing(tmp_path)
    (tmp_path / "identity/authority.key").unlink()  # a device has none
    DirectoryOwner("attic", "default").claim(tmp_path)
    with pytest.raises(StorageError, match="device"):
        Storage.open_existing(tmp_path)


def test_a_database_of_another_user_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage.open_in(tmp_path).close()
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    with pytest.raises(StorageError, match=DATABASE_FILE):
        Storage.open_existing(tmp_path)


def test_a_log_of_several_pages_is_read_to_its_end(storage: Storage) -> None:
    state = State(model="m" * 64)
    storage.save(state, (), 0.0)
    state.round = 1
    storage.save(state, [on.Scored(number, "r" * 64) for number in range(2500)], 1.0)
    assert [body["round"] for _, _, _, body in storage.log.events()] == list(range(2500))


def test_the_log_keeps_only_the_latest_events(url: str) -> None:
    state = State(model="m" * 64)
    with Storage(url, logged=20) as storage:
        for number in range(100):
            state.round = number
            storage.save(state, [on.Scored(number, "r" * 64)], float(number))
        numbers = [body["round"] for _, _, _, body in storage.log.events()]
    assert numbers == list(range(80, 100))


def test_a_server_is_no_device_that_was_heard(storage: Storage) -> None:
    events: list[on.Event] = [born("a"), born("b"), on.DeviceDied("a", 1), on.Scored(1, "r" * 64)]
    events.append(on.DeviceDied("b", 1, heard_at=2.5))
    for number, event in enumerate(events, 1):
        with storage.database.fenced_transaction() as connection:
            storage.log.write(connection, [event], float(number))
    assert storage.log.last_message_times() == (5.0, {"a": 1.0, "b": 2.5})
    with storage.database.fenced_transaction() as connection:  # this job's registry had heard nothing since its birth
        storage.log.write(connection, [on.DeviceDied("b", 1, heard_at=0.5)], 6.0)
    assert storage.log.last_message_times() == (6.0, {"a": 1.0, "b": 2.5})
