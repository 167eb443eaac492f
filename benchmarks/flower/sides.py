"""The two systems, each behind the same few questions: start a server, start a client, what rounds are over."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.flower.material import Job, write_fleet
from benchmarks.harness import ROOT
from benchmarks.swarm.site import Site, find_mosquitto, free_port
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import FedpruneError, StorageError
from fedprune_server.storage.storage import Storage

_START_S = 120.0
_POLL_S = 0.1

Model = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Round:
    """A round that is over.

    Attributes:
        number: From 1; 0 where it is when the job began.
        at: When it was over, seconds since 1970.
        accuracy: Of the global model on the server's samples.
        counted: Updates that are in it.
    """

    number: int
    at: float
    accuracy: float
    counted: int = 0


class Side(Protocol):
    """One of the two."""

    title: str
    servers: tuple[str, ...]
    """Processes whose memory is the server's."""

    @property
    def port(self) -> int:
        """Where clients' connections end."""

    def start_server(self) -> None:
        """Start all that isn't a client."""

    def start_client(self, name: str, port: int, *, watch: bool = False) -> None:
        """Start a client that connects to a port."""

    def ready(self, name: str) -> bool:
        """Whether a client is connected."""

    def submit(self) -> None:
        """Begin the job, once all clients are there."""

    def rounds(self) -> list[Round]:
        """Rounds that are over, the beginning as round 0."""

    def model(self) -> Model:
        """The global model of the last round that is over."""


class Fedprune:
    """fedprune-server, fedprune-device and Mosquitto."""

    title = "fedprune"
    servers: tuple[str, ...] = ("server", "broker")

    def __init__(self, place: Site, job: Job) -> None:
        self._place, self._job, self._binary = place, job, find_mosquitto()
        self._config = write_fleet(place.folder, job, place.port)

    @property
    def port(self) -> int:
        """The broker's."""
        return self._place.port

    def start_server(self) -> None:
        """Broker and server."""
        self._place.broker(self._binary)
        self._place.server(self._config)

    def start_client(self, name: str, port: int, *, watch: bool = False) -> None:
        """A device."""
        run = [sys.executable, "-m", "fedprune_device.cli.main", "run", "--insecure", "--patient", "--no-probe"]
        run += ["--threads", "1", "--profile", "raspberry-pi-4b", "--log-level", "info"]
        run += ["--broker", f"mqtt://127.0.0.1:{port}", "--device", name]
        folder = self._place.folder
        self._place.start(name, [*run, "--data", folder / f"{name}.npz", "--state", folder / name], watch=watch)

    def ready(self, name: str) -> bool:
        """Whether it says that it is connected."""
        return "connected" in self._place.said(name)

    def submit(self) -> None:
        """Nothing: the server begins by itself."""

    def rounds(self) -> list[Round]:
        """From the server's database."""
        try:
            with Storage.existing(self._place.folder / "state") as storage:
                done = storage.rounds()
                began = next((at for _, at, kind, _ in storage.log.events() if kind == _FIRST), None)
        except StorageError:
            return []  # it is just being made
        start = [] if began is None else [Round(0, began, 0.0)]
        return start + [
            Round(
                r["round"],
                r["at"],
                r["metrics"]["accuracy"],
                sum(d["progress"] == "folded" for d in r["devices"].values()),
            )
            for r in done
        ]

    def model(self) -> Model:
        """Of the last round."""
        state = self._place.folder / "state"
        with Storage.existing(state) as storage:
            last = storage.rounds()[-1]["model"]
        return tensorfile.decode(BlobStore(state / "blobs").read(last))


_SUPERLINK = ("flower-superlink", "--insecure", "--disable-runtime-dependency-installation")

_FIRST = "Scored"
"""The first event of a round that follows the last client's arrival."""


class Flower:
    """SuperLink, SuperNodes and what they start themselves, each app in a process of its own for every message.

    Args:
        place: Where it runs.
        job: What to do.
        environment: Flower's own virtual environment.
    """

    title = "Flower"
    servers: tuple[str, ...] = ("superlink",)

    def __init__(self, place: Site, job: Job, environment: Path) -> None:
        self._place, self._job, self._bin = place, job, environment.resolve() / "bin"
        self._ports = {n: free_port() for n in ("http", "control", "fleet", *job.names)}
        home = place.folder / "flower-home"
        home.mkdir()
        where = f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{where}')

    @property
    def port(self) -> int:
        """The SuperLink's."""
        return self._ports["http"]

    def start_server(self) -> None:
        """The SuperLink.

        Raises:
            FedpruneError: It doesn't come up.
        """
        others = [f"--{n}-api-address=127.0.0.1:{self._ports[n]}" for n in ("control", "fleet")]
        self._start(
            "superlink",
            [*_SUPERLINK, *others, "--host", "127.0.0.1", "--port", str(self.port)],
            watch=True,
        )
        until = time.monotonic() + _START_S
        while "Uvicorn running" not in self._place.said("superlink"):
            if not self._place.alive("superlink") or time.monotonic() > until:
                raise FedpruneError("the SuperLink doesn't come up", hint=self._place.said("superlink")[-2000:])
            time.sleep(_POLL_S)

    def start_client(self, name: str, port: int, *, watch: bool = False) -> None:
        """A SuperNode."""
        own = ["--port", str(self._ports[name]), "--node-config", f'device="{name}"']
        self._start(name, ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", *own], watch=watch)

    def ready(self, name: str) -> bool:
        """Whether it has got its number."""
        return "SuperNode ID" in self._place.said(name)

    def submit(self) -> None:
        """`flwr run`."""
        job, folder = self._job, self._place.folder
        config = f'folder="{folder}" clients={job.clients} rounds={job.rounds} timeout={job.deadline_s}'
        app = ROOT / "benchmarks/flower/app"
        self._start("submit", ["flwr", "run", str(app), "here", "--run-config", config], watch=False)

    def rounds(self) -> list[Round]:
        """From what its ServerApp writes."""
        path = self._place.folder / "flower_rounds.jsonl"
        lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return [Round(x["round"], x["at"], x["accuracy"], x["counted"]) for x in lines]

    def model(self) -> Model:
        """Of the last round."""
        with np.load(self._place.folder / "flower_model.npz") as file:
            return dict(file)

    def _start(self, name: str, command: list[str], *, watch: bool) -> None:
        self._place.start(name, ["env", *self._given(), *command], watch=watch)

    def _given(self) -> list[str]:
        """Variables of its processes' environment."""
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        own = {"FLWR_HOME": str(self._place.folder / "flower-home"), "PATH": f"{self._bin}:/usr/bin:/bin"}
        own["PYTHONPATH"] = f"{ROOT / 'toolkit'}:{ROOT / 'device_runtime'}"
        return [f"{k}={v}" for k, v in {**quiet, **own}.items()]
