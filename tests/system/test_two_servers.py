"""Two servers of one identity at one broker, as processes: one serves and reports the other, no board is blamed."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.storage.storage import Storage
from support.processes.real_site import Site, write_material
from support.processes.watched_site import SERVER, Hook, Watched, doctor, shown

pytestmark = [pytest.mark.system, pytest.mark.mosquitto]

DEVICES = ("north", "south")
CONFIG = """
[job]
name = "twice"
rounds = 100000
devices = 2
density = 0.5
deadline_s = 300
"""


class TwoServers(Watched):
    """A site whose server was backed up; `second` runs on what was restored."""

    def command(self, name: str) -> list[str]:
        if name in ("server", "second", "second-again", "first-again"):
            command = super().command("server") if name == "server" else Site.command(self, "server")
            if name.startswith("second"):
                command[command.index("--state") + 1] = str(self.restored)
            return command + (["--take-over"] if name == "second" else [])
        return super().command(name)

    @property
    def restored(self) -> Path:
        return self.folder / "restored"

    def tool(self, *arguments: object, code: int | None = 0) -> str:
        """What a command of the server's prints; it must end with this code, if one is named."""
        done = subprocess.run(
            [*SERVER, *map(str, arguments)],
            capture_output=True, text=True, timeout=self.patience_s, check=False,
        )  # fmt: skip
        assert code is None or done.returncode == code, done.stdout + done.stderr + self.logs()
        return done.stdout + done.stderr

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def ends(self, name: str, code: ExitCode) -> str:
        """Wait for the end of a process; what it wrote."""
        assert self.processes.pop(name).wait(self.patience_s) == code, self.logs()
        return self.log_of(name)

    def round_of(self, state: Path) -> int:
        with Storage.existing(state) as storage:
            found = storage.load()
        return 0 if found is None else found.round

    def trains(self, state: Path) -> None:
        """Wait until a server's job is two rounds further."""
        before = self.round_of(state)
        self.wait_for(lambda: self.round_of(state) >= before + 2, f"rounds of {state.name} end")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[TwoServers]:
    write_material(tmp_path, dict.fromkeys(DEVICES, 200))
    with TwoServers(tmp_path, tmp_path, CONFIG, DEVICES, 90, mosquitto=True, secure=True) as made:
        yield made


# At every push `tests/server/messaging/test_leadership.py` has two servers in memory, `test_alerts.py` their alerts.
@pytest.mark.soak
def test_a_restored_server_takes_the_fleet_only_when_it_is_told_to(site: TwoServers) -> None:
    site.start_all()
    site.wait_for(lambda: (saved := site.saved()) is not None and saved.round >= 2, "rounds end")
    ann = site.operator()
    site.tool("backup", "--state", site.state, "--to", site.folder / "backup")
    site.tool("restore", "--from", site.folder / "backup", "--state", site.restored)

    site.start("second-again")
    refused = site.ends("second-again", ExitCode.OTHER_SERVER)
    assert "restored on" in refused
    assert f"from a backup of {socket.gethostname()}:{site.state}" in refused
    assert f"another server runs this fleet: on {socket.gethostname()}, state folder {site.state}, since 20" in refused
    assert "--take-over" in refused
    place = f"on {socket.gethostname()}, state folder {site.restored}"
    site.wait_for(lambda: f"alert: another server was started with this fleet's identity: {place}" in site.log(), "log")
    site.wait_for(
        lambda: (
            place in shown(ann).get("second-server", "") and bool(Hook.posted("opened", "second-server", "warning"))
        ),
        "console and webhook, too",
    )
    assert site.counted("second-server") == 1
    assert place in site.tool("status", "--state", site.state)
    told = doctor(site.state)[1]["second-server"]
    assert place in told["what"]
    assert f"--state {site.restored} --take-over" in told["todo"]
    site.trains(site.state)

    site.start("second")
    gone = site.ends("server", ExitCode.OTHER_SERVER)
    assert f"another server has taken this fleet over: on {socket.gethostname()}, state folder {site.restored}" in gone
    assert "alert: another server has taken this fleet over" in gone
    (last,) = Hook.posted("opened", "second-server", "critical")
    assert f"another server has taken this fleet over: {place}, since 20" in last
    assert "taking this fleet over from the server on" in site.log_of("second")
    site.trains(site.restored)

    told = site.tool("doctor", "--state", site.state, code=ExitCode.FOUND)
    assert f"another server runs this fleet: on {socket.gethostname()}, state folder {site.restored}" in told
    assert "another server" not in site.tool("doctor", "--state", site.restored, code=None)  # a small disk may be found
    site.start("first-again")
    assert "--take-over" in site.ends("first-again", ExitCode.OTHER_SERVER)

    # A server that crashed starts again on its own folder, and needs no `--take-over`.
    second = site.processes.pop("second")
    second.kill()
    second.wait()
    site.start("second-again")
    site.trains(site.restored)

    assert all(site.processes[name].poll() is None for name in DEVICES)
    assert "two boards" not in site.logs_in_full()
    assert "another board" not in site.logs_in_full()
    with IdentityFolder(site.restored, read_only=True) as identity:
        assert sorted(identity.store.members()) == sorted(DEVICES)
