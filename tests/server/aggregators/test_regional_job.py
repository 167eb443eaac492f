"""A job at an aggregator: its parent's decisions while a command runs, and what the parent learns of regions below."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.staleness import plain
from fedprune.core.errors import ProtocolError
from fedprune.jobs.state import Device, Phase, Progress, Task
from fedprune.wire.messages import Birth, Message, Update
from fedprune.wire.topics import Topics
from fedprune_server.aggregators.connections import RegionConnections
from fedprune_server.aggregators.dispatcher import ParentJob, RegionDispatcher
from fedprune_server.aggregators.messages import Steered
from fedprune_server.aggregators.parent import ParentLink, ParentUp
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner, RunnableJob
from fedprune_server.engine.message_handler import Envelope
from fedprune_server.engine.server import Server, Tier
from fedprune_server.messaging.transport import SiteLink
from support.fakes.fleet import Air, ToyWorker, fill, quick
from support.fakes.tiny_job import ARCHITECTURE, JOB

pytestmark = pytest.mark.soak


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

    def steer(self, head: dict[str, Any], later: float = 10.0, **rest: Any) -> None:
        """A turn in which the parent has decided something, `later` by so many seconds."""
        self.now += later
        self.runner.begin_turn()
        self.runner.follow(Steered(JOB.name, head, **rest))
        self.runner.end_turn()

    def hear(self, message: Message) -> None:
        """A turn in which the board `ant` sends a message."""
        self.runner.begin_turn()
        self.runner.receive(Envelope("ant", JOB.name, message, len(message.to_bytes())))
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


HEAD = {"ranking": None, "order": None, "memory": {}, "paused": False, "phase": Phase.TRAINING}


def begun(region: Region, progress: Progress, **values: Any) -> tuple[do.Basis, Task]:
    """An asynchronous part that the board `ant` has begun, and the basis of its offer."""
    basis = do.Basis(1, region.state.model, region.put("ranks"))
    return basis, Task(1, (3,), progress=progress, basis=plain(basis), **values)


def go_on(region: Region, number: int, tasks: dict[str, Task | None]) -> None:
    """The parent begins a round."""
    region.steer(HEAD | {"round": number, "model": region.put(f"model {number}")}, tasks=tasks)


def check_kept(region: Region, digests: set[str], sent: Task, known: Task) -> None:
    """Blobs that were reported stay until the parent has done with them.

    Args:
        sent: The part's row, which the parent sends again before it learns of the report.
        known: The row after that.
    """
    go_on(region, 2, {})
    assert all(map(region.store.has, digests))
    go_on(region, 3, {"ant": replace(sent)})
    go_on(region, 4, {})
    assert all(map(region.store.has, digests))
    go_on(region, 5, {"ant": known})
    go_on(region, 6, {})
    assert all(map(region.store.has, digests))
    go_on(region, 7, {"ant": None})
    assert not any(map(region.store.has, digests))


def test_an_update_that_is_reported_stays_while_the_parent_begins_a_round(region: Region) -> None:
    update = region.store.put(fill("update"))
    _, task = begun(region, Progress.PULLING, offer={"weights": {"size": update.size}}, update=update.to_dict())
    device, head = Device(1, True, {"name": "raspberry-pi-5"}, None, 10), HEAD | {"round": 1}
    pull = do.PullUpdate("ant", 1, 1, update.to_dict())
    region.steer(head, devices={"ant": device}, tasks={"ant": replace(task)}, commands=(pull,), whole=True)
    assert region.answer() == on.UpdateStored("ant", 1, 1, update.sha256)
    stored = replace(task, progress=Progress.STORED, weights=update.sha256)
    check_kept(region, {update.sha256}, task, stored)


def test_a_board_that_repeats_its_announcement_waits_for_the_parent(region: Region) -> None:
    """A parent that is busy would ask for an update again that was reported to it a while ago."""
    update = region.store.put(fill("update"))
    _, task = begun(region, Progress.PULLING, offer={"weights": {"size": update.size}}, update=update.to_dict())
    device, head = Device(1, True, {"name": "raspberry-pi-5"}, None, 10), HEAD | {"round": 1}
    pull = do.PullUpdate("ant", 1, 1, update.to_dict())
    region.steer(head, devices={"ant": device}, tasks={"ant": replace(task)}, commands=(pull,), whole=True)
    stored = region.answer()
    announced = Update("ant", JOB.name, 1, 1, region.state.model, update, 10, 5)
    region.hear(announced)
    assert region.reported == []
    # The connection was lost with the report: the parent sends its rows, and orders the update again.
    region.steer(head, devices={"ant": device}, tasks={"ant": replace(task)}, commands=(pull,), whole=True)
    assert region.answer() == stored
    region.hear(replace(announced, attempt=2))
    assert isinstance(region.reported.pop(), on.UpdateAnnounced)


def test_only_the_parent_pauses_a_job(region: Region) -> None:
    with pytest.raises(ProtocolError, match="the parent's"):
        region.runner.pause(True)
    assert not region.state.paused


def test_an_offer_that_is_reported_stays_while_the_parent_begins_a_round(region: Region) -> None:
    basis, task = begun(region, Progress.EXTRACTING)
    device, head = Device(1, True, {"name": "raspberry-pi-5"}, None, 10), HEAD | {"round": 1}
    order = do.Extract(basis, do.Part("ant", 1, (3,), 1.0, 10, None), do.Coding(), 1)
    region.steer(head, devices={"ant": device}, tasks={"ant": replace(task)}, commands=(order,), whole=True)
    region.worker.may_go.set()
    made = region.answer()
    assert isinstance(made, on.Extracted)
    offered = replace(task, progress=Progress.OFFERED, offer=made.offer)
    check_kept(region, {made.offer["weights"]["sha256"]}, task, offered)


def test_a_part_that_has_moved_takes_no_place_of_those_that_are_received_here(region: Region) -> None:
    update = BlobRef.of(fill("update"))
    _, task = begun(region, Progress.PULLING, offer={"weights": {"size": update.size}}, update=update.to_dict())
    names = ("ant", "bee", "cat", "dog", "eel")
    devices = {n: Device(1, True, {"name": "raspberry-pi-5"}, None, 10) for n in names}
    pulls = tuple(do.PullUpdate(n, 1, 1, update.to_dict()) for n in names)
    tasks = {n: replace(task) for n in names}
    region.steer(HEAD | {"round": 1}, devices=devices, tasks=tasks, commands=pulls, whole=True)
    uploads = region.runner.view.uploads
    assert [n for n in names if uploads.progress(n)] == ["ant", "bee", "cat", "dog"]
    region.steer({}, later=1.0, tasks=dict.fromkeys(("ant", "cat")))
    region.steer({}, later=0.5)
    assert [n for n in names if uploads.progress(n)] == ["bee", "dog", "eel"]


class Parent:
    """The connection to a parent, without one."""

    outdated, connected = False, True

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.gone: list[str] = []

    def collect(self) -> list[Any]:
        items, self.items = self.items, []
        return items

    def born(self, birth: Birth, region: str = "") -> None:
        """Boards are no part of these tests."""

    def died(self, device: str, session: int) -> None:
        self.gone.append(device)


class Middle:
    """An aggregator with aggregators below it: its loop, and real connections to these."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reported = folder, list[on.Event]()
        store = BlobStore(folder / "blobs", durable=False)
        self.state = State(store.put(b"model").sha256)
        self.parent = Parent()
        landing = BlobStore(folder / "landing", durable=False)
        self.connections = RegionConnections("127.0.0.1", 0, None, landing, patience_s=3600.0)
        self.connections.serve({JOB.name: store}, lambda: None)
        about = {"job": {"name": JOB.name}, "model": self.state.model, "name": "net"}
        below = RegionDispatcher(self.connections, {JOB.name: ParentJob(about, self.state)})
        job = RunnableJob(
            JOB, ARCHITECTURE, self.state, quick(folder), store, ToyWorker(store), report=self.reported.append
        )
        air: Any = Air()
        site = SiteLink(
            air, Topics("default"), Quarantine(lambda: air.now), clock=lambda: air.now, monotonic=lambda: air.now
        )
        self.air = air
        self.server = Server([JobRunner(job, site, below=below)], site, tier=Tier(below, self.parent))  # type: ignore[arg-type]
        self.link: ParentLink | None = None

    def join(self) -> None:
        """The aggregator `valley` connects."""
        landing = BlobStore(self.folder / "valley", durable=False)
        self.link = ParentLink(f"ws://127.0.0.1:{self.connections.port}", "valley", None, landing)
        thread = threading.Thread(target=self.link.start)
        thread.start()
        self.until(on.Reconnected("valley"))
        thread.join(10)

    def turn(self) -> None:
        self.air.now += 1.0
        self.server._turn()

    def until(self, event: on.Event) -> None:
        """Turns until an event is reported."""
        until = time.monotonic() + 10
        while event not in self.reported:
            assert time.monotonic() < until, self.reported
            self.turn()
        self.reported.clear()

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        self.connections.close()
        for runner in self.server.runners.values():
            runner.close()


