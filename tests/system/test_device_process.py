"""A real `fedprune-device` process on a real broker: killed, started again, watched for what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_fleet import TOPICS, MemoryServer

from fedprune import tensorfile
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.wire.link import Link
from fedprune.wire.messages import Birth, Death, Progress, Update
from fedprune_device.data import load_data
from fedprune_device.trainer import Trainer
from fedprune_server.broker import EmbeddedBroker

pytestmark = pytest.mark.system

GRAPHS = Path(__file__).parents[1] / "device" / "graphs"
SLOW = Recipe(epochs=800, batch_size=1, lr=1e-4)


class Wires:
    """Connects the server of the tests to a broker."""

    def __init__(self, link: Link, server: MemoryServer) -> None:
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

    def start(self, *python: str) -> subprocess.Popen[str]:
        command = [sys.executable, *python, "-m", "fedprune_device.cli", "run", "--no-probe", "--until-finished"]
        command += ["--broker", self.url, "--site", "site", "--device", "d", "--threads", "1"]
        command += ["--data", str(self.root / "data.npz"), "--state", str(self.root / "state")]
        with (self.root / "log").open("a") as log:
            process = subprocess.Popen(command, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.processes.append(process)
        return process

    def wait(self, seen: Callable[[], object], what: str, limit: float = 30.0) -> None:
        deadline = time.monotonic() + limit
        while not seen():
            assert time.monotonic() < deadline, f"no {what}: {(self.root / 'log').read_text()[-3000:]}"
            time.sleep(0.02)

    def wait_for(self, kind: type, **fields: Any) -> None:
        def seen() -> bool:
            return any(all(getattr(m, k) == v for k, v in fields.items()) for m in self.server.of(kind))

        self.wait(seen, kind.__name__)


@pytest.fixture
def weights() -> Tensors:
    rng = np.random.default_rng(6)
    return {"w": (0.1 * rng.standard_normal((3, 6))).astype(np.float32), "b": np.zeros(3, np.float32)}


@pytest.fixture
def field(tmp_path: Path, weights: Tensors) -> Iterator[Field]:
    rng = np.random.default_rng(5)
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((90, 6)).astype(np.float32), y=rng.integers(0, 3, 90))
    server = MemoryServer(tmp_path / "server", GRAPHS, weights, time.monotonic)
    with EmbeddedBroker(port=0) as broker:
        link = Link(broker.url, "server")
        link.subscribe(TOPICS.server_subscriptions())
        link.start()
        wires = Wires(link, server)
        field = Field(tmp_path, broker.url, server)
        try:
            yield field
        finally:
            for process in field.processes:
                process.kill()
                process.wait()
            wires.close()


def test_a_process_killed_while_training_goes_on_to_the_same_bits(field: Field, weights: Tensors) -> None:
    server = field.server
    server.plan = [server.offer(1, SLOW)]
    process = field.start()
    field.wait_for(Progress, phase="train")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not server.of(Update)
    again = field.start()
    assert again.wait(40) == 0, (field.root / "log").read_text()[-3000:]
    data = load_data(str(field.root / "data.npz"), 0, "d")
    wanted = Trainer(GRAPHS / "plain.onnx").train(weights, data, SLOW, seed=7, device="d", round=1, classes=3)
    assert server.blobs.read(server.updates[1].weights.sha256) == tensorfile.encode(wanted.tensors)
    assert server.of(Birth)[-1].session > server.of(Birth)[0].session
    assert Death("d", server.of(Birth)[0].session) in server.seen  # the broker's last word for the killed process


def test_a_process_killed_before_its_update_was_accepted_hands_it_in_without_training(field: Field) -> None:
    server = field.server
    server.plan, server.accepts = [server.offer(1)], False
    process = field.start()
    field.wait_for(Update)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = server.of(Update)[0]
    server.seen.clear()
    server.accepts = True
    assert field.start().wait(40) == 0
    assert server.updates[1] == first
    assert not [p for p in server.of(Progress) if p.phase == "train"]


def test_a_process_that_is_told_to_stop_ends_well(field: Field) -> None:
    process = field.start()
    field.wait_for(Birth)
    process.terminate()
    assert process.wait(20) == 0
    field.wait_for(Death)


def test_a_training_device_imports_neither_torch_nor_onnx_nor_scipy(field: Field) -> None:
    field.server.plan = [field.server.offer(1)]
    assert field.start("-X", "importtime").wait(60) == 0
    lines = (field.root / "log").read_text().splitlines()
    loaded = {x.rsplit("|", 1)[1].strip().split(".")[0] for x in lines if x.startswith("import time:")}
    assert {"onnxruntime", "numpy", "fedprune_device"} <= loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "scipy", "rich", "sqlalchemy", "amqtt", "fedprune_export"}
