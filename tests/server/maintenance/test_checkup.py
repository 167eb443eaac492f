"""A check names whatever is wrong with a state folder, and a repair takes nothing that the job needs."""

import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import TABLE_SUFFIX
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.output.tables import ignore_progress
from fedprune_server.cli.main import main
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.maintenance.backup_manifest import CONSOLE
from fedprune_server.maintenance.finding import Finding, Severity
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.blob_place import BLOBS_FOLDER
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.storage import Storage
from fedprune_server.web.database import ConsoleDatabase
from support.fakes.recorded_job import play_job
from support.processes.postgres import Postgres


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job in its third round, with identity and rollouts."""
    state = tmp_path_factory.mktemp("kept") / "state"
    play_job(state, events=17)
    play_job(state, events=0)  # a start deletes what the rounds before have left
    IdentityFolder.make(state, "default").close()
    RolloutStore(state).close()
    return state


@pytest.fixture
def state(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "state")


def run(*arguments: object) -> int:
    return main(["check", *map(str, arguments)])


def findings_of(state: Path, *, running: bool = False) -> list[Finding]:
    return list(check_state(state, ignore_progress, running=running))


def wrong(state: Path) -> list[str]:
    return [f.message for f in findings_of(state) if f.severity is Severity.WRONG]


def model_and_references(state: Path) -> tuple[str, dict[str, str]]:
    """Of all that is there, the state, and the digests of the blobs that it refers to."""
    with Storage.open_existing(state) as storage:
        loaded = storage.load()
        assert loaded is not None
        return loaded.model, dict.fromkeys(loaded.references(), "")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_healthy_folder_has_nothing_and_nothing_is_written(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(state)
    assert findings_of(state) == []
    assert run("--state", state) == ExitCode.OK
    assert capsys.readouterr().out == f"{state}: all that its job needs is there and whole\n"
    after = contents(state)
    for name in after.keys() - before.keys():
        assert name.startswith(DATABASE_FILE)  # SQLite's own, of whoever reads
    assert {k: v for k, v in after.items() if k in before and k != f"{DATABASE_FILE}-shm"} == {
        k: v for k, v in before.items() if k != f"{DATABASE_FILE}-shm"
    }


@pytest.mark.parametrize(
    "events", [pytest.param(n, marks=pytest.mark.soak if n % 4 == 1 else ()) for n in range(1, 24, 2)]
)
def test_a_job_is_healthy_after_each_of_its_events(tmp_path: Path, events: int) -> None:
    play_job(tmp_path / "state", events=events)
    assert [f for f in findings_of(tmp_path / "state") if f.severity is Severity.WRONG] == []
    assert not any("log" in f.message for f in findings_of(tmp_path / "state"))
    play_job(tmp_path / "state")
    assert wrong(tmp_path / "state") == []


@pytest.mark.postgresql
def test_a_folder_whose_database_is_elsewhere_is_checked_too(tmp_path: Path, postgres: Postgres) -> None:
    database = postgres.database()
    play_job(tmp_path / "state", events=9, database=database)
    play_job(tmp_path / "state", events=0, database=database)
    assert findings_of(tmp_path / "state") == []
    BlobStore(tmp_path / "state" / BLOBS_FOLDER).delete(model_and_references(tmp_path / "state")[0])
    assert len(wrong(tmp_path / "state")) == 1


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def edit(state: Path, statement: str) -> None:
    connection = sqlite3.connect(state / DATABASE_FILE)
    connection.execute(statement)
    connection.commit()
    connection.close()


def crown(state: Path) -> None:
    with ConsoleDatabase(state / CONSOLE) as console:
        console.execute("INSERT INTO operators VALUES ('ann', 'king', 'a hash', 1, 1)")


LOG_SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a device gone": (lambda s: edit(s, "DELETE FROM devices"), "log ends in another state: devices"),
    "an event gone": (lambda s: edit(s, "DELETE FROM events WHERE number = 7"), "log (ends in another|can't be)"),
    "the state changed": (
        lambda s: edit(s, "UPDATE meta SET value = replace(value, '\"round\":3', '\"round\":2') WHERE key = 'state'"),
        "log ends in another state: round",
    ),
}

SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "model blob gone": (
        lambda s: BlobStore(s / BLOBS_FOLDER).delete(model_and_references(s)[0]),
        "blob [0-9a-f]{64} is missing",
    ),
    "model file damaged": (lambda s: flip(s / "model.onnx"), r"model\.onnx is damaged"),
    "a participant gone": (
        lambda s: edit(
            s, "DELETE FROM participants WHERE round = 2 AND device = (SELECT max(device) FROM participants)"
        ),
        "participants of rounds are missing",
    ),
    "rollouts damaged": (
        lambda s: edit(
            s,
            "INSERT INTO rollouts (number, at, release, offer, joins, phase, rollout, changes) "
            "VALUES (1, 1, 1, x'00', 1, 'done', '{}', 1)",
        ),
        "rollout 1 is damaged",
    ),
    "members damaged": (
        lambda s: edit(s, "INSERT INTO members (device, key, status, asked) VALUES ('attic', 'aa', 'odd', 1)"),
        "member attic is damaged",
    ),
    "list of revocations damaged": ((lambda s: flip(s / "identity" / "crl.pem")), "crl.pem is damaged.* devices list"),
    "server's key another one": (
        lambda s: shutil.copy(s / "identity" / "authority.key", s / "identity" / "server.key"),
        "don't belong together.*next start",
    ),
    "an operator's role is none": (crown, "ann"),
    "signing key damaged": (lambda s: (s / "identity" / "signing.key").write_bytes(b"x"), "signing.key"),
}


@pytest.mark.parametrize(
    ("name", "advice"),
    {
        "site": "Write the site's name", "authority.key": "Restore", "crl.pem": "devices list",
        "epoch": "machine's clock", "server.key": "next start",
    }.items(),
)  # fmt: skip
def test_what_an_identity_lacks_is_named_with_what_to_do(state: Path, name: str, advice: str) -> None:
    (state / "identity" / name).unlink()
    before = contents(state)
    lines = [str(f) for f in findings_of(state) if f.severity is Severity.WRONG]
    assert len(lines) == 1
    assert re.search(rf"/{re.escape(name)} is missing\. .*{advice}", lines[0])
    assert {k for k in contents(state) if k.startswith("identity")} == {k for k in before if k.startswith("identity")}


def test_what_is_said_to_mend_an_identity_mends_it(state: Path) -> None:
    for name in ("site", "epoch", "server.key", "crl.pem"):
        (state / "identity" / name).unlink()
    assert len(wrong(state)) == 4
    with pytest.raises(FedpruneError, match="site is missing"):
        IdentityFolder(state)
    (state / "identity" / "site").write_text("default")
    with IdentityFolder(state) as identity:
        identity.client_files()
        identity.epochs.next()
        identity.store.devices()
    assert wrong(state) == []


def test_an_identity_whose_name_was_lost_keeps_its_keys(state: Path) -> None:
    before = contents(state / "identity")
    (state / "identity" / "site").unlink()
    IdentityFolder.make(state, "default").close()
    after = contents(state / "identity")
    assert {k for k in before if before[k] != after[k]} <= {"server.key", "server.pem"}


@pytest.mark.parametrize("name", SPOILS)
def test_what_is_wrong_is_named(state: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = SPOILS[name]
    spoil(state)
    assert run("--state", state) == ExitCode.STORAGE
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert any(re.search(words, line) for line in lines), out
    assert "wrong. See above" in err
    assert len(err.splitlines()) == 1
    assert run("--state", state, "--repair") == ExitCode.STORAGE  # none of these can be mended from nothing


@pytest.mark.parametrize("name", LOG_SPOILS)
def test_a_log_that_leads_elsewhere_is_noted(state: Path, name: str) -> None:
    spoil, words = LOG_SPOILS[name]
    spoil(state)
    assert [f.severity for f in findings_of(state) if re.search(words, f.message)] == [Severity.NOTE]


def test_a_damaged_database_is_one_error(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(state / DATABASE_FILE) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    raw = bytearray((state / DATABASE_FILE).read_bytes())
    raw[4096:8192] = b"\xa5" * 4096
    (state / DATABASE_FILE).write_bytes(raw)
    assert run("--state", state) == ExitCode.STORAGE
    assert "restore the server's backup" in capsys.readouterr().err.lower()


def test_what_is_left_over_is_counted_and_goes_by_a_repair_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    play_job(state, events=9)
    store = BlobStore(state / BLOBS_FOLDER)
    (store.root / "tmp" / "1-abcd").write_bytes(b"half")
    (store.root / "partial" / ("0" * 64)).write_bytes(b"half")
    orphan = store.put(b"nobody's").sha256
    lonely = store.path("1" * 64)
    lonely.parent.mkdir(exist_ok=True)
    lonely.with_name(lonely.name + TABLE_SUFFIX).write_bytes(b"x" * 32)
    (store.root / "notes.txt").write_text("mine")
    before, needed = contents(state / BLOBS_FOLDER), model_and_references(state)[1]
    texts = " ".join(f.message for f in findings_of(state))
    for words in ("what nothing refers to", "without a blob", "that no board sends", "temporary files", "notes.txt"):
        assert words in texts
    assert run("--state", state) == ExitCode.OK
    assert contents(state / BLOBS_FOLDER) == before
    assert run("--state", state, "--repair") == ExitCode.OK
    assert not store.has(orphan)
    assert (store.root / "notes.txt").exists()
    assert needed.keys() <= set(store.names())
    assert [f.message for f in findings_of(state) if "notes" not in f.message] == []


def test_while_a_server_runs_nothing_is_repaired_and_nothing_new_is_an_orphan(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StateFolder(state) as folder:
        folder.store.put(b"not yet saved")
        assert findings_of(state, running=True) == []
        assert run("--state", state) == ExitCode.OK
        assert run("--state", state, "--repair") == ExitCode.STORAGE
        assert "another server runs" in capsys.readouterr().err


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_its_blobs_a_repair_mends_it_from_a_backup_or_says_what_is_lost(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = shutil.copytree(original, tmp_path_factory.mktemp("copy") / "state")
    store, intact = BlobStore(state / BLOBS_FOLDER), BlobStore(original / BLOBS_FOLDER)
    files = sorted(p for p in store.root.glob("??/*"))
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=4, unique=True)):
        if data.draw(st.booleans()):
            flip(path)
        elif data.draw(st.booleans()):
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink()
    needed = set(model_and_references(state)[1])
    hurt = {d for d in needed if not readable(store, d)}
    assert hurt <= {f.blob for f in findings_of(state) if f.severity is Severity.WRONG}
    assert run("--state", state, "--repair") == (ExitCode.STORAGE if hurt else ExitCode.OK)
    assert {d for d in needed if readable(store, d)} == needed - hurt
    assert run("--state", state, "--repair", "--from", original) == ExitCode.OK
    for digest in needed:
        assert store.read(digest) == intact.read(digest)
        assert store.ref(digest) == intact.ref(digest)
    with StateFolder(state) as folder:
        assert folder.storage.load() is not None


def readable(store: BlobStore, digest: str) -> bool:
    try:
        store.read(digest)
    except FedpruneError:
        return False
    return True
