"""Two servers of one identity at one broker, as processes: the second is refused, and no board is blamed."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.storage.storage import Storage
from support.processes.real_site import Site, job_config, write_material
from support.processes.watched_site import SERVER, Watched

pytestmark = [pytest.mark.system, pytest.mark.mosquitto]

DEVICES = ("north", "south")
CONFIG = job_config("twice", rounds=100000)


class TwoServers(Watched):
    """A site whose server was backed up; `second` runs on what was restored."""

    def command(self, name: str) -> list[str]:
        if name in ("server", "second", "second-again", "first-again"):
            command = super().command("server") if name == "server" else Site.command(self, "server")
            if name.startswith("second"):
                command[command.index("--state") + 1] = str(self.restored)
            return command
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

    def ends(self, name: str, code: ExitCode) -> str:
        """Wait for the end of a process; what it wrote."""
        assert self.processes.pop(name).wait(self.patience_s) == code, self.logs()
        return (self.folder / f"{name}.log").read_text()

    def round_of(self, state: Path) -> int:
        with Storage.open_existing(state) as storage:
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


# At every push `tests/server/messaging/test_second_server.py` has two servers in memory.
@pytest.mark.soak
def test_a_restored_server_takes_the_fleet_only_once_the_first_has_ended(site: TwoServers) -> None:
    site.start_all()
    site.wait_for(lambda: (saved := site.saved_state()) is not None and saved.round >= 2, "rounds end")
    site.tool("backup", "--state", site.state, "--to", site.folder / "backup")
    site.tool("restore", "--from", site.folder / "backup", "--state", site.restored)

    site.start("second-again")
    refused = site.ends("second-again", ExitCode.OTHER_SERVER)
    assert "restored on" in refused
    assert f"from a backup of {socket.gethostname()}:{site.state}" in refused
    assert f"another server runs this fleet: on {socket.gethostname()}, state folder {site.state}, since 20" in refused
    site.trains(site.state)
    assert "another server" not in site.tool("doctor", "--state", site.state, code=None)

    first = site.processes.pop("server")
    first.terminate()
    assert first.wait(site.patience_s) == ExitCode.OK, site.logs()
    site.start("second")
    site.trains(site.restored)

    told = site.tool("doctor", "--state", site.state, code=ExitCode.FINDINGS)
    assert f"another server runs this fleet: on {socket.gethostname()}, state folder {site.restored}" in told
    assert "another server" not in site.tool("doctor", "--state", site.restored, code=None)  # a small disk may be found
    site.start("first-again")
    assert "another server runs this fleet" in site.ends("first-again", ExitCode.OTHER_SERVER)

    # A server that crashed starts again on its own folder.
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
