"""The services of deploy/compose.yaml as programs of this machine: its commands, files and environment, other paths."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.storage.storage import Storage
from support.processes.compose_file import DEPLOY, mounts, read_compose, replace_texts
from support.processes.machine import find_mosquitto, free_port, listens
from support.processes.postgres import Postgres
from support.processes.real_site import write_material
from support.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.mosquitto, pytest.mark.postgresql, pytest.mark.soak]

BOARDS = ("attic", "barn", "cellar")
PROGRAM = """#!/bin/sh
exec {python} -m fedprune_server.cli.main "$@"
"""


class Composed:
    """What `docker compose up` starts, in its order.

    Args:
        folder: A copy of deploy/, with secrets, model and samples.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.body = read_compose({"FEDPRUNE_HOST": "127.0.0.1"}, folder)
        self.ports = {port.split(":")[0]: free_port() for port in self.body["services"]["broker"]["ports"]}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "bin").mkdir()
        program = folder / "bin" / "fedprune-server"
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)

    def command_and_environment(self, name: str) -> tuple[list[str], dict[str, str]]:
        """A service's command and environment, with this machine's paths, hosts and ports."""
        service = self.body["services"][name]
        found = mounts(self.body, name, self.folder)
        for path in found.values():
            if not path.exists():
                path.mkdir(parents=True, mode=0o700)
        places = {target: str(path) for target, path in found.items()}
        places |= {f"broker:{port}": f"127.0.0.1:{own}" for port, own in self.ports.items()}
        words = [*service.get("entrypoint", []), *service["command"]]
        if name == "server":  # the image says the entrypoint, and where the pulse is
            words = ["fedprune-server", *words]
        environment = {"FEDPRUNE_PULSE": "/run/fedprune/pulse"} if name in ("server", "prepare") else {}
        environment |= service.get("environment", {})
        inherited = {k: os.environ[k] for k in ("PYTHONPATH", "HOME") if k in os.environ}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}:{Path(find_mosquitto()).parent}"
        own = {"PATH": path, "OMP_NUM_THREADS": "1"}
        return replace_texts(words, places), {**inherited, **own, **replace_texts(environment, places)}

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """What `docker compose exec` runs in a service, or without words the service until its end."""
        command, environment = self.command_and_environment(name)
        return subprocess.run(
            list(words) or command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False
        )

    def start(self, name: str, *words: str) -> None:
        """Start a service, or with words a program that isn't one."""
        command, environment = self.command_and_environment(name) if not words else (list(words), dict(os.environ))
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=log)

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        def came() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended: {self.logs()}"
            return bool(condition())

        until(came, what, explain=self.logs)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))

    def healthy(self) -> bool:
        """What the image's HEALTHCHECK finds, once the server has written anything at all."""
        (line,) = re.findall(r"^HEALTHCHECK .* CMD \[(.*)\]$", (self.folder / "Dockerfile").read_text(), re.MULTILINE)
        return self.run("server", *re.findall(r'"([^"]+)"', line)).returncode == ExitCode.OK

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("secrets", "*.onnx", "*.npz"))
    subprocess.run(["sh", str(folder / "secrets.sh")], check=True)
    write_material(folder / "fleet", dict.fromkeys(BOARDS, 100))
    made = Composed(folder)
    yield made
    made.close()


@pytest.fixture
def database(composed: Composed) -> Iterator[Postgres]:
    """What the image's entrypoint makes of its environment."""
    told = composed.body["services"]["database"]["environment"]
    secret = mounts(composed.body, "database", composed.folder)[told["POSTGRES_PASSWORD_FILE"]]
    made = Postgres(secret.read_text(), told["POSTGRES_INITDB_ARGS"].split())
    try:
        made.start()
        made.sql(f"CREATE DATABASE {told['POSTGRES_DB']} OWNER {told['POSTGRES_USER']}")
        url = composed.folder / "secrets" / "database-url"
        url.chmod(stat.S_IRUSR | stat.S_IWUSR)
        url.write_text(url.read_text().replace("@database/", f"@127.0.0.1:{made.port}/"))
        yield made
    finally:
        made.close()


def test_a_round_runs_through_what_compose_starts(composed: Composed, database: Postgres) -> None:
    site = composed
    assert database.sql("SELECT 1").stdout.strip() == "1"
    other = object.__new__(Postgres)
    other.__dict__.update(database.__dict__ | {"_password": ""})
    assert Postgres.sql(other, "SELECT 1", check=False).returncode != 0
    for _ in range(2):  # as at every `up`: the second finds the identity
        done = site.run("prepare")
        assert done.returncode == 0, done.stderr
    rules = site.folder / "volumes" / "broker" / "mosquitto.conf"
    text = rules.read_text()
    for port, own in site.ports.items():
        assert f"listener {port}\n" in text
        text = text.replace(f"listener {port}\n", f"listener {own} 127.0.0.1\n")
    rules.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    site.start("broker")
    member, join = (site.ports[p] for p in ("8883", "8884"))
    site.wait_for(lambda: listens(member) and listens(join), "the broker listens")
    assert not site.healthy()
    site.start("server")
    pulse = site.folder / "tmpfs" / "server" / "run" / "fedprune" / "pulse"
    site.wait_for(pulse.exists, "the server's loop turns")
    assert site.healthy()
    for name in BOARDS:
        claim = site.run("server", "fedprune-server", "claim", "--state", str(site.folder / "volumes" / "state"))
        assert claim.returncode == 0, claim.stderr
        (site.folder / f"{name}.claim").write_text(claim.stdout)
        site.start(
            name, sys.executable, "-m", "fedprune_device.cli.main", "run", "--device", name, "--no-probe",
            "--threads", "1",
            "--broker", f"mqtts://127.0.0.1:{member}", "--join", f"mqtts://127.0.0.1:{join}",
            "--claim", f"{name}.claim", "--data", f"fleet/{name}.npz", "--state", f"board-{name}",
            "--profile", "raspberry-pi-4b",
        )  # fmt: skip
    state = site.folder / "volumes" / "state"

    def rounds() -> list[dict[str, Any]]:
        with Storage.open_existing(state) as storage:
            return storage.rounds()

    site.wait_for(rounds, "the first round ends")
    assert set(rounds()[0]["devices"]) == set(BOARDS)
    assert {p["progress"] for p in rounds()[0]["devices"].values()} == {"folded"}
    assert not (state / "server.db").exists()  # it is in PostgreSQL
    server = site.processes.pop("server")
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == ExitCode.OK, site.logs()
    assert not pulse.exists()
