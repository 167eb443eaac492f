"""`fedprune-server rollout`: what the operator types and reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.releases.release import Release
from fedprune.security.keys import SigningKey
from fedprune.wire.fleet_messages import COMMITTED, DOWNLOADING, ReleaseReport
from fedprune_server.cli.main import main
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.ota.store import RolloutStore
from support.fakes.runtime_releases import make_release
from support.processes.postgres import Postgres

NAMES = [f"board-{i}" for i in range(20)]
Read = Callable[..., str]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of a server that has let twenty boards in."""
    with IdentityFolder.make(tmp_path / "server", "lab") as identity:
        for name in NAMES:
            key = SigningKey.make().verifying_key.hex
            identity.store.request_approval(name, key, 1)
            identity.store.approve(name, key, 2)
    return tmp_path / "server"


@pytest.fixture
def release(tmp_path: Path, state: Path) -> Path:
    with IdentityFolder(state) as identity:
        return make_release(tmp_path / "release", 7, key=identity.key)


@pytest.fixture
def read(state: Path, capsys: pytest.CaptureFixture[str]) -> Read:
    def run(*words: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["rollout", str(words[0]), "--state", str(state), *map(str, words[1:])]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out if code == 0 else err

    return run


def desk(state: Path, reports: list[ReleaseReport]) -> None:
    """A daemon that takes these reports, and ends."""
    with RolloutStore(state) as store:
        run = RolloutCoordinator(store, lambda *_: None)
        run.on_connection_change(True)
        for report in reports:
            run.on_report(report)


@pytest.mark.postgresql
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_rollout_is_stopped_from_another_machine_by_its_database(
    state: Path,
    release: Path,
    read: Read,
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_environment: bool,
) -> None:
    url, second = postgres.database(), tmp_path / "second"
    shutil.copytree(state / "identity", second / "identity")
    with IdentityFolder(state, database=url) as identity:
        identity.store.request_approval("board-0", key := SigningKey.make().verifying_key.hex, 1)
        identity.store.approve("board-0", key, 2)
    chosen = ("--database", url)
    assert "to 1 board" in read("start", release, *chosen)
    assert read("status") == "no release has been rolled out yet\n"  # that is of the folder's own database
    if by_environment:
        monkeypatch.setenv("FEDPRUNE_SERVER_DATABASE", url)
        chosen = ()
    words = "--state", second, *chosen
    assert "rollout 1 of release 7" in read("status", *words)
    assert read("stop", *words) == "rollout 1 will stop: boards that have the release keep it\n"
    assert json.loads(read("list", "--json", *words))[0]["stopping"] == "by the operator"
    assert not (second / "server.db").exists()


def test_a_rollout_is_begun_looked_at_and_stopped(state: Path, release: Path, read: Read) -> None:
    assert read("status") == "no release has been rolled out yet\n"
    assert json.loads(read("status", "--json")) is None
    lines = read("start", release, "--seed", 3).splitlines()
    assert lines[0] == "rollout 1: release 7 (0.7.0) to 20 boards, all members"
    assert [x.split(":")[1] for x in lines[1:4]] == [" 1 board", " 1 board", " 18 boards"]
    assert "60 minutes" in lines[4]
    assert "--devices" in lines[5]
    assert "no server is running" in lines[6]
    first = lines[1].split()[-1]
    assert "not begun" in read("status")

    desk(state, [ReleaseReport(first, 7, DOWNLOADING, "", 3, 10)])
    text = read("status")
    assert "rollout 1 of release 7 (0.7.0): running, stage 1 of 3" in text
    assert f"  {first}: downloading, 30% when it last said so" in text
    desk(state, [ReleaseReport(first, 7, COMMITTED, "", 0, 0)])
    body = json.loads(read("status", "--json"))
    assert (body["release"], body["phase"], body["stage"], body["committed"]) == (7, "running", 1, [first])
    assert [stage["share"] for stage in body["plan"]["stages"]] == [1 / 20, 0.1, 1.0]

    assert "boards that have the release keep it" in read("stop", "--reason", "enough")
    assert "to be stopped" in read("status")
    desk(state, [])
    assert "stopped: enough" in read("status")
    assert "no rollout is under way" in read("stop", code=14)


def test_of_two_starts_at_once_one_is_refused_and_deletes_nothing(
    state: Path, release: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with IdentityFolder(state) as identity:
        other_release = make_release(tmp_path / "other", 8, key=identity.key)
    put, codes = BlobStore.put, []

    def meanwhile(self: BlobStore, data: bytes) -> BlobRef:
        ref = put(self, data)
        if not codes:
            codes.append(-1)
            codes.append(main(["rollout", "start", str(other_release), "--state", str(state)]))
        return ref

    monkeypatch.setattr(BlobStore, "put", meanwhile)
    read("start", release)
    assert codes == [-1, 31]
    with RolloutStore(state) as store:
        entry = store.latest_entry()
        assert entry is not None
        assert entry.offer.number == 7
        files = Release.from_bytes(entry.offer.manifest.encode()).files
        assert store.blobs.names() == sorted(f.sha256 for f in files)
    assert "is under way" in read("start", other_release, code=14)


def test_what_makes_no_sense_is_refused_before_anything_is_kept(
    state: Path, release: Path, read: Read, tmp_path: Path
) -> None:
    read("start", release, "--groups", "10%", code=14)
    read("start", release, "--success", "95%", "--errors", "20%", code=14)
    assert "attempts" in read("start", release, "--attempts", 101, code=2)
    assert "rollout.board_seconds: expected" in read("start", release, "--patience", 0, code=14)
    assert "can't read" in read("start", tmp_path / "nowhere", code=31)
    assert "signature is not the server's" in read("start", make_release(tmp_path / "foreign", 8), code=65)
    victim = next((release / "files").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    assert "Copy the release's folder again" in read("start", release, code=65)
    with RolloutStore(state) as store:
        assert store.latest_entry() is None
        assert store.blobs.names() == []
    for words in (["--groups", "a%"], ["--groups", "0.1"], ["--success", "1"], ["--errors", "101%"]):
        with pytest.raises(SystemExit):
            main(["rollout", "start", str(release), "--state", str(state), *words])


def test_a_server_without_identity_or_boards_rolls_nothing_out(
    tmp_path: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["start", str(release)], ["status"], ["stop"]):
        assert main(["rollout", *command, "--state", str(tmp_path / "none")]) == 63
        assert "fedprune-server init" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    IdentityFolder.make(tmp_path / "new", "lab").close()
    with IdentityFolder(tmp_path / "new") as identity:
        own_release = make_release(tmp_path / "own", 1, key=identity.key)
    assert main(["rollout", "start", str(own_release), "--state", str(tmp_path / "new")]) == 14
    assert "no board is a member, or all are revoked" in capsys.readouterr().err


def test_boards_that_left_the_fleet_are_named_and_counted_apart(state: Path, release: Path, read: Read) -> None:
    read("start", release, "--groups", "100%")
    with IdentityFolder(state) as identity:
        identity.revoke("board-3")
        with RolloutStore(state) as store:
            RolloutCoordinator(store, lambda *_: None, identity.store.members).on_connection_change(True)
    text = read("status")
    assert "0 updated, 19 updating, 0 failed, 0 pending, of 19" in text
    assert [line.split()[-1] for line in text.splitlines() if "left the fleet" in line] == ["board-3"]
