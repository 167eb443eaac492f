"""A real `fedprune-device` process on a real broker, and the tests' server at its other end."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprune.wire.link import BrokerLink
from fedprune_device.client import Board
from fedprune_server.messaging.broker.embedded import EmbeddedBroker
from support.fakes.agent_fleet import TOPICS, MemoryServer
from support.processes.real_site import HOLDING_PROGRAM
from support.waiting import until


class Wires:
    """Connects the server of the tests to a broker."""

    def __init__(self, link: BrokerLink, server: MemoryServer) -> None:
        self._link, self._server = link, server
        server.link = self
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def deliver(self, topic: str, payload: bytes) -> None:
        self._link.publish(topic, payload)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._link.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            item = self._link.get(0.05)
            if isinstance(item, tuple):
                self._server.receive(*item)
            self._server.tick()


class Field:
    def __init__(self, root: Path, url: str, server: MemoryServer) -> None:
        self.root, self.url, self.server = root, url, server
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def board(self) -> Board:
        """The local interface of a process with `local` data."""
        return Board(f"unix:{self.root / 'state' / 'local.sock'}")

    def start(
        self, *python: str, local: bool = False, options: Sequence[str] = (), holds: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a board; in rounds that `holds` has a file of it waits in the middle of its training, see `HELD`."""
        command = [
            sys.executable,
            *python,
            *(["-m"] if holds is None else ["-c", HOLDING_PROGRAM, str(holds)]),
            "fedprune_device.cli.main",
            "run",
            "--no-probe",
            "--until-finished",
            "--insecure",
        ]
        command += ["--broker", self.url, "--site", "site", "--device", "d", "--threads", "1"]
        data = ["--data", "local", "--local"] if local else ["--data", str(self.root / "data.npz")]
        return self.run(*command, *data, "--state", str(self.root / "state"), *options)

    def run(self, *command: str) -> subprocess.Popen[str]:
        with (self.root / "log").open("a") as log:
            process = subprocess.Popen(command, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.processes.append(process)
        return process

    def wait(self, condition: Callable[[], object], what: str) -> None:
        until(condition, what, explain=lambda: (self.root / "log").read_text()[-3000:])

    def wait_for(self, kind: type, **fields: Any) -> None:
        def seen() -> bool:
            return any(all(getattr(m, k) == v for k, v in fields.items()) for m in self.server.of(kind))

        self.wait(seen, kind.__name__)


@contextmanager
def running(root: Path, server: MemoryServer) -> Iterator[Field]:
    """A broker with the server on it; processes that are still there at the end are killed.

    The folder has `data.npz`, and gets the log and the device's state.
    """
    with EmbeddedBroker(port=0) as broker:
        link = BrokerLink(broker.url, "server")
        link.subscribe(TOPICS.server_subscriptions())
        link.start()
        wires = Wires(link, server)
        field = Field(root, broker.url, server)
        try:
            yield field
        finally:
            for process in field.processes:
                process.kill()
                process.wait()
            wires.close()


def loaded_packages(field: Field) -> set[str]:
    """Top-level packages that a process imported which was started with `-X importtime`."""
    lines = (field.root / "log").read_text().splitlines()
    return {x.rsplit("|", 1)[1].strip().split(".")[0] for x in lines if x.startswith("import time:")}
