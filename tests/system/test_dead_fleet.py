"""A fleet that dies is told by log, metrics, console, webhook and doctor, before the round's deadline has passed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from console_operator import ANN, Operator
from real_site import Site, write_material

from fedprune.errors import ExitCode
from fedprune_server.cli import main
from machine import free_port, listens

pytestmark = pytest.mark.system

DEADLINE_S = 14.0
CONFIG = f"""
[job]
name = "leaves"
rounds = 100000
devices = 2
density = 0.5
deadline_s = {DEADLINE_S}

[alerts]
webhook = "http://127.0.0.1:HOOK/"
"""


class Hook(BaseHTTPRequestHandler):
    """Takes what a webhook posts."""

    got: ClassVar[list[tuple[str, str]]] = []

    def do_POST(self) -> None:
        """Keep the event and the kind of its first alert."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.got += [(body["event"], alert["kind"]) for alert in body["alerts"]]
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Say nothing."""


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


def doctor(site: Site) -> tuple[int, list[dict[str, Any]]]:
    """The doctor's exit code and its findings of weight *wrong*."""
    words = ["doctor", "--state", str(site.state), "--json", "--timeout", "2"]
    run = subprocess.run([sys.executable, "-m", "fedprune_server.cli", *words], capture_output=True, check=False)
    found = [f for f in json.loads(run.stdout)["findings"] if f["weight"] == "wrong" and f["kind"] != "disk"]
    return run.returncode, found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Watched]:
    write_material(tmp_path, {"north": 60, "south": 60})
    Hook.got.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as hook:
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        config = CONFIG.replace("HOOK", str(hook.server_address[1]))
        with Watched(tmp_path, tmp_path, config, ("north", "south"), 90) as made:
            made.metrics, made.console = free_port(), free_port()
            yield made
        hook.shutdown()


def test_a_dead_fleet_is_told_everywhere_within_a_deadline(site: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANN}\n"))
    site.start_all()
    site.wait_for(lambda: listens(site.metrics) and (s := site.saved()) is not None and s.round > 2, "rounds go by")
    assert site.counted("no-devices") == site.counted("no-progress") == 0
    assert "alert:" not in site.log().replace("alert: the disk", "")
    assert main(["operators", "add", "ann", "--role", "viewer", "--state", str(site.state)]) == ExitCode.OK
    ann = Operator(site.console)
    site.wait_for(ann.ready, "the console is ready")
    ann.login(ANN)

    def shown() -> set[str]:
        return {a["alert"] for a in json.loads(ann.ask("/api/v1/alerts?gone=no"))["items"]} - {"disk"}

    assert shown() == set()

    for name in site.devices:
        site.stop(name)
    site.wait_for(lambda: "alert: no board" in site.log(), "the log tells of it")
    assert site.counted("no-devices") == 1
    site.wait_for(
        lambda: shown() == {"no-devices"} and ("opened", "no-devices") in Hook.got, "console and webhook, too"
    )
    assert "no board that can take part" in ann.ask("/")
    site.wait_for(lambda: site.counted("no-progress") == 1, "a deadline passes")
    assert site.log().index("alert: no board") < site.log().index("makes no progress"), (
        "told before the deadline passed"
    )
    code, findings = doctor(site)
    assert (code, {f["kind"] for f in findings}) == (6, {"no-devices", "no-progress"})
    assert all(f["todo"] for f in findings)

    for name in site.devices:
        site.start(name)
    site.wait_for(lambda: site.counted("no-devices") + site.counted("no-progress") == 0, "the alerts close")
    site.wait_for(lambda: not shown() and ("resolved", "no-devices") in Hook.got, "console and webhook tell the end")
    assert Hook.got.count(("opened", "no-devices")) == Hook.got.count(("resolved", "no-devices")) == 1
    assert site.log().count("alert: no board") == site.log().count("the alert is over: no board") == 1

    site.stop("server")
    code, findings = doctor(site)
    assert (code, [f["kind"] for f in findings]) == (6, ["server-not-running"])


def test_a_broker_that_dies_is_told_and_so_is_its_return(tmp_path: Path) -> None:
    write_material(tmp_path, {"north": 60})
    config = CONFIG[: CONFIG.index("[alerts]")].replace("devices = 2", "devices = 1")
    with Site(tmp_path, tmp_path, config, ("north",), 90, mosquitto=True) as site:

        def logged(text: str) -> bool:
            return text in (site.folder / "server.log").read_text()

        site.start_all()
        site.wait_for(lambda: (s := site.saved()) is not None and s.round > 1, "a round goes by")
        site.processes["broker"].kill()
        site.processes["broker"].wait()
        site.wait_for(lambda: logged("alert: there is no connection to the broker. To do: see"), "the log tells of it")
        assert doctor(site)[1][0]["kind"] == "broker"
        site.start("broker")
        site.wait_for(lambda: logged("the alert is over: there is no connection to the broker"), "it is over")
