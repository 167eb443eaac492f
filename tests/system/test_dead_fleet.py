"""A fleet that dies is told by the server's log, its metrics, its console and the doctor, within one deadline."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_site import Site, write_material

from machine import free_port, listens

pytestmark = pytest.mark.system

DEADLINE_S = 12.0
CONFIG = f"""
[job]
name = "leaves"
rounds = 100000
devices = 2
density = 0.5
deadline_s = {DEADLINE_S}
"""


class Watched(Site):
    """A server with metrics and a console."""

    metrics = 0
    console = 0

    def command(self, name: str) -> list[str]:
        more = ["--metrics", str(self.metrics), "--console", str(self.console)] if name == "server" else []
        return [*super().command(name), *more]

    def stop(self, name: str) -> None:
        """Stop a process for good."""
        self.processes[name].kill()
        self.processes[name].wait()

    def log(self) -> str:
        """What the server has logged."""
        return (self.folder / "server.log").read_text()

    def counted(self, kind: str) -> int:
        """Open alerts of a kind, by the metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return int(sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(f'fedprune_alerts{{kind="{kind}"')))

    def doctor(self) -> tuple[int, list[dict[str, Any]]]:
        """The doctor's exit code and its findings of weight *wrong*."""
        words = ["doctor", "--state", str(self.state), "--json", "--timeout", "2"]
        run = subprocess.run([sys.executable, "-m", "fedprune_server.cli", *words], capture_output=True, check=False)
        found = [f for f in json.loads(run.stdout)["findings"] if f["weight"] == "wrong" and f["kind"] != "disk"]
        return run.returncode, found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Watched]:
    write_material(tmp_path, {"north": 60, "south": 60})
    with Watched(tmp_path, tmp_path, CONFIG, ("north", "south"), 90) as made:
        made.metrics, made.console = free_port(), free_port()
        yield made


def test_a_dead_fleet_is_told_everywhere_within_a_deadline(site: Watched) -> None:
    site.start_all()
    site.wait_for(lambda: listens(site.metrics) and (s := site.saved()) is not None and s.round > 2, "rounds go by")
    assert site.counted("no-devices") == site.counted("no-progress") == 0
    assert "alert:" not in site.log()

    for name in site.devices:
        site.stop(name)
    site.wait_for(lambda: "alert: no board" in site.log(), "the log tells of it")
    assert site.counted("no-devices") == 1
    site.wait_for(lambda: site.counted("no-progress") == 1, "a deadline passes")
    assert site.log().index("alert: no board") < site.log().index("makes no progress"), (
        "told before the deadline passed"
    )
    code, findings = site.doctor()
    assert (code, {f["kind"] for f in findings}) == (6, {"no-devices", "no-progress"})
    assert all(f["todo"] for f in findings)

    for name in site.devices:
        site.start(name)
    site.wait_for(lambda: site.counted("no-devices") + site.counted("no-progress") == 0, "the alerts close")
    assert site.log().count("alert: no board") == site.log().count("the alert is over: no board") == 1

    site.stop("server")
    code, findings = site.doctor()
    assert (code, [f["kind"] for f in findings]) == (6, ["server-not-running"])
