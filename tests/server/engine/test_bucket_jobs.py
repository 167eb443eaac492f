"""Jobs whose blobs are in a bucket: whatever is lost but the bucket and the database, they end with the same models."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from fedprune.coordination import State
from fedprune.core.errors import ExitCode
from fedprune.output.tables import ignore_progress
from fedprune.wire.messages import Accepted
from fedprune_server.cli.main import main
from fedprune_server.maintenance.backup import back_up
from fedprune_server.maintenance.finding import Finding, Severity
from fedprune_server.maintenance.restoring import Backup
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.storage.blob_place import BLOBS_FOLDER
from fedprune_server.storage.s3 import retry_policy
from fedprune_server.storage.s3.bucket import BucketError, digest_of, parse_bucket_url
from fedprune_server.storage.s3.store import BucketStore
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import NAMES, Fleet, models
from support.fakes.recorded_job import play_job
from support.fakes.tiny_job import JOB
from support.processes.s3 import S3

MIDDLE = 11  # events, in the second round


@pytest.fixture(scope="module")
def calm_state(tmp_path_factory: pytest.TempPathFactory) -> State:
    """What the job ends with, undisturbed and in a folder."""
    return play_job(tmp_path_factory.mktemp("calm") / "state")


@pytest.fixture
def url(at_s3: S3) -> str:
    return f"s3://{at_s3.bucket()}/fleet"


@pytest.fixture
def half_done(url: str, tmp_path: Path) -> Path:
    state = tmp_path / "state"
    play_job(state, events=MIDDLE, blobs=url)
    return state


def findings(state: Path) -> list[Finding]:
    return list(check_state(state, ignore_progress, running=False))


def wrong(state: Path) -> list[str]:
    return [f.message for f in findings(state) if f.severity is Severity.WRONG]


def keys(s3: S3, url: str) -> dict[str, str]:
    """By digest the key of its object."""
    name, prefix = parse_bucket_url(url)
    names = [k.removeprefix(prefix) for k in s3.keys(name)]
    return {d: prefix + k for k in names if (d := digest_of(k)) is not None}


def needed(state: Path) -> set[str]:
    with Storage.open_existing(state) as storage:
        loaded = storage.load()
    assert loaded is not None
    return loaded.references()


@pytest.mark.parametrize("at_s3", ["moto", "ceph"], indirect=True)
@pytest.mark.parametrize("events", [4, MIDDLE, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 14))])
def test_the_database_and_the_bucket_are_enough_to_go_on(
    url: str, tmp_path: Path, calm_state: State, events: int
) -> None:
    play_job(tmp_path / "one", events=events, blobs=url)
    (tmp_path / "two").mkdir()
    for name in ("server.db", "server.db-wal"):
        if (tmp_path / "one" / name).exists():
            shutil.copy(tmp_path / "one" / name, tmp_path / "two" / name)
    assert models(play_job(tmp_path / "two", blobs=url)) == models(calm_state)
    assert wrong(tmp_path / "two") == []
    assert main(["export-model", "--state", str(tmp_path / "two"), "--out", str(tmp_path / "x.safetensors")]) == 0


def test_what_the_state_names_is_in_the_bucket_and_later_starts_delete_the_rest(
    at_s3: S3, half_done: Path, url: str
) -> None:
    assert needed(half_done) <= keys(at_s3, url).keys()
    play_job(half_done, blobs=url)
    state = play_job(half_done, blobs=url, keep=1)
    assert needed(half_done) <= keys(at_s3, url).keys()
    assert {state.history[0]["model"], state.history[1]["model"]}.isdisjoint(keys(at_s3, url))


def test_a_job_moves_from_the_folder_to_a_bucket_to_another_and_back(
    at_s3: S3, url: str, tmp_path: Path, calm_state: State
) -> None:
    state = tmp_path / "state"
    play_job(state, events=6)
    play_job(state, events=4, blobs=url)
    assert needed(state) <= keys(at_s3, url).keys()
    shutil.rmtree(state / BLOBS_FOLDER)
    second_url = f"s3://{at_s3.bucket()}"
    play_job(state, events=4, blobs=second_url)
    assert needed(state) <= keys(at_s3, second_url).keys()
    shutil.rmtree(state / BLOBS_FOLDER)
    assert models(play_job(state)) == models(calm_state)
    assert wrong(state) == []


def test_check_finds_what_is_wrong_with_objects_and_repair_mends_it(
    at_s3: S3, half_done: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], calm_state: State
) -> None:
    assert wrong(half_done) == []
    there, client, (name, prefix) = keys(at_s3, url), at_s3.client(), parse_bucket_url(url)
    first, second = sorted(needed(half_done))[:2]
    client.put_object(Bucket=name, Key=there[first], Body=b"damaged")
    client.delete_object(Bucket=name, Key=there[second])
    client.put_object(Bucket=name, Key=f"{prefix}blobs/{'a' * 64}.{'0' * 16}", Body=b"nobody's")
    client.put_object(Bucket=name, Key=f"{prefix}notes.txt", Body=b"somebody's")
    assert len(wrong(half_done)) == 3  # one damaged, one missing, one damaged that nobody needs
    assert any("notes.txt" in f.message for f in findings(half_done))
    assert main(["check", "--state", str(half_done)]) == ExitCode.STORAGE
    assert main(["check", "--state", str(half_done), "--repair"]) == ExitCode.OK
    assert (half_done / "damaged" / Path(there[first]).name).read_bytes() == b"damaged"
    assert "a" * 64 not in keys(at_s3, url)
    assert f"{prefix}notes.txt" in at_s3.keys(name)
    capsys.readouterr()
    shutil.rmtree(half_done / BLOBS_FOLDER)
    assert wrong(half_done) == []
    assert models(play_job(half_done, blobs=url)) == models(calm_state)


@pytest.mark.parametrize("blobs", [pytest.param("folder", marks=pytest.mark.soak), "elsewhere"])
def test_a_backup_of_a_bucket_is_restored_to_a_folder_or_another_bucket(
    at_s3: S3, half_done: Path, tmp_path: Path, url: str, calm_state: State, blobs: str
) -> None:
    shutil.rmtree(half_done / BLOBS_FOLDER)  # a copy; the backup takes what the bucket has
    back_up(half_done, tmp_path / "backup", ignore_progress)
    assert not list((half_done / BLOBS_FOLDER).glob("??/*"))  # and leaves nothing behind
    source = Backup(tmp_path / "backup")
    source.verify(ignore_progress)
    source.restore(tmp_path / "restored", None, ignore_progress)
    client, (name, _) = at_s3.client(), parse_bucket_url(url)
    for key in at_s3.keys(name):
        client.delete_object(Bucket=name, Key=key)
    client.delete_bucket(Bucket=name)
    where = "folder" if blobs == "folder" else f"s3://{at_s3.bucket()}/new"
    assert models(play_job(tmp_path / "restored", blobs=where)) == models(calm_state)
    assert wrong(tmp_path / "restored") == []


# The daemon.


@pytest.fixture
def fleet(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setattr(retry_policy, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry_policy, "MAX_PAUSE_S", 0.02)
    fleet = Fleet(tmp_path)
    store = BucketStore(tmp_path / "blobs", url)
    store.retry.is_endless = True
    fleet.store = fleet.worker.store = store
    return fleet


@pytest.fixture(scope="module")
def folder_state(tmp_path_factory: pytest.TempPathFactory) -> State:
    return Fleet(tmp_path_factory.mktemp("fleet")).run()


def test_an_update_is_acknowledged_only_when_the_bucket_has_it(
    at_s3: S3, fleet: Fleet, url: str, folder_state: State
) -> None:
    in_bucket = []
    device = fleet.air.devices["a"]
    hear = device.hear

    def check_bucket(topic: str, payload: bytes) -> None:
        hear(topic, payload)
        if isinstance(device.heard[-1], Accepted) and not topic.endswith("blob"):
            in_bucket.append(device.heard[-1].weights in keys(at_s3, url))

    device.hear = check_bucket  # type: ignore[method-assign]
    assert models(fleet.run()) == models(folder_state)
    assert in_bucket == [True] * 3


def test_a_round_waits_for_the_bucket_beyond_its_deadline_and_loses_nothing(fleet: Fleet, folder_state: State) -> None:
    store = fleet.store
    assert isinstance(store, BucketStore)
    real, daemon = store.bucket.put, fleet.daemon()

    def away(key: str, data: bytes, sha256: str) -> None:
        # One update waits: offers go out and others' updates count, so that the round could end at its deadline.
        ships = threading.current_thread().name == "fedprune-bucket-sync"
        if ships and fleet.air.now < 3 * JOB.deadline_s and late in ([], [sha256]):
            late[:] = [sha256]
            raise BucketError("the bucket is away")
        real(key, data, sha256)

    store.bucket.put = away  # type: ignore[assignment,method-assign]

    late: list[str] = []
    pauses: list[float] = []

    def idle() -> None:
        time.sleep(0.0005)
        if not daemon.is_busy or daemon.main_runner._bucket_sync.is_stuck:
            fleet.air.now += 0.5
        if daemon.main_runner._bucket_sync.is_stuck:
            pauses.append(daemon.main_runner.max_wait_s)

    fleet.air.on_idle = idle
    daemon.run(until_finished=True)
    state = daemon.main_runner.state
    assert fleet.air.now >= 3 * JOB.deadline_s
    assert sum(pause > 0 for pause in pauses) > len(pauses) / 2  # the loop doesn't spin meanwhile
    assert models(state) == models(folder_state)
    assert [sorted(n for n, d in r["devices"].items() if d["progress"] == "folded") for r in state.history] == [
        sorted(NAMES)
    ] * 3