@pytest.fixture
def middle(tmp_path: Path) -> Iterator[Middle]:
    made = Middle(tmp_path)
    yield made
    made.close()


def test_the_parent_hears_which_regions_further_down_are_away(middle: Middle) -> None:
    middle.server.first.open()
    middle.join()
    link = middle.link
    assert link is not None
    link.born(Birth("ant", 1, "raspberry-pi-5", 10, "test"))
    while not middle.server.present("ant"):
        middle.turn()
    link.close()
    middle.until(on.Disconnected("valley"))
    assert middle.parent.gone == ["ant"]
    head = {"round": 1, "phase": Phase.TRAINING, "model": middle.state.model}
    whole = Steered(JOB.name, head, whole=True)
    middle.parent.items += [ParentUp(0.0), whole]  # which may not have heard it, and has repeated its orders
    middle.turn()
    assert middle.reported == [on.Disconnected("valley")]
    middle.reported.clear()
    lost = on.Disconnected("valley", "its aggregator valley was away for too long")
    middle.connections._patience_s = 0.0
    middle.until(lost)
    middle.turn()
    assert middle.reported == []  # once
    middle.parent.items += [ParentUp(0.0), whole]
    middle.turn()
    assert middle.reported == [lost]


def test_the_parent_hears_of_regions_that_have_not_come_since_the_start(middle: Middle) -> None:
    middle.server.first.open()
    device = Device(1, False, {"name": "raspberry-pi-5"}, None, 10, region="valley/hill")
    stored = Task(1, (3,), progress=Progress.STORED, region="coast")
    steered = Steered(JOB.name, {"phase": Phase.TRAINING}, {"ant": device}, {"ant": stored}, whole=True)
    middle.parent.items += [ParentUp(0.0), steered]
    middle.turn()
    assert middle.reported == [on.Disconnected("coast"), on.Disconnected("valley")]
    middle.join()
    assert list(middle.connections.absent()) == ["coast"]


@pytest.mark.parametrize("progress", [Progress.OFFERED, Progress.PULLING])
def test_the_part_of_a_board_that_is_revoked_is_void_in_its_region(middle: Middle, progress: Progress) -> None:
    middle.state.round = 3
    middle.state.devices["ant"] = Device(1, True, {"name": "raspberry-pi-5"}, None, 10, region="valley/hill")
    middle.state.tasks["ant"] = Task(2, (3,), progress=progress)
    middle.server.first.remove_member("ant")
    kind = on.OfferRefused if progress is Progress.OFFERED else on.UpdateRejected
    assert middle.reported == [kind("ant", 3, 2, "it was revoked", "revoked", "valley/hill")]
