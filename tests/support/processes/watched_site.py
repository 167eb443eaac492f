"""A site of real processes with metrics, a console and a webhook, and what each of them reports of alerts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from support.processes.console_operator import ANN, Operator
from support.processes.machine import free_port
from support.processes.real_site import Site

SERVER = [sys.executable, "-m", "fedprune_server.cli.main"]


class Hook(BaseHTTPRequestHandler):
    """Takes what a webhook posts."""

    got: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        """Keep each alert with its event."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.got += [(body["event"], alert) for alert in body["alerts"]]
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Log nothing."""

    @classmethod
    def posted_alerts(cls, event: str, kind: str, severity: str = "") -> list[str]:
        """Texts of a kind's alerts that arrived with an event."""
        return [a["what"] for e, a in cls.got if (e, a["kind"]) == (event, kind) and severity in ("", a["severity"])]


class Watched(Site):
    """A site whose server has metrics, a console and a webhook."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.metrics, self.console = free_port(), free_port()

    def __enter__(self) -> Watched:
        Hook.got.clear()
        self._hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        threading.Thread(target=self._hook.serve_forever, daemon=True).start()
        with (self.folder / "fleet.toml").open("a") as config:
            config.write(f'\n[alerts]\nwebhook = "http://127.0.0.1:{self._hook.server_address[1]}/"\n')
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._hook.shutdown()
        self._hook.server_close()

    def command(self, name: str) -> list[str]:
        extra_options = ["--metrics", str(self.metrics), "--console", str(self.console)] if name == "server" else []
        return [*super().command(name), *extra_options]

    def stop(self, name: str) -> None:
        """Stop a process for good."""
        self.processes[name].kill()
        self.processes[name].wait()

    def operator(self) -> Operator:
        """An operator who has logged in at the console."""
        words = ["operators", "add", "ann", "--role", "viewer", "--state", str(self.state)]
        subprocess.run([*SERVER, *words], input=f"{ANN}\n".encode(), capture_output=True, check=True)
        ann = Operator(self.console)
        self.wait_for(ann.ready, "the console is ready")
        ann.login(ANN)
        return ann

    def log(self) -> str:
        """What the server has logged."""
        return (self.folder / "server.log").read_text()

    def count_open_alerts(self, kind: str) -> int:
        """Open alerts of a kind, by the metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return int(sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(f'fedprune_alerts{{kind="{kind}"')))


def console_alerts(operator: Operator) -> dict[str, str]:
    """Open alerts that the console shows, by kind."""
    return {a["alert"]: a["text"] for a in json.loads(operator.ask("/api/v1/alerts?gone=no"))["items"]}


def doctor(state: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The doctor's exit code and its findings of weight *wrong*, by kind."""
    words = ["doctor", "--state", str(state), "--json", "--timeout", "2"]
    run = subprocess.run([*SERVER, *words], capture_output=True, check=False)
    return run.returncode, {f["kind"]: f for f in json.loads(run.stdout)["findings"] if f["weight"] == "wrong"}
