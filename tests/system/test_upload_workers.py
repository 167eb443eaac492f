"""A fleet over TLS with two upload workers, one of which is killed: real processes, and the same models."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from support.processes.machine import find_mosquitto
from support.processes.real_site import Site, models, write_material

pytestmark = [pytest.mark.mosquitto, pytest.mark.system]

DEVICES = ("north", "south")

CONFIG = """
[job]
name = "received"
rounds = 3
devices = 2
strategy = "fedavg"
density = 1.0
deadline_s = 300

[job.recipe]
epochs = 1
max_steps = 3

[server]
upload_workers = {}
"""


def upload_workers(server: int) -> list[int]:
    """Process ids of a server's upload workers."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return [int(pid) for pid in children if b"upload_workers.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.soak
def test_upload_workers_end_in_the_same_models_though_one_is_killed(tmp_path: Path) -> None:
    find_mosquitto()
    found = []
    for count in (0, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_material(folder, dict.fromkeys(DEVICES, 100), hidden=4096)
        with Site(
            folder, folder, CONFIG.format(count), DEVICES, 60, mosquitto=True, secure=True, may_hold=True
        ) as site:
            site.hold(2)
            site.start_all()
            before: list[int] = []
            if count:
                server = site.processes["server"].pid
                site.wait_for(lambda server=server: len(upload_workers(server)) == 2, "there are upload workers")  # type: ignore[misc]
                site.wait_for(lambda site=site: (s := site.saved()) is not None and bool(s.history), "a round ends")  # type: ignore[misc]
                before = upload_workers(server)
                os.kill(before[0], signal.SIGKILL)
                site.wait_for(
                    lambda site=site: "an upload worker is started again" in site.logs_in_full(), "it is missed"
                )  # type: ignore[misc]
            site.let_go(2)
            found.append(models(site.complete()))
        assert not any(Path(f"/proc/{pid}").exists() for pid in before)
        log = (folder / "server.log").read_text()
        assert ("an upload worker is started again" in log) == bool(count)
        assert ("upload workers took in 6 updates" in log) == bool(count), log
    assert found[0] == found[1]
