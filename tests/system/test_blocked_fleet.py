"""A fleet of unequal boards: one whose convolutions compute in blocks, one that is wrong about its own, one without.

Server and boards are the real ones, in one process; only the broker is a queue. What comes of it is what a simulation
of the same boards gives, which knows standard operators alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile_store import find
from fedprune.runtime.blocks import block_size
from fedprune.wire.messages import BlobRequest, Refusal, parse
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_export.importing import import_onnx
from fedprune_server.engine.job_runner import JobRunner, RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.executor.worker import Worker
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation
from support.fakes.agent_harness import agent_on
from support.fakes.fleet import quick

pytestmark = pytest.mark.system

HERE = block_size()
OTHER = 8 if HERE != 8 else 16
KIND = "generic-x86-64"
CLAIMS = {"right": HERE, "wrong": OTHER, "silent": None}
"""What each board's probe says of its blocks; None for a board that doesn't probe."""

JOB = Job(
    name="digits",
    seed=3,
    rounds=2,
    devices=3,
    density=0.6,
    recipe=Recipe(epochs=1, batch_size=16, lr=0.02, max_steps=6),
    deadline_s=600,
)


class Air:
    """The server's link, and the boards'."""

    connected, unsent = True, 0

    def __init__(self) -> None:
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.boards: dict[str, queue.Queue[Any]] = {}
        self.pulled: dict[str, set[str]] = {name: set() for name in CLAIMS}
        self.refusals: list[Refusal] = []
        self.inbox.put(ConnectionUp())

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        name = topic.split("/")[3]
        for inbox in [self.boards[name]] if name in self.boards else self.boards.values():
            inbox.put((topic, payload))
        return True

    def get(self, timeout: float | None = 0.0) -> Any:
        return taken(self.inbox, timeout)

    def flush(self, timeout: float) -> bool:
        return True

    def heard(self, name: str, topic: str, payload: bytes) -> None:
        if Topics("default").parse(topic).channel == "up":
            message = parse(payload)
            if isinstance(message, BlobRequest):
                self.pulled[name].add(message.sha256)
            elif isinstance(message, Refusal):
                self.refusals.append(message)
        self.inbox.put((topic, payload))


class BoardLink:
    unsent = 0
    room = True

    def __init__(self, name: str, air: Air) -> None:
        self.name, self.air = name, air
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.inbox.put(ConnectionUp())
        air.boards[name] = self.inbox

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        self.air.heard(self.name, topic, payload)
        return True

    def listen(self, topics: Collection[str]) -> None:
        pass

    def get(self, timeout: float | None = 0.0) -> Any:
        return taken(self.inbox, timeout)


def taken(inbox: queue.Queue[Any], timeout: float | None) -> Any:
    try:
        return inbox.get(timeout=max(timeout or 0.0, 1e-3))
    except queue.Empty:
        return None


def probed(block: int | None) -> ProbeReport | None:
    return None if block is None else ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, block=block)


def test_every_board_trains_to_the_numbers_of_standard_operators(tmp_path: Path) -> None:
    model, data = import_onnx(digits_model(), "digits-net"), deal(tuple(CLAIMS), seed=1)
    air, store = Air(), BlobStore(tmp_path / "server" / "blobs", durable=False)
    worker = Worker(JOB, model, store)
    storage = quick(tmp_path / "server")
    state = State(model=worker.initial())
    storage.save(state, (), 0.0)
    offers: dict[str, list[dict[str, Any]]] = {name: [] for name in CLAIMS}
    with ExitStack() as stack:
        threads = []
        agents = []
        for name, block in CLAIMS.items():
            folder = stack.enter_context(DeviceStore(tmp_path / name))
            agents.append(
                agent_on(
                    folder,
                    BoardLink(name, air),
                    data.devices[name],
                    device=name,
                    site="default",
                    clock=time.monotonic,
                    profile=find(KIND),
                    probe=probed(block),
                )
            )
            threads.append(threading.Thread(target=agents[-1].run, args=(True,)))
        stack.callback(lambda: [t.join(20) for t in threads])
        stack.callback(lambda: [a.stop() for a in agents])
        site = SiteLink(air, Topics("default"))
        job = RunnableJob(JOB, model.architecture, state, storage, store, worker, keep=None)
        runner = JobRunner(job, site)
        daemon = Server([runner], site)
        offer = runner._dispatcher.offer

        def noted(command: Any, **more: Any) -> Any:
            offers[command.device].append(command.offer)
            return offer(command, **more)

        runner._dispatcher.offer = noted  # type: ignore[method-assign]
        for thread in threads:
            thread.start()
        stack.callback(threading.Timer(120, daemon.stop).cancel)
        daemon.run(until_finished=True)
        final = runner.state

    assert len(final.history) == JOB.rounds
    assert all(d["progress"] == "folded" for r in final.history for d in r["devices"].values())
    assert not air.refusals
    for name, block in CLAIMS.items():
        assert len(offers[name]) >= JOB.rounds
        for body in offers[name]:
            assert list(body.get("blocked", {})) == ([str(block)] if block else [])
            assert body["training"]["sha256"] in air.pulled[name]
            for ref in body.get("blocked", {}).values():
                assert (ref["sha256"] in air.pulled[name]) == (block == HERE)

    devices = [VirtualDevice(name, find(KIND), data.devices[name]) for name in CLAIMS]
    simulation = Simulation(
        Experiment("virtual", JOB, model, devices, (data.x, data.y)), BlobStore(tmp_path / "virtual", durable=False)
    )
    simulation.run()
    wanted = tensorfile.decode(simulation.store.read(simulation.state.model))
    got = tensorfile.decode(store.read(final.model))
    off = np.sqrt(sum(float(np.sum((got[n].astype(np.float64) - wanted[n]) ** 2)) for n in wanted))
    moved = np.sqrt(sum(float(np.sum((wanted[n].astype(np.float64) - model.tensors[n]) ** 2)) for n in wanted))
    assert moved > 0
    assert off <= 1e-3 * moved
