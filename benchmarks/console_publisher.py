"""What a console costs the server's loop: `python benchmarks/console_publisher.py [--devices 10000] [--write]`.

A job with a round under way and 10,000 devices, published to `status.db` in a temporary folder. Each turn's time is the
loop's: nothing else of the server runs meanwhile on its thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "benchmarks"))

from console import processor, quantile  # noqa: E402

from fedprune.blobs.blob_store import BlobStore  # noqa: E402
from fedprune.coordination import Phase, State  # noqa: E402
from fedprune.jobs.state import Device, Progress, Task  # noqa: E402
from fedprune.planning.profile_store import find  # noqa: E402
from fedprune_server.devices.quarantine import Quarantine  # noqa: E402
from fedprune_server.devices.registry import DeviceRegistry  # noqa: E402
from fedprune_server.monitoring.view import JobView  # noqa: E402
from fedprune_server.web.observer import EVERY_S  # noqa: E402
from fedprune_server.web.state.publisher import BUDGET_S, StatusPublisher  # noqa: E402
from fedprune_server.web.state.status import FILE, StatusWriter  # noqa: E402
from support.fakes.tiny_job import ARCHITECTURE, JOB  # noqa: E402 - next to the tests

SITE = {
    "version": "1", "site": "default", "started_at": 5.0, "broker": "mqtt://h", "database": "sqlite", "blobs": "folder",
    "insecure": True,
}  # fmt: skip
TURNS = 60


class Bench:
    """A publisher over a fleet, and its turns' lengths."""

    def __init__(self, devices: int, folder: Path) -> None:
        chance, self._ahead = random.Random(0), 0.0
        profile = find("raspberry-pi-5").to_dict()
        sizes = ARCHITECTURE.sizes
        state = State("a" * 64, round=3, phase=Phase.TRAINING)
        self.names = [f"board-{i:05d}" for i in range(devices)]
        registry = DeviceRegistry(JOB, ARCHITECTURE, state, {}, devices)
        for name in self.names:
            widths = tuple(max(1, round(n * chance.uniform(0.2, 1.0))) for n in sizes)
            state.devices[name] = Device(1, True, profile, {"temperature_c": 55.5}, 600, widths=widths, density=0.5)
            state.tasks[name] = Task(1, widths, 0.5, Progress.OFFERED, samples=600)
            software = "fedprune 0.1.0, onnxruntime 1.23.2, Python 3.11.7, slot a with release 12"
            registry.admit(name, software, 500)
        registry.moved.clear()
        self.state, self.registry = state, registry
        nothing = SimpleNamespace(connected=True, waiting=0, queued=0, progress=lambda name: None, devices=list)
        view = JobView(
            JOB,
            ARCHITECTURE,
            state,
            registry,
            Quarantine(self.clock),
            link=nothing,
            executor=nothing,
            uploads=nothing,
            outbox=nothing,
            weight=1.0,
            store=BlobStore(folder),
            clock=time.time,
        )
        self.file = folder / FILE
        first = SimpleNamespace(view=view)
        server = SimpleNamespace(first=first, runners={JOB.name: first}, holder=self._holder, present=self._present)
        self.publisher = StatusPublisher(server, SITE, StatusWriter(self.file), monotonic=self.clock)

    def _holder(self, name: str) -> str | None:
        return JOB.name if self._present(name) else None

    def _present(self, name: str) -> bool:
        return name in self.state.devices and self.state.devices[name].online

    def clock(self) -> float:
        return time.perf_counter() + self._ahead

    def turn(self) -> float:
        """Milliseconds that the next turn takes of which something is told."""
        self._ahead += EVERY_S
        begun = time.perf_counter()
        self.publisher.publish()
        return 1e3 * (time.perf_counter() - begun)

    def until_told(self) -> list[float]:
        """Turns until all that has changed was told."""
        found = [self.turn()]
        while self.publisher._pending:
            found.append(self.turn())
        return found

    def each(self, change: Callable[[int], None], turns: int = TURNS) -> list[float]:
        found = []
        for i in range(turns):
            change(i)
            found.append(self.turn())
        return found

    def move(self, names: list[str], i: int) -> None:
        for name in names:
            self.state.tasks[name].progress = (Progress.PULLING, Progress.STORED, Progress.FOLDED)[i % 3]
            self.registry.received(name, 1000)
        self.publisher.changed(names)
        self.registry.moved.clear()


def measure(devices: int) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of each turn, by what has changed, and bytes of the whole fleet's rows."""
    chance, found = random.Random(1), {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(devices, Path(folder))
        found["the server starts"] = bench.until_told()
        size = sum(f.stat().st_size for f in Path(folder).glob(f"{FILE}*"))
        found["nothing has changed"] = bench.each(lambda i: None)
        found["50 devices have changed"] = bench.each(lambda i: bench.move(chance.sample(bench.names, 50), i))
        bench.move(bench.names, 1)
        found["every device has changed"] = bench.until_told()

        found["an operator opens a device"] = bench.each(lambda i: bench.publisher.add_details(bench.names[7]))
        found["an operator opens the coverage"] = bench.each(lambda i: bench.publisher.add_coverage(JOB.name))
    return found, size


def report(found: dict[str, list[float]], size: int, devices: int, load: float) -> str:
    """The results as a page."""
    rows = [
        f"| {what} | {len(v)} | {quantile(v, 0.5):.1f} | {quantile(v, 0.95):.1f} | {max(v):.1f} | "
        f"{quantile(v, 0.5) / EVERY_S / 10:.1f} % |"
        for what, v in found.items()
    ]
    return "\n".join(
        [
            "# What a console costs the server's loop",
            "",
            f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores (load {load:.1f} at the start).",
            "`python benchmarks/console_publisher.py --write`",
            "",
            f"{devices:,} devices of one job, a round under way. The publisher works every {EVERY_S:g} s at most and",
            f"stops collecting devices after {1e3 * BUDGET_S:g} ms; what is left waits for the next turn.",
            "Milliseconds of a turn in which it does something, on the loop's thread; in all others it costs one",
            f"comparison. The share is that of the thread's time. The file has {size / 1e6:.1f} MB after that.",
            "",
            "| | turns | p50 | p95 | most | share |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/console_publisher.*")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    found, size = measure(args.devices)
    text = report(found, size, args.devices, load)
    if args.write:
        folder = ROOT / "benchmarks" / "results"
        (folder / "console_publisher.md").write_text(text)
        body = {"devices": args.devices, "bytes": size, "ms": {k: [round(x, 2) for x in v] for k, v in found.items()}}
        (folder / "console_publisher.json").write_text(json.dumps(body) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
