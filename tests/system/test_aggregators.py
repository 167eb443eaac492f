"""Aggregators as real processes with real boards: the models are those of one server, whatever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import load_pem_x509_crl

from fedprune.coordination import State
from fedprune.core.errors import ExitCode
from fedprune.jobs.state import Progress
from fedprune_server.cli.main import main
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import models
from support.processes.real_site import Site, write_material
from support.processes.s3 import Moto
from support.processes.tiered_site import TieredSite

pytestmark = [pytest.mark.soak, pytest.mark.system]

DEVICES = ("ant", "bee", "cat", "dog")
REGIONS = {"north": DEVICES[:2], "south": DEVICES[2:]}
JOB = """
[job]
name = "{strategy}"
strategy = "{strategy}"
rounds = 3
devices = 4
density = 0.5
deadline_s = 300

[job.recipe]
epochs = 10
lr = 0.01
"""
PATIENCE_S = 90


FIRST = JOB.format(strategy="fedprune")
FURTHER = {
    "subflot": JOB.format(strategy="subflot"),  # whose submodels depend on each board's last update
    "fiarse": JOB.format(strategy="fiarse"),  # whose masks of single elements only the server itself adds up
    "fedobp": JOB.format(strategy="fedobp"),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_material(folder, dict(zip(DEVICES, (200, 150, 120, 90), strict=True)))
    return folder


class SharedSite(Site):
    """A site whose server runs all jobs."""

    def start_all(self) -> None:
        for name, text in FURTHER.items():
            (self.folder / f"{name}.toml").write_text(text + self.files())
        super().start_all()

    def command(self, name: str) -> list[str]:
        further = [word for job in FURTHER for word in ("--job", str(self.folder / f"{job}.toml"))]
        return [*super().command(name), *(further if name == "server" else [])]

    def models(self, state: State) -> dict[str, list[str]]:
        """Those of each job, by its name, once the first one has finished in this state."""
        found = {"fedprune": models(state)}
        for job in FURTHER:
            with Storage.existing(self.state / "jobs" / job) as storage:
                found[job] = [r["model"] for r in storage.rounds()]
        return found


class SharedTier(SharedSite, TieredSite):
    """A tier whose server runs all jobs."""


@pytest.fixture(scope="module")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The models that one server makes without aggregators."""
    with SharedSite(material, tmp_path_factory.mktemp("alone"), FIRST, DEVICES, PATIENCE_S) as site:
        site.start_all()
        found = site.models(site.complete())
    assert [len(set(rounds)) for rounds in found.values()] == [3] * len(found)
    return found


@pytest.fixture
def expected(alone: dict[str, list[str]]) -> list[str]:
    """The models of the first job."""
    return alone["fedprune"]


def finished(site: TieredSite) -> State:
    for region in site.regions:
        assert site.processes[region].wait(site.patience_s) == 0, site.logs()
    return site.complete()


def test_models_are_those_of_one_server(material: Path, tmp_path: Path, alone: dict[str, list[str]]) -> None:
    """Boards are at the server, at aggregators and at an aggregator's aggregator; the latter take uploads over HTTP."""
    regions, below = {"country": ("ant",), "valley": ("bee",), "coast": ("cat",)}, {"valley": "country"}
    uploads = ("--serve-blobs", "127.0.0.1:0", "--uploads", "https")
    with SharedTier(
        material, tmp_path, FIRST, regions, PATIENCE_S, below=below, direct=("dog",), settings=uploads
    ) as site:
        site.start_all()
        assert site.models(finished(site)) == alone
        for folder in (site.state, site.state / "jobs" / "subflot"):
            with Storage.existing(folder) as storage:  # which aggregators have told
                assert all(up > 3 * 500 and down > 3 * 500 for down, up in storage.traffic().values())
        assert "bytes came from http" in site.logs_in_full()
        assert "it goes over MQTT" not in site.logs_in_full()


def test_killed_servers_lose_no_update(material: Path, tmp_path: Path, expected: list[str]) -> None:
    with TieredSite(material, tmp_path, FIRST, REGIONS, PATIENCE_S, secure=True, may_hold=True) as site:
        site.hold(2)
        site.start_all()
        site.wait_until_held(2)
        for name in ("north", "server", "south"):
            site.kill(name)
        site.let_go(2)
        assert models(finished(site)) == expected


@pytest.mark.soak
def test_a_board_moves_in_the_middle_of_its_training(material: Path, tmp_path: Path, expected: list[str]) -> None:
    with TieredSite(material, tmp_path, FIRST, REGIONS, PATIENCE_S, may_hold=True) as site:
        site.hold(2)
        site.start_all()
        site.wait_until_held(2)
        site.move("bee", "south")
        site.wait_until_held(2)
        site.let_go(2)
        assert models(finished(site)) == expected


