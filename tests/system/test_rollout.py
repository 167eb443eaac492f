"""A real server updates real boards by a real broker: their launchers, slots and processes are those of the field."""

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedprune.releases.release import Release, write_release
from fedprune.security.keys import SigningKey
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.releases.installer import LAUNCHER_FILE
from fedprune_device.releases.wheel import Wheel, contents_digest
from fedprune_server.cli.main import main
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.storage.storage import Storage
from support.fakes.runtime_releases import OUTSIDE, PYTHON, make_wheel, set_up
from support.faults.relay import Relay
from support.processes.real_site import Site, job_config, write_material

pytestmark = [pytest.mark.system, pytest.mark.mosquitto]

BOARDS = ("north", "south")
CONFIG = job_config("waits", rounds=1, devices=3, deadline_s=600)
FOREVER = 'while :; do "$@"; sleep 0.2; done'
"""What the service manager does."""

CRASH = "raise RuntimeError('this release is broken')\n"
NO_RUNTIME = "raise ImportError('this wheel is for another processor')\n"


class UpdatedSite(Site):
    """A site whose boards run what is in their slots.

    Args:
        material: What `write_material` wrote.
        folder: The processes' own.
        wheel: fedprune.
        config: The server's configuration.

    Attributes:
        line: What lies between north and the broker.
    """

    line: Relay

    def __init__(self, material: Path, folder: Path, wheel: Path, config: str = CONFIG) -> None:
        super().__init__(material, folder, config, BOARDS, 120, mosquitto=True, secure=True)
        self.wheel = wheel
        with IdentityFolder(self.state) as identity:
            self.key: SigningKey = identity.key
        first = self.release(1)
        for name in BOARDS:
            set_up(folder / f"{name}-home", first, self.key.verifying_key)

    def release(self, number: int, *more: Path, entry: str = "fedprune_start:device") -> Path:
        def made(files: tuple[Any, ...]) -> Release:
            system = tuple(set(OUTSIDE) - {wheel.name.partition("-")[0] for wheel in more})
            about = PYTHON, platform.machine(), entry, 2 * 10**8
            return Release(number, f"0.{number}", *about, files, contents, system=system)

        wheels = [self.wheel, *more]
        contents = contents_digest(Wheel(path, path.name) for path in wheels)
        write_release(self.folder / f"release-{number}", made, wheels, self.key)
        return self.folder / f"release-{number}"

    def start(self, name: str, *, in_group: bool = False) -> None:
        if name not in BOARDS:
            super().start(name, in_group=in_group)
            return
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "FEDPRUNE"))}
        home, module = self.folder / f"{name}-home", self.command(name).index("fedprune_device.cli.main")
        arguments = [a for a in self.command(name)[module + 1 :] if a != "--until-finished"]
        command = ["sh", "-c", FOREVER, "sh", sys.executable, str(home / LAUNCHER_FILE), *arguments]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=inherited | {"OMP_NUM_THREADS": "1"}, start_new_session=True
            )

    def stop_all(self) -> None:
        for name in BOARDS:
            if name in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(self.processes[name].pid, signal.SIGKILL)
        super().stop_all()

    def members(self) -> set[str]:
        with IdentityFolder(self.state) as identity:
            return set(identity.store.members())

    def runs(self, name: str) -> int:
        """The release in a board's stable slot, every file of which is what its record says."""
        home = SlotStore(self.folder / f"{name}-home")
        state = home.load()
        assert state is not None
        return home.checked_record(state.stable).version

    def command_line(self, *words: object) -> None:
        assert main([*map(str, words), "--state", str(self.state)]) == 0

    def rollout(self, release: Path, *words: object) -> dict[str, Any]:
        """Roll a release out; what became of it."""
        self.command_line("rollout", "start", release, *words)
        self.wait_for(lambda: self.status()["phase"] != "running", "the rollout ends")
        return self.status()

    def bytes_down(self) -> dict[str, int]:
        """What each board has been sent, as the server has saved it."""
        with Storage.open_existing(self.state) as storage:
            return {r["name"]: r["bytes_down"] for r in storage.devices()}

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "fedprune_server.cli.main", "rollout", "status", "--json", "--state"]
        done = subprocess.run([*command, str(self.state)], capture_output=True, text=True, check=True)
        body: dict[str, Any] = json.loads(done.stdout)
        return body


@pytest.fixture(scope="module", params=[CONFIG], ids=["waits"])
def site(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[UpdatedSite]:
    """One for all tests of a configuration: to install its boards takes as long as a rollout."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "material").mkdir()
    write_material(folder / "material", dict.fromkeys(BOARDS, 100))
    made = UpdatedSite(folder / "material", folder, wheel, request.param)
    made.line = Relay(made.port)
    made.board_ports = {"north": made.line.port}
    try:
        made.start_all()
        made.wait_for(lambda: made.members() == set(BOARDS), "all boards are let in")
        yield made
    finally:
        made.stop_all()
        made.line.close()


# At every push `test_update.py` updates a board's real runtime, and `tests/server/ota` rolls out to groups in memory.
@pytest.mark.soak
def test_good_releases_stay_bad_ones_go_back_and_stop_and_old_content_comes_again(site: UpdatedSite) -> None:
    good = site.rollout(site.release(2), "--groups", "1,100%")
    assert (good["phase"], good["committed"]) == ("done", sorted(BOARDS)), site.logs()
    assert {site.runs(n) for n in BOARDS} == {2}

    crash = make_wheel(site.folder / "crash-1-py3-none-any.whl", {"crash/__init__.py": CRASH})
    bad = site.rollout(site.release(3, crash, entry="crash:main"), "--groups", "1,100%", "--attempts", "2")
    failed = {n: b["reason"] for n, b in bad["boards"].items() if b["fate"] == "failed"}
    assert bad["phase"] == "stopped", site.logs()
    assert list(failed.values()) == [
        "rolled back: ended with exit code 1 before it was healthy: RuntimeError: this release is broken"
    ]
    assert "1 of 1 board failed" in bad["why"]

    stub = make_wheel(site.folder / "onnxruntime-9-py3-none-any.whl", {"onnxruntime/__init__.py": NO_RUNTIME})
    unhealthy = site.rollout(site.release(4, stub), "--groups", "1,100%", "--seed", "1")
    failed = {n: b["reason"] for n, b in unhealthy["boards"].items() if b["fate"] == "failed"}
    assert unhealthy["phase"] == "stopped", site.logs()
    assert len(failed) == 1
    assert "this wheel is for another processor" in next(iter(failed.values()))
    assert {site.runs(n) for n in BOARDS} == {2}

    old = site.folder / "release-1"
    site.command_line("release", "--again", old, "--number", 5, "--out", site.folder / "release-5")
    back = site.rollout(site.folder / "release-5", "--groups", "100%")
    assert (back["phase"], {site.runs(n) for n in BOARDS}) == ("done", {5}), site.logs()
    assert all(p.poll() is None for p in site.processes.values()), "nobody had to be started again"
