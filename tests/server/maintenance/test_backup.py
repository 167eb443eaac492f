"""A backup holds all that a job needs, at one moment; it is whole, or the one before it is. So is a restored folder."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core.errors import ConfigError, ExitCode, StorageError
from fedprune.output.tables import ignore_progress
from fedprune_server.cli.main import main
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.maintenance.backup import back_up
from fedprune_server.maintenance.backup_manifest import CONSOLE, NAME, BackupEntry, BackupManifest
from fedprune_server.maintenance.finding import Severity
from fedprune_server.maintenance.restoring import Backup
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.blob_place import BLOBS_FOLDER
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.storage import Storage
from fedprune_server.web import database as console_database
from fedprune_server.web.database import ConsoleDatabase
from support.fakes.recorded_job import play_job
from support.processes.postgres import Postgres


@pytest.fixture(scope="module")
def final_state(tmp_path_factory: pytest.TempPathFactory) -> State:
    """What the job ends with."""
    return play_job(tmp_path_factory.mktemp("calm") / "state")


@pytest.fixture(scope="module")
def job_in_round_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job in its second round, with identity and rollouts."""
    state = tmp_path_factory.mktemp("begun") / "state"
    play_job(state, events=11)
    with IdentityFolder.make(state, "default") as identity:
        identity.make_claim("attic", 3600)
    with RolloutStore(state) as rollouts:
        rollouts.blobs.put(b"a wheel" * 1000)
    with ConsoleDatabase(state / CONSOLE) as console:
        console.execute("INSERT INTO operators VALUES ('ann', 'admin', 'a hash', 1, 1)")
        console.execute("INSERT INTO sessions VALUES ('a digest of a token', 'ann', 'csrf', '::1', 1, 1)")
        console.execute(
            "INSERT INTO audit (at, operator, address, action, what, outcome) VALUES (1, 'ann', '', '', '{}', '')"
        )
    return state


@pytest.fixture
def state(job_in_round_two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(job_in_round_two, tmp_path / "state")


def restore(backup: Path, target: Path, database: str | None = None) -> Path:
    source = Backup(backup)
    source.verify(ignore_progress)
    source.restore(target, database, ignore_progress)
    return target


def stored_state(state: Path) -> State:
    with Storage.open_existing(state) as storage:
        stored = storage.load()
        assert stored is not None
        return stored


def rows(state: Path) -> tuple[object, ...]:
    with Storage.open_existing(state) as storage:
        return (
            storage.settings(),
            storage.load(),
            storage.devices(),
            list(storage.log.events()),
            storage.unplanned_devices(),
        )


def wrong(state: Path) -> list[str]:
    return [str(f) for f in check_state(state, ignore_progress, running=False) if f.severity is Severity.WRONG]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_operators_come_back_and_nobody_is_logged_in(state: Path, tmp_path: Path) -> None:
    assert console_database.CONSOLE_FILE == CONSOLE
    with ConsoleDatabase(state / CONSOLE):  # a console runs
        back_up(state, tmp_path / "backup", ignore_progress)
    assert not any(b"a digest of a token" in content for content in files(tmp_path / "backup").values())
    new = restore(tmp_path / "backup", tmp_path / "new")
    assert (new / CONSOLE).stat().st_mode & 0o777 == 0o600
    with ConsoleDatabase(new / CONSOLE) as console:
        assert [(r["name"], r["role"], r["hash"]) for r in console.rows("SELECT * FROM operators")] == [
            ("ann", "admin", "a hash")
        ]
        assert console.rows("SELECT * FROM sessions") == []
        assert len(console.rows("SELECT * FROM audit")) == 1
        with pytest.raises(StorageError, match="append only"):
            console.execute("DELETE FROM audit")
    assert wrong(new) == []


def test_what_is_restored_is_what_was_there(state: Path, tmp_path: Path, final_state: State) -> None:
    back_up(state, tmp_path / "backup", ignore_progress)
    new = restore(tmp_path / "backup", tmp_path / "new")
    assert rows(new) == rows(state)
    assert wrong(new) == []
    for path in ("model.onnx", "identity/signing.key", "identity/authority.key"):
        assert (new / path).read_bytes() == (state / path).read_bytes()
    with IdentityFolder(new) as identity, IdentityFolder(state) as before:
        assert identity.site == before.site == "default"
        assert not identity.store.is_empty
    with RolloutStore(new) as rollouts, RolloutStore(state) as old:
        assert rollouts.blobs.names() == old.blobs.names() != []
    assert [r["model"] for r in play_job(new).history] == [r["model"] for r in final_state.history]


def test_further_jobs_are_restored_with_the_first(state: Path, tmp_path: Path) -> None:
    play_job(tmp_path / "second", events=4)
    shutil.copytree(tmp_path / "second", state / "jobs" / "second")
    copy = tmp_path / "copy"
    assert main(["backup", "--state", str(state), "--to", str(tmp_path / "backup")]) == ExitCode.OK
    assert main(["restore", "--from", str(tmp_path / "backup"), "--state", str(copy)]) == ExitCode.OK
    for job in (".", "jobs/second"):
        assert rows(copy / job) == rows(state / job)
    assert main(["check", "--state", str(copy)]) == ExitCode.OK


def test_nobody_else_can_read_what_is_private(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "backup", ignore_progress)
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "backup" / "files").iterdir()} <= {0o600, 0o644}
    new = restore(tmp_path / "backup", tmp_path / "new")
    private = [p for p in (new / "identity").iterdir() if p.name != "epoch"]
    for path in (new / DATABASE_FILE, *private):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert (new / "identity").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("events", range(1, 24, 3))