def server(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedprune_server.cli.main", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


# At every push `tests/server/aggregators` revokes boards and their certificates at an aggregator.
@pytest.mark.soak
def test_a_board_that_the_server_revokes_is_out_at_its_aggregator(material: Path, tmp_path: Path) -> None:
    text = FIRST.replace("rounds = 3", "rounds = 100000").replace("devices = 4", "devices = 3")
    with TieredSite(material, tmp_path, text, REGIONS, PATIENCE_S, secure=True) as site:
        site.start_all()
        site.wait_for(lambda: (state := site.saved()) is not None and state.round > 1, "rounds")
        assert server("devices", "revoke", "ant", "--state", site.state).returncode == 0
        log = site.folder / "north.log"
        site.wait_for(lambda: "device ant was revoked" in log.read_text(), "ant is out at its aggregator")
        revoked = site.folder / "north" / "identity" / "crl.pem"
        site.wait_for(
            lambda: len(list(load_pem_x509_crl(revoked.read_bytes()))) == 1, "its certificate is revoked there"
        )
        for name in ("north", "server"):  # who start again know it at once
            site.kill(name)
        state = site.saved()
        assert state is not None
        out = state.round + 1  # the round that was under way may still wait for it
        site.wait_for(lambda: (state := site.saved()) is not None and state.round > out + 3, "rounds without ant")
        state = site.saved()
        assert state is not None
        assert all("ant" not in r["devices"] for r in state.history if r["round"] > out)
        refused = "ant is not a member", "ant is not approved"
        site.wait_for(lambda: any(text in log.read_text() for text in refused), "ant comes back and is refused")


@pytest.mark.soak
def test_an_aggregator_that_is_away_is_named_with_its_boards_until_it_is_back(material: Path, tmp_path: Path) -> None:
    text = FIRST.replace("rounds = 3", "rounds = 100000") + "[server]\naggregator_patience_s = 1\n"
    with TieredSite(material, tmp_path, text, REGIONS, PATIENCE_S) as site:

        def status() -> dict[str, Any]:
            return dict(json.loads(server("status", "--json", "--rounds", 1, "--state", site.state).stdout))

        def alerts() -> list[str]:
            return [str(a["what"]) for a in status()["alerts"] if a["kind"] == "aggregator"]

        site.start_all()
        site.wait_for(lambda: (state := site.saved()) is not None and state.round > 1, "rounds")
        assert {d["name"]: d["region"] for d in status()["devices"]} == {n: r for r in REGIONS for n in REGIONS[r]}
        assert alerts() == []
        site.processes["north"].kill()
        site.wait_for(lambda: bool(alerts()), "an alert")
        assert [what.partition(" has not")[0] for what in alerts()] == ["the aggregator north, which has 2 boards,"]
        found = server("doctor", "--state", site.state)
        assert found.returncode == ExitCode.FOUND
        assert alerts()[0] in found.stdout
        site.kill("north")  # which starts it again
        site.wait_for(lambda: not alerts(), "the end of the alert")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "an aggregator without a parent"),
        (["--parent", "https://127.0.0.1:1"], "wss://host:port"),
        (["--parent", "ws://127.0.0.1:1"], "[server] region"),
        (["--parent", "ws://127.0.0.1:1", "--region", "a b"], "[server] region"),
        (["--parent", "ws://fleet.example:1", "--region", "north"], "without TLS"),
        (
            ["--parent", "ws://localhost:7", "--region", "north", "--aggregators", "7"],
            "parent: expected another server",
        ),
        (["--config", "fleet.toml"], "fleet.toml: [job]: expected no job or model"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = '[server]\nparent = "ws://127.0.0.1:1"\nregion = "north"\n[job]\nrounds = 3\n'
    Path("fleet.toml").write_text(tables)
    code = main(["aggregate", "--state", str(tmp_path / "state"), "--insecure", *options])
    error = capsys.readouterr().err
    assert code == ExitCode.CONFIG, error
    assert said in error
    assert "Traceback" not in error


def test_servers_of_a_tier_can_be_checked_and_backed_up_in_the_middle_of_a_round(
    material: Path, tmp_path: Path, expected: list[str]
) -> None:
    with TieredSite(material, tmp_path, FIRST, REGIONS, PATIENCE_S, may_hold=True) as site:
        site.hold(2)
        site.start_all()
        site.wait_until_held(2)
        site.processes["bee"].kill()
        site.let_go(2)
        site.wait_for(lambda: (found := site.saved()) is not None and found.tasks.count(Progress.FOLDED) == 3, "sums")
        for name in ("server", "north"):
            state = site.state if name == "server" else site.folder / name
            for command in (["check"], ["backup", "--to", site.folder / f"{name}-backup"]):
                found = server(*command, "--state", state)
                assert found.returncode == 0, found.stdout + found.stderr
        site.kill("bee")
        assert models(finished(site)) == expected


def test_updates_go_into_a_bucket_of_each_aggregator(
    material: Path, tmp_path: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Moto()) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        bucket = s3.bucket()
        settings = ("--blobs", f"s3://{bucket}/{{region}}", "--uploads", "s3")
        with TieredSite(material, tmp_path, FIRST, REGIONS, PATIENCE_S, settings=settings) as site:
            site.start_all()
            assert models(finished(site)) == expected
            assert "it goes over MQTT" not in site.logs_in_full()
        assert {key.partition("/")[0] for key in s3.keys(bucket)} == set(REGIONS)


# At every push `tests/server/aggregators` collects parts of such jobs, and a test above kills all of a tier.
@pytest.mark.soak
def test_an_asynchronous_job_ends_through_aggregators_over_kills(material: Path, tmp_path: Path) -> None:
    text = JOB.format(strategy="fedbuff").replace("rounds = 3", "rounds = 12")
    with TieredSite(material, tmp_path, text, REGIONS, PATIENCE_S) as site:
        site.start_all()
        for number, name in ((2, "north"), (4, "server"), (6, "south")):
            site.wait_for(lambda: (state := site.saved()) is not None and state.round > number, "rounds")  # noqa: B023
            site.kill(name)
        for region in site.regions:
            assert site.processes[region].wait(site.patience_s) == 0, site.logs()
        state = site.finish()
        assert len(state.history) == 12
        assert len(set(models(state))) == 12
        progress = {p["progress"] for r in state.history for p in r["devices"].values()}
        assert progress <= {"folded", "refused"}, site.logs()
        assert "lost its sums" not in site.logs_in_full()
        assert "can't be read" not in site.logs_in_full()
