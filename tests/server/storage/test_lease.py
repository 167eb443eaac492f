"""One server at a time writes to a database: who was away too long writes nothing any more."""

import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.core.errors import BusyError, StorageError
from fedprune.jobs.job import Job
from fedprune_server.cli.status import job_status
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.maintenance.doctor import diagnose
from fedprune_server.simulation.digits import digits_model
from fedprune_server.storage import lease
from fedprune_server.storage.lease import LeaseLostError, leader_elsewhere
from fedprune_server.storage.storage import Storage
from support.fakes.opened_job import open_job
from support.faults.hung_server import hang
from support.processes.postgres import Postgres
from support.waiting import until


def save(folder: StateFolder, number: int) -> None:
    folder.storage.save(State(model="m" * 64, round=number), [on.Scored(number, "r" * 64)], float(number))


def rounds(storage: Storage) -> list[int]:
    return [body["round"] for _, _, _, body in storage.log.events()]


def row(storage: Storage) -> dict[str, object]:
    with storage.database.transaction() as connection:
        text = connection.exec_driver_sql("SELECT value FROM meta WHERE key = 'lease'").scalar()
    return dict(json.loads(str(text)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    monkeypatch.setattr(lease, "RENEWAL_INTERVAL_S", 0.1)


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


def test_who_asks_whether_a_server_can_write_locks_nothing(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as folder:
        save(folder, 1)
        writer = sqlite3.connect(tmp_path / "server.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")  # a long transaction of the server's own
        assert folder.lease.trouble() == "", "it doesn't ask for the lock"
        body = json.dumps({"holder": "elsewhere:/two:1", "token": 7, "expires": None})
        writer.execute("UPDATE meta SET value = ? WHERE key = 'lease'", (body,))
        writer.execute("COMMIT")
        until(lambda: "another server" in folder.lease.trouble())
        writer.execute("DROP TABLE meta")
        writer.close()
        until(lambda: "no such table" in folder.lease.trouble())


@pytest.mark.postgresql
def test_a_second_server_is_refused_while_the_first_lives(tmp_path: Path, url: str) -> None:
    with StateFolder(tmp_path / "one", url) as first:
        save(first, 1)
        with pytest.raises(BusyError, match="one"):
            StateFolder(tmp_path / "two", url)
        save(first, 2)
    with StateFolder(tmp_path / "two", url) as second:  # given back, so at once
        save(second, 3)
        assert rounds(second.storage) == [1, 2, 3]


@pytest.mark.postgresql
def test_a_lease_is_renewed_for_as_long_as_its_server_lives(tmp_path: Path, url: str, quick: None) -> None:
    with StateFolder(tmp_path / "one", url) as first:
        save(first, 1)
        ends = {row(first.storage)["expires"]}
        until(lambda: ends.add(row(first.storage)["expires"]) or len(ends) > 12)  # type: ignore[func-returns-value]
        with pytest.raises(BusyError):
            StateFolder(tmp_path / "two", url)
        assert row(first.storage)["token"] == 1


@pytest.mark.postgresql
def test_a_standby_takes_over_from_a_server_that_hangs_which_then_can_write_nothing(
    tmp_path: Path, url: str, quick: None
) -> None:
    first = StateFolder(tmp_path / "one", url)
    save(first, 1)
    folders: list[StateFolder] = []
    standby = threading.Thread(target=lambda: folders.append(StateFolder(tmp_path / "two", url, standby=True)))
    standby.start()
    time.sleep(2.5)
    assert not folders  # it lives, and renews
    hang(first)
    standby.join(60)
    with folders[0] as second:
        save(second, 2)
        with pytest.raises(LeaseLostError, match="postgresql"):
            save(first, 3)
        with pytest.raises(LeaseLostError):
            first.storage.put_settings({"job": {}})
        with pytest.raises(LeaseLostError):
            first.storage.put_unplanned_devices({"x": {}})
        with pytest.raises(LeaseLostError):
            first.lease.confirm()
        assert rounds(second.storage) == [1, 2]
        first.close()
        save(second, 4)  # what was not the first one's any more was not given back by it


@pytest.mark.postgresql
def test_a_server_that_hung_hears_that_it_was_replaced(tmp_path: Path, url: str, quick: None) -> None:
    heard = threading.Event()
    with StateFolder(tmp_path / "one", url, stopping=heard) as first:
        with first.storage.database.transaction() as connection:
            body = json.dumps({"holder": "elsewhere:/two:1", "token": 7, "expires": 2.0**40})
            connection.exec_driver_sql("UPDATE meta SET value = %s WHERE key = 'lease'", (body,))
        assert heard.wait(60)
        with pytest.raises(LeaseLostError):
            first.lease.confirm()
    with Storage(url, create=False) as storage:
        assert row(storage)["token"] == 7


@pytest.mark.postgresql
def test_whoever_has_a_dead_servers_folder_needs_not_wait(tmp_path: Path, url: str) -> None:
    first = StateFolder(tmp_path / "one", url)
    hang(first)
    first.lease._is_lost = True  # so that it gives nothing back, as after a kill
    first.close()
    with StateFolder(tmp_path / "one", url) as restarted:
        assert row(restarted.storage)["token"] == 2


@pytest.mark.postgresql
def test_a_lease_that_ran_out_unseen_is_taken_only_if_nobody_renews_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StateFolder(tmp_path / "one", url) as first:
        with (
            first.storage.database.transaction() as connection
        ):  # as after a database that was away, or a clock that was set
            body = json.dumps(row(first.storage) | {"expires": 1.0})
            connection.exec_driver_sql("UPDATE meta SET value = %s WHERE key = 'lease'", (body,))
        with pytest.raises(BusyError):
            StateFolder(tmp_path / "two", url)
        save(first, 1)


@pytest.mark.postgresql
def test_a_lease_outlasts_a_database_that_is_started_again(tmp_path: Path, quick: None) -> None:
    server = Postgres()
    try:
        server.start()
        with StateFolder(tmp_path / "one", server.database()) as first:
            save(first, 1)
            server.kill()
            time.sleep(0.5)
            server.start()
            save(first, 2)
            before = row(first.storage)["expires"]
            until(lambda: row(first.storage)["expires"] != before)
            first.lease.confirm()
    finally:
        server.close()


def test_sqlites_standby_waits_for_the_folder(tmp_path: Path) -> None:
    first = StateFolder(tmp_path / "one")
    save(first, 1)
    folders: list[StateFolder] = []
    standby = threading.Thread(target=lambda: folders.append(StateFolder(tmp_path / "one", standby=True)))
    standby.start()
    time.sleep(0.5)
    assert not folders
    with pytest.raises(StorageError, match="another server runs"):
        StateFolder(tmp_path / "one")
    first.close()
    standby.join(60)
    with folders[0] as second:
        assert row(second.storage)["token"] == 2
        save(second, 2)
        assert rounds(second.storage) == [1, 2]


def test_an_older_token_writes_nothing_in_sqlite_either(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "one") as first:
        save(first, 1)
        body = json.dumps(row(first.storage) | {"token": 2})
        with first.storage.database.transaction() as connection:
            connection.exec_driver_sql("UPDATE meta SET value = ? WHERE key = 'lease'", (body,))
        with pytest.raises(LeaseLostError):
            save(first, 2)
        assert rounds(first.storage) == [1]


@pytest.mark.postgresql
def test_a_folder_that_stands_by_knows_the_job_and_the_server_that_has_it(
    url: str, tmp_path: Path, quick: None
) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    config = ServerConfig(job=Job(name="leaves"), model=str(tmp_path / "model.onnx"), database=url)
    waits, stopped = tmp_path / "second", threading.Event()

    def stand_by() -> None:
        with StateFolder(waits, url, standby=True):
            stopped.wait()

    thread = threading.Thread(target=stand_by, daemon=True)
    with StateFolder(tmp_path / "first", url) as folder:
        open_job(folder, config)
        assert leader_elsewhere(tmp_path / "first") == ""
        thread.start()
        until(lambda: (waits / "database").exists() and leader_elsewhere(waits) != "")
        body = job_status(waits)
        assert (body["job"]["name"], body["running"], "first" in body["leader"]) == ("leaves", True, True)
        kinds = {finding.kind for finding in diagnose(waits)}
        assert "standby" in kinds
        assert not {"server-not-running", "database"} & kinds
    until(lambda: leader_elsewhere(waits) == "")
    assert job_status(waits)["leader"] == ""
    stopped.set()
    thread.join()