def test_a_job_goes_on_to_the_same_models_from_a_backup_of_any_moment(
    tmp_path: Path, events: int, final_state: State
) -> None:
    play_job(tmp_path / "state", events=events)
    back_up(tmp_path / "state", tmp_path / "backup", ignore_progress)
    new = restore(tmp_path / "backup", tmp_path / "new")
    assert wrong(new) == []
    assert [r["model"] for r in play_job(new).history] == [r["model"] for r in final_state.history]


def test_the_next_backup_adds_what_is_new_and_lets_go_of_what_is_not_needed(state: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    back_up(state, backup, ignore_progress)
    times = {p: p.stat().st_mtime_ns for p in backup.rglob("*") if p.is_file()}
    play_job(state, events=9)
    manifest = back_up(state, backup, ignore_progress)
    untouched = [p for p, at in times.items() if p.is_file() and p.stat().st_mtime_ns == at]
    assert any(p.parent.parent == backup / "blobs" for p in untouched)
    named = {backup / e.backup_path for e in manifest.entries}
    assert {p for p in backup.rglob("*") if p.is_file()} == named | {backup / "manifest.json", backup / "lock"}
    assert rows(restore(backup, tmp_path / "new")) == rows(state)


def test_what_is_damaged_in_a_backup_is_written_again_by_the_next(state: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    for entry in back_up(state, backup, ignore_progress).entries:
        (backup / entry.backup_path).write_bytes(b"x" * entry.size)
    back_up(state, backup, ignore_progress)
    assert rows(restore(backup, tmp_path / "new")) == rows(state)


def test_backups_of_a_job_that_goes_on_are_each_of_one_moment(tmp_path: Path) -> None:
    state, over = tmp_path / "state", threading.Event()
    play_job(state, events=1, keep=1)

    def play() -> None:
        for _ in range(25):
            play_job(state, events=2, keep=1)  # each start sweeps what the state doesn't need
        over.set()

    player = threading.Thread(target=play)
    player.start()
    try:
        rounds, number = set(), 0
        while not over.is_set() or not number:
            number += 1
            rounds.add(back_up(state, tmp_path / f"backup{number % 2}", ignore_progress).round)
            assert wrong(restore(tmp_path / f"backup{number % 2}", tmp_path / f"new{number}")) == []
    finally:
        player.join()
    assert number > 1


# What breaks off.


def dying(work: Callable[[], object], at: int) -> bool:
    """Do something in a child that dies, as by kill -9, just before its `at`-th flush to the disk; whether it did."""
    child = os.fork()
    if child == 0:
        flush, count = os.fsync, 0

        def flush_or_die(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count == at:
                os._exit(9)
            flush(descriptor)

        os.fsync = flush_or_die
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child of a test must not continue as one
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_backup_that_is_killed_leaves_the_one_before_it(state: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    back_up(state, backup, ignore_progress)
    before = rows(state)
    play_job(state, events=9)
    after, at = rows(state), 1
    assert before != after
    copy = tmp_path / "kept"
    shutil.copytree(backup, copy)
    while dying(lambda: back_up(state, backup, ignore_progress), at):
        assert rows(restore(backup, tmp_path / f"new{at}")) in (before, after)
        shutil.rmtree(backup)
        shutil.copytree(copy, backup)
        at += 1
    assert at > 20
    assert rows(restore(backup, tmp_path / "last")) == after


def check_restores_that_are_killed(state: Path, folder: Path, database: str | None = None) -> None:
    backup, new, at = folder / "backup", folder / "place" / "new", 1
    back_up(state, backup, ignore_progress)
    while dying(lambda: restore(backup, new, database), at):
        if new.exists():
            assert rows(new) == rows(state)
            shutil.rmtree(new)
        at += 3
    assert at > 20
    assert rows(new) == rows(state)
    assert [p.name for p in new.parent.iterdir()] == ["new"]


def test_a_restore_that_is_killed_leaves_nothing_in_the_way(state: Path, tmp_path: Path) -> None:
    check_restores_that_are_killed(state, tmp_path)


@pytest.mark.postgresql
def test_a_restore_to_postgresql_that_is_killed_can_be_done_again(
    state: Path, tmp_path: Path, postgres: Postgres
) -> None:
    check_restores_that_are_killed(state, tmp_path, postgres.database())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_backup_is_refused_before_anything_is_written(
    job_in_round_two: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    backup = place / "backup"
    back_up(job_in_round_two, backup, ignore_progress)
    path = data.draw(st.sampled_from([p for p in sorted(backup.rglob("*")) if p.is_file() and p.name != "lock"]))
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "gone"]))
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(raw[:at])
    else:
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
    with pytest.raises(StorageError):
        restore(backup, place / "new")
    assert not (place / "new").exists()


# What is refused.


def test_nothing_is_overwritten(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backup", "--state", str(state), "--to", str(tmp_path / "backup")]) == ExitCode.OK
    assert "private keys" in capsys.readouterr().out
    before = files(state)
    assert main(["restore", "--from", str(tmp_path / "backup"), "--state", str(state)]) == ExitCode.CONFIG
    assert "isn't empty" in capsys.readouterr().err
    assert files(state).keys() == before.keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    assert main(["backup", "--state", str(state), "--to", str(tmp_path / "mine")]) == ExitCode.CONFIG
    (tmp_path / "file").write_text("dear")
    assert main(["backup", "--state", str(state), "--to", str(tmp_path / "file")]) == ExitCode.CONFIG
    assert (tmp_path / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert main(["restore", "--from", str(tmp_path / "backup"), "--state", str(tmp_path / "empty")]) == ExitCode.OK
    assert "fedprune-server run --state" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["backup", "../link/backup"])
def test_a_backup_in_the_state_folder_itself_is_refused(
    state: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (state.parent / "link").symlink_to(state)
    before = {p for p in files(state) if not p.startswith("server.db-")}  # SQLite's, of whoever reads
    assert main(["backup", "--state", str(state), "--to", str(state / place)]) == ExitCode.CONFIG
    assert "is in the state folder" in capsys.readouterr().err
    assert {p for p in files(state) if not p.startswith("server.db-")} == before


def test_another_jobs_backup_is_not_replaced(state: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    back_up(state, backup, ignore_progress)
    with Storage.open_in(state) as storage:
        settings = storage.settings()
        assert settings is not None
        storage.put_settings(settings | {"job": settings["job"] | {"name": "other"}})
    with pytest.raises(ConfigError, match="another job, job"):
        back_up(state, backup, ignore_progress)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "identity/a/b", 5, "blobs/ab/" + "ab" * 32])
def test_a_manifest_names_no_other_files(path: Any) -> None:
    manifest = BackupManifest("job", "a" * 64, 1, 1, "1", (BackupEntry(DATABASE_FILE, "a" * 64, 1),), "here")
    assert BackupManifest.parse(manifest.to_bytes(), "it") == manifest
    with pytest.raises(StorageError):
        BackupManifest.parse(manifest.to_bytes().replace(b'"job":"job"', b'"job":"jab"'), "it")
    body = json.loads(manifest.to_bytes())
    body["manifest"]["entries"][0]["path"] = path
    with pytest.raises(StorageError, match=r"path|digest"):
        BackupManifest.parse(json.dumps(body).encode(), "it")


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda v: json.dumps({"digest": "a" * 64, "manifest": v}).encode()
))  # fmt: skip
def test_what_is_no_manifest_is_an_error(raw: bytes) -> None:
    with pytest.raises(StorageError):
        BackupManifest.parse(raw, "here")


def test_a_damaged_blob_is_not_backed_up(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "backup", ignore_progress)
    path = BlobStore(state / BLOBS_FOLDER).path(stored_state(state).model)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(StorageError, match="damaged"):
        back_up(state, tmp_path / "other", ignore_progress)
    assert main(["check", "--state", str(state), "--repair", "--from", str(tmp_path / "backup")]) == ExitCode.OK


# Identity.


def test_a_restored_servers_epochs_are_later_than_all_that_the_old_one_used(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "backup", ignore_progress)
    with IdentityFolder(state) as old:
        used = [old.epochs.next() for _ in range(600)]
    with IdentityFolder(restore(tmp_path / "backup", tmp_path / "new")) as identity:
        assert identity.epochs.next() > max(used)


# PostgreSQL.


@pytest.mark.postgresql
def test_a_job_moves_between_databases(tmp_path: Path, postgres: Postgres, final_state: State) -> None:
    here = tmp_path / "state"
    play_job(here, events=7)
    with IdentityFolder.make(here, "default") as identity:
        identity.store.approve("attic", "ab" * 32, 1)
        identity.store.store_answer("aa", "attic", b"the first")
    back_up(here, tmp_path / "one", ignore_progress)
    url = postgres.database()
    there = restore(tmp_path / "one", tmp_path / "there", url)
    assert not (there / DATABASE_FILE).exists()
    assert rows(there) == rows(here)
    with IdentityFolder(there) as identity:
        identity.store.store_answer("bb", "attic", b"the second")  # under a number that is free
    play_job(there, events=6)
    back_up(there, tmp_path / "two", ignore_progress)
    back = restore(tmp_path / "two", tmp_path / "back")
    assert rows(back) == rows(there)
    with IdentityFolder(back) as identity:
        assert identity.store.members() == {"attic": "ab" * 32}
        assert [identity.store.stored_answer(name) for name in ("aa", "bb")] == [b"the first", b"the second"]
    assert [r["model"] for r in play_job(back).history] == [r["model"] for r in final_state.history]
    with pytest.raises(ConfigError, match="holds a job already"):
        restore(tmp_path / "two", tmp_path / "other", url)
    assert not (tmp_path / "other").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [NAME, "blobs/??/*"])
def test_a_pipe_in_a_backup_is_refused(job_in_round_two: Path, tmp_path: Path, name: str) -> None:
    back_up(job_in_round_two, tmp_path / "backup", ignore_progress)
    path = next((tmp_path / "backup").glob(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match=f"{path.name}: not a regular file"):
        restore(tmp_path / "backup", tmp_path / "new")
