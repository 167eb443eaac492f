"""What a console costs the server's loop: `python -m benchmarks.console_publisher`.

A job with a round under way and 10,000 devices, published to `status.db` in a temporary folder. Each turn's time is the
loop's: nothing else of the server runs meanwhile on its thread.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from benchmarks.console import quantile
from benchmarks.harness import parser, save, setting
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State
from fedprune.jobs.state import Device, Progress, Task
from fedprune.planning.profile_store import find
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.monitoring.view import JobView
from fedprune_server.web.observer import EVERY_S
from fedprune_server.web.state.publisher import BUDGET_S, StatusPublisher
from fedprune_server.web.state.status import FILE, StatusWriter
from support.fakes.tiny_job import ARCHITECTURE, JOB

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


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--devices", type=int, default=10_000)
    options = command.parse_args()
    ms, size = measure(options.devices)
    rows = [
        {
            "what": what, "turns": len(v), "p50": quantile(v, 0.5), "p95": quantile(v, 0.95), "most": max(v),
            "share": quantile(v, 0.5) / 1e3 / EVERY_S,
        }
        for what, v in ms.items()
    ]  # fmt: skip
    body = {"setting": setting(), "devices": options.devices, "bytes": size, "every_s": EVERY_S, "budget_s": BUDGET_S}
    save(options.out or "console_publisher", {**body, "rows": rows})


if __name__ == "__main__":
    main()
