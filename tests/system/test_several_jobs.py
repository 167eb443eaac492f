"""Two jobs of one real server on real devices: each ends as if it had the fleet and MQTT alone, also after kill -9, and
though all blobs and updates go over HTTPS."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedprune.coordination import Phase, State
from fedprune.core.errors import ExitCode
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import models
from support.processes.machine import free_port
from support.processes.real_site import Site, job_config

pytestmark = pytest.mark.system

DEVICES = ("north", "south")
SEED = 7
FIRST = job_config("first", rounds=2, recipe={"epochs": 40, "lr": 0.001})
SECOND = job_config("second", seed=SEED, strategy="fedavg", rounds=2, density=0, recipe={"epochs": 30, "lr": 0.001})


class SharedSite(Site):
    """A site whose server runs a second job; with `alone` only that one."""

    def command(self, name: str) -> list[str]:
        command = super().command(name)
        return [*command, "--job", str(self.folder / "second.toml")] if name == "server" else command

    @property
    def second(self) -> Path:
        return self.state / "jobs" / "second"

    def saved_second(self) -> State | None:
        if not (self.second / "server.db").is_file():
            return None
        with Storage.open_existing(self.second) as storage:
            return storage.load()


@pytest.fixture(scope="module")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The models that each job makes alone."""
    with ExitStack() as stack:
        sites = []
        for text in (FIRST, SECOND):
            site = stack.enter_context(Site(material, tmp_path_factory.mktemp("alone"), text, DEVICES, 120))
            site.start_all()
            sites.append(site)
        return [models(site.finish()) for site in sites]


@pytest.fixture
def site(material: Path, tmp_path: Path) -> Iterator[SharedSite]:
    web = f'[server]\nserve_blobs = "127.0.0.1:{free_port()}"\nuploads = "https"\n'
    with SharedSite(material, tmp_path, FIRST + web, DEVICES, 120, secure=True, may_hold=True) as made:
        (made.folder / "second.toml").write_text(SECOND + made.files())
        yield made


def server(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedprune_server.cli.main", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


# At every push `tests/server/engine/test_host.py` kills a server of two jobs, and `test_backup.py` restores one.
@pytest.mark.soak
def test_two_jobs_share_a_fleet_over_a_kill_and_end_as_if_alone(site: SharedSite, alone: list[list[str]]) -> None:
    site.hold(1, seed=SEED)
    site.start_all()
    site.wait_until_held(1, seed=SEED)
    state = site.saved_second()
    assert state is not None
    assert (state.round, state.phase) == (1, Phase.TRAINING)
    site.kill("server")
    site.let_go(1, seed=SEED)
    first = site.finish()
    second = site.saved_second()
    assert second is not None
    assert [[r["model"] for r in s.history] for s in (first, second)] == alone
    logs = site.logs_in_full()
    assert "bytes came from https" in logs
    assert "comes over MQTT" not in logs
    assert "it goes over MQTT" not in logs
    said = server("status", "--state", site.state)
    assert "job first: round 2 of 2, finished" in said.stdout
    assert "job second: round 2 of 2, finished" in said.stdout
    assert server("check", "--state", site.state).returncode == ExitCode.OK
    assert server("backup", "--state", site.state, "--to", site.folder / "backup").returncode == ExitCode.OK
    copy = site.folder / "copy"
    assert server("restore", "--from", site.folder / "backup", "--state", copy).returncode == ExitCode.OK
    assert server("status", "--state", copy).stdout == said.stdout.replace(str(site.state), str(copy))
    assert server("check", "--state", copy).returncode == ExitCode.OK
