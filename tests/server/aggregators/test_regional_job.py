"""A job at an aggregator: what its parent decides while this server is still busy with something earlier."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.state import Device, Phase, Progress, Task
from fedprune.wire.topics import Topics
from fedprune_server.aggregators.messages import Steered
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner, RunnableJob
from fedprune_server.messaging.transport import SiteLink
from support.fakes.fleet import Air, ToyWorker, fill, quick
from support.fakes.tiny_job import ARCHITECTURE, JOB


class HeldWorker(ToyWorker):
    """A worker whose next command waits."""

    def __init__(self, store: BlobStore) -> None:
        super().__init__(store)
        self.begun, self.may_go = threading.Event(), threading.Event()

    def execute(self, command: do.Command) -> on.Event:
        self.begun.set()
        assert self.may_go.wait(10)
        return super().execute(command)


class Region:
    """A job at an aggregator, without a parent's connection."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder / "blobs", durable=False)
        self.worker, self.reported = HeldWorker(self.store), list[on.Event]()
        self.now = 0.0
        self.state = State(self.put("model 1"))
        job = RunnableJob(
            JOB, ARCHITECTURE, self.state, quick(folder), self.store, self.worker, report=self.reported.append
        )
        quarantine = Quarantine(lambda: self.now)
        site = SiteLink(Air(), Topics("default"), quarantine, clock=lambda: self.now, monotonic=lambda: self.now)  # type: ignore[arg-type]
        self.runner = JobRunner(job, site)
        self.runner.open()

    def put(self, name: str) -> str:
        return self.store.put(fill(name)).sha256

    def steer(self, head: dict[str, Any], **rest: Any) -> None:
        """A turn in which the parent has decided something."""
        self.now += 10.0
        self.runner.begin_turn()
        self.runner.follow(Steered(JOB.name, head, **rest))
        self.runner.end_turn()

    def answer(self) -> on.Event:
        """Turns until an event is reported."""
        until = time.monotonic() + 10
        while not self.reported:
            assert time.monotonic() < until
            self.runner.begin_turn()
            self.runner.end_turn()
        return self.reported.pop()


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    made = Region(tmp_path)
    yield made
    made.worker.may_go.set()
    made.runner.close()


def test_a_command_under_way_keeps_what_it_reads_when_the_parent_goes_on(region: Region) -> None:
    first, ranks = region.state.model, region.put("ranks")
    head = {"round": 1, "model": first, "ranking": ranks, "order": None, "memory": {}, "paused": False}
    device = Device(1, True, {"name": "raspberry-pi-5"}, None, 10)
    order = do.Extract(do.Basis(1, first, ranks), do.Part("ant", 1, (3,), 1.0, 10, None), do.Coding(), 1)
    task = Task(1, (3,), progress=Progress.EXTRACTING)
    region.steer(
        head | {"phase": Phase.TRAINING}, devices={"ant": device}, tasks={"ant": task}, commands=(order,), whole=True
    )
    assert region.worker.begun.wait(10)
    later = head | {"round": 2, "model": region.put("model 2"), "phase": Phase.TRAINING}
    region.steer(later, tasks={"ant": None})  # it was late
    assert region.store.has(first)
    region.worker.may_go.set()
    assert isinstance(region.answer(), on.Extracted)
    region.steer({})
    assert not region.store.has(first)
