"""Counts false alerts about a healthy fleet on a busy machine: `python -m benchmarks.absence [--minutes 20]`.

A real server with two jobs, Mosquitto, cheap boards of `benchmarks.swarm` in one process, and some boards that are
`fedprune-device` processes. The first job is paused after a third of the time and resumed, and the server is started
anew after two thirds. Nothing is broken, so every alert is false, and so is every board's word about its broker.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.fleet_mixture import SHARES
from benchmarks.swarm.job import seconds_per_sample, write_job
from benchmarks.swarm.run import ROOT
from benchmarks.swarm.site import Site, site
from support.processes.machine import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

_JOB = """\
[job]
name = "{name}"
rounds = 100000
devices = {devices}
density = 1.0
scorer = "ordered"
deadline_s = 120

[model]
path = "model.onnx"
"""
_SERVER = """\
console = "127.0.0.1:{console}"

[alerts]
webhook = "{webhook}"
severity = "info"
"""
_BUSY_PROGRAM = "import sys, time\nend = time.time() + float(sys.argv[1])\nwhile time.time() < end: pass"
_PAUSE_S = 35.0
# What a board must not say of a broker and an identity that are well.
_BOARD_COMPLAINT = re.compile(r"revoked|new-key|the broker drops|has not answered")


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A receiver of notifications: its address, and what was posted."""
    posts: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", posts
        server.shutdown()


def start_boards(place: Site, boards: int, real: int, seconds: float) -> None:
    """Start the boards, `real` of which are processes of their own."""
    for index in range(real):
        name = f"real-{index}"
        options = ["--insecure", "--no-probe", "--threads", "1", "--profile", "raspberry-pi-5", "--site", "swarm"]
        options += ["--device", name, "--state", name, "--data", "evaluation.npz"]
        command = [sys.executable, "-m", "fedprune_device.cli.main", "run", "--broker"]
        place.start(name, [*command, f"mqtt://127.0.0.1:{place.port}", *options])
    spec = {
        "host": "127.0.0.1", "port": place.port, "site": "swarm", "seed": 0, "arrivals": 10.0,
        "seconds": seconds_per_sample(list(SHARES)), "scale": 20.0, "limit_s": seconds, "puts": False,
        "offered": str(place.folder / "offered"), "server_key": None, "indices": (0, boards - real),
    }  # fmt: skip
    path, result = place.folder / "boards.json", place.folder / "result.json"
    path.write_text(json.dumps(spec))
    place.start("boards", [sys.executable, "-m", "benchmarks.swarm.fleet", path, result], cwd=ROOT)


def order(place: Site, verb: str, job: str) -> None:
    """Pause or resume a job by its command."""
    command = [sys.executable, "-m", "fedprune_server.cli.main", verb, "--job", job, "--state", "state"]
    subprocess.run(command, check=True, cwd=place.folder)


def measure(folder: Path, minutes: float, boards: int, real: int, load: int) -> dict[str, Any]:
    """Run the fleet in an empty folder; returns alerts by kind, boards' complaints, and rounds by job."""
    seconds = minutes * 60.0
    with ExitStack() as stack:
        url, posts = stack.enter_context(webhook())
        place = stack.enter_context(site(folder))
        broker = f"mqtt://127.0.0.1:{place.port}"
        config = write_job(
            folder, boards // 3, 100_000, broker, "swarm", 4, _SERVER.format(webhook=url, console=free_port())
        )
        config.write_text(config.read_text().replace("deadline_s = 3600", "deadline_s = 120").replace(
            f"max_devices = {boards // 3}", f"max_devices = {boards}"))  # fmt: skip
        (folder / "second.toml").write_text(_JOB.format(name="second", devices=boards // 4))
        for index in range(load):
            place.start(f"load-{index}", [sys.executable, "-c", _BUSY_PROGRAM, str(seconds)])
        place.broker()
        options = "--job", str(folder / "second.toml")
        place.server(config, *options)
        began = time.monotonic()
        start_boards(place, boards, real, seconds)

        def wait_until(share: float, extra_s: float = 0.0) -> None:
            time.sleep(max(0.0, began + share * seconds + extra_s - time.monotonic()))

        wait_until(1 / 3)
        order(place, "pause", "swarm")
        wait_until(1 / 3, _PAUSE_S)
        order(place, "resume", "swarm")
        wait_until(2 / 3)
        place.stop("server")
        place.server(config, *options)
        wait_until(1.0)
        place.stop("server")
        log = place.log_text("server")
        names = [f"real-{index}" for index in range(real)]
        lines = [line for name in names for line in place.log_text(name).splitlines()]
    alerts = [alert for post in posts if post["event"] == "opened" for alert in post["alerts"]]
    return {
        "minutes": minutes, "boards": boards, "load": load,
        "alerts_by_kind": Counter(f"{alert['kind']} ({alert['severity']})" for alert in alerts),
        "alerts": [alert["what"] for alert in alerts],
        "logged_alerts": log.count("alert: "),
        "rounds": Counter(re.findall(r"\b(swarm|second): round \d+ of", log)),
        "boards_complaints": [line for line in lines if _BOARD_COMPLAINT.search(line)],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.absence", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N", help="how long (default: 2)")
    parser.add_argument("--boards", type=int, default=43, metavar="N", help="boards (default: 43)")
    parser.add_argument("--real", type=int, default=3, metavar="N", help="of them real processes (default: 3)")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="busy processes beside them (default: none)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder for the logs (default: none)")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        sizes = options.minutes, options.boards, options.real, options.load
        row = measure(options.keep or Path(folder), *sizes)
    print(json.dumps(row, indent=1))
    return int(bool(row["alerts_by_kind"] or row["boards_complaints"]))


if __name__ == "__main__":
    sys.exit(main())
