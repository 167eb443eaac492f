"""Two servers of one job: the second continues where the first was killed; and a database that is killed under them."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedprune.coordination import State
from fedprune.core.errors import ExitCode
from fedprune_server.enrollment.pki import IdentityFolder
from support.fakes.fleet import models
from support.fakes.members import serials_of
from support.processes.postgres import Postgres
from support.processes.real_site import Site, job_config
from support.processes.s3 import S3, Ceph

pytestmark = [pytest.mark.system, pytest.mark.mosquitto]

DEVICES = ("north", "south")
CONFIG = job_config("standby", rounds=3, recipe={"epochs": 40, "lr": 0.001})


class Pair(Site):
    """A site with a second server, and perhaps the database elsewhere."""

    database: str | None = None
    blobs: str | None = None
    settings: tuple[str, ...] = ()

    def command(self, name: str) -> list[str]:
        if name not in ("server", "second"):
            return super().command(name)
        command = super().command("server") + ([] if self.database is None else ["--database", self.database])
        command += [*([] if self.blobs is None else ["--blobs", self.blobs]), *self.settings]
        if name == "second":
            if self.database is not None:
                command[command.index("--state") + 1] = str(self.folder / "second")
            command.append("--standby")
        return command


@pytest.fixture
def pair(material: Path, tmp_path: Path) -> Iterator[Pair]:
    with Pair(material, tmp_path, CONFIG, DEVICES, 120, mosquitto=True, may_hold=True) as made:
        yield made


@pytest.fixture
def database() -> Iterator[Postgres]:
    with closing(Postgres()) as made:
        made.start()
        yield made


@pytest.fixture
def s3() -> Iterator[S3]:
    with closing(Ceph()) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> State:
    with Site(material, tmp_path_factory.mktemp("calm"), CONFIG, DEVICES, 120) as calm:
        calm.start_all()
        return calm.finish()


def start_both(pair: Pair) -> None:
    """Start the site, and a second server that waits; round 1 is held."""
    pair.hold(1, 2)
    pair.start_all()
    pair.wait_for_the_middle(1)  # else the second might be the first
    pair.start("second")
    pair.wait_for(lambda: "standing by" in pair.logs_in_full(), "the second server waits")


def kill_the_first(pair: Pair) -> None:
    """Kill the first server in the middle of round 2; the second is the server from now on."""
    pair.let_go(1)
    pair.wait_for_the_middle(2)
    pair.processes["server"].kill()
    pair.processes["server"].wait()
    pair.let_go(2)
    pair.processes["server"] = pair.processes.pop("second")


@pytest.mark.soak
@pytest.mark.postgresql
def test_a_standby_with_an_empty_folder_goes_on_with_the_database_and_the_bucket(
    database: Postgres, s3: S3, pair: Pair, undisturbed: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    pair.database, pair.blobs = database.database(), f"s3://{s3.bucket()}/fleet"
    pair.settings = ("--uploads", "s3")
    start_both(pair)
    kill_the_first(pair)
    s3.hold()  # the second must not begin with less than all
    shutil.rmtree(pair.state / "blobs")
    time.sleep(1)
    s3.resume()
    # To the same bits, and nothing is wrong with the state folder of who ended it.
    assert models(pair.finish()) == models(undisturbed)
    command = [sys.executable, "-m", "fedprune_server.cli.main", "check", "--state", str(pair.folder / "second")]
    assert subprocess.run(command, check=False).returncode == ExitCode.OK
    logs = pair.logs_in_full()
    assert "taking over from" in logs
    assert "bytes of the update were uploaded to http" in logs
    assert "it goes over MQTT" not in logs


@pytest.mark.postgresql
def test_a_standby_keeps_a_revocation_that_was_made_a_second_before(
    database: Postgres, material: Path, tmp_path: Path
) -> None:
    url, second = database.database(), tmp_path / "second"
    (tmp_path / "blobs").mkdir()
    for folder in (tmp_path / "server", second):
        folder.mkdir()
        (folder / "blobs").symlink_to(tmp_path / "blobs")
    (tmp_path / "server" / "database").write_text(url)  # as `init --database` leaves it
    config = job_config("standby", rounds=100000, devices=1, recipe={"epochs": 40, "lr": 0.001})
    with Pair(material, tmp_path, config, DEVICES, 120, mosquitto=True, secure=True) as pair:
        pair.database = url

        def round_now() -> int:
            state = pair.saved_state()
            return 0 if state is None else state.round

        shutil.copytree(pair.state / "identity", second / "identity")  # before any board has joined
        pair.start_all()
        pair.wait_for(lambda: round_now() > 1, "rounds")
        pair.start("second")
        pair.wait_for(lambda: "standing by" in pair.logs_in_full(), "the second server waits")
        command = [sys.executable, "-m", "fedprune_server.cli.main", "devices", "revoke", "north"]
        subprocess.run([*command, "--state", str(second), "--database", url], check=True, capture_output=True)
        time.sleep(1)
        pair.processes["server"].kill()
        pair.processes["server"].wait()
        pair.processes["server"] = pair.processes.pop("second")
        pair.wait_for(lambda: "taking over from" in pair.logs_in_full(), "the second server takes over")
        out = round_now() + 1  # the round that was under way may have had it
        pair.wait_for(lambda: round_now() > out + 3, "rounds without north")
        state = pair.saved_state()
        assert state is not None
        assert all(r["devices"].keys() == {"south"} for r in state.history if r["round"] > out)
        with IdentityFolder(second, read_only=True) as identity:
            assert identity.store.members().keys() == {"south"}
            assert identity.store.revoked_certificates().keys() == serials_of(second, "north") != set()
