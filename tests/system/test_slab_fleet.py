"""A daemon and its boards on a Mosquitto: what many boards pull travels once, and trains to the same bits."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune.wire.link import Link
from fedprune.wire.messages import BlobRequest, parse
from fedprune.wire.topics import EVERYONE, Topics
from fedprune_device.network import blob_download
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_export.importing import import_onnx
from fedprune_server.engine.job_runner import JobRunner, RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.executor.worker import Worker
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.transfer.multicast import shareable
from support.fakes.agent_harness import agent_on
from support.fakes.fleet import quick
from support.processes.machine import find_mosquitto, free_port, listens

pytestmark = [pytest.mark.soak, pytest.mark.mosquitto, pytest.mark.system]

NAMES = ("a", "b", "c", "d", "e", "f")
TOPICS = Topics("default")
JOB = Job(
    name="digits",
    seed=3,
    rounds=2,
    devices=len(NAMES),
    strategy="heterofl",
    options={"densities": [1.0, 0.5, 0.25]},
    recipe=Recipe(epochs=1, batch_size=16, lr=0.02, max_steps=3),
    deadline_s=600,
)
OLD_RULES = """\
topic read fedprune/1/default/+/+/up/#
topic write fedprune/1/default/+/+/up/#
topic write fedprune/1/default/+/+/down/#
topic read fedprune/1/default/all/-/down
""" + "".join(f"topic read fedprune/1/default/{name}/+/down/#\n" for name in NAMES)
"""What a broker was told before there were shared topics."""


@pytest.fixture
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A Mosquitto's address."""
    port, rules = free_port(), getattr(request, "param", "")
    settings = f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\n"
    if rules:
        (tmp_path / "acl").write_text(rules)
        settings += f"acl_file {tmp_path / 'acl'}\n"
    (tmp_path / "conf").write_text(settings)
    command = [find_mosquitto(), "-c", str(tmp_path / "conf")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not listens(port):
            time.sleep(0.02)
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No board asks on its own because this machine stood still for some seconds."""
    monkeypatch.setattr(blob_download, "PATIENCE", 100.0)


class Watched:
    """The server's link: notes chunks that go out, to all and to one, and wants that come in.

    A want that may be shared is heard when every board that was offered its blob has asked for it: how often it is
    published doesn't depend on how far apart a busy machine lets the boards ask.
    """

    def __init__(self, link: Link, listening: Collection[str]) -> None:
        self._link = link
        self.to_all = self.to_one = 0
        self.shared: dict[str, list[bool]] = {name: [] for name in NAMES}
        self._listening = listening
        self._made: set[tuple[str, int]] = set()
        self._offered: dict[str, set[str]] = {}
        self._asked: dict[str, set[str]] = {}
        self._held: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        address = TOPICS.parse(topic)
        if address.channel == "down/blob":
            if address.device == EVERYONE:
                self.to_all += len(payload)
            else:
                self.to_one += len(payload)
        return self._link.publish(topic, payload, qos)

    def offer(self, device: str, number: int, offer: dict[str, Any]) -> None:
        """Note what a board was offered."""
        self._made.add((device, number))
        if device in self._listening:
            for digest in shareable(offer):
                self._offered.setdefault(digest, set()).add(device)

    def get(self, timeout: float | None = 0.0) -> Any:
        for held in self._held:
            if self._all_asked(held[1]):
                self._held.remove(held)
                return held[0]
        item = self._link.get(timeout)
        if isinstance(item, tuple) and item[0].endswith("/up") and isinstance(want := parse(item[1]), BlobRequest):
            device = TOPICS.parse(item[0]).device
            self.shared[device].append(bool(want.shared))
            self._asked.setdefault(want.sha256, set()).add(device)
            if want.shared and not self._all_asked(want.sha256):
                self._held.append((item, want.sha256))
                return None
        return item

    def _all_asked(self, digest: str) -> bool:
        return len(self._made) % len(NAMES) == 0 and self._asked[digest] >= self._offered.get(digest, set())


class Old:
    """The link of a board whose software knows nothing of slabs."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def unsent(self) -> int:
        return self._link.unsent

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        return self._link.publish(topic, payload, qos)

    def listen(self, topics: Collection[str]) -> None:
        assert not topics

    def get(self, timeout: float | None = 0.0) -> Any:
        item = self._link.get(timeout)
        if isinstance(item, tuple) and item[0].endswith("/down") and b'"slabs"' in item[1]:
            body = json.loads(item[1])
            del body["slabs"]
            return item[0], json.dumps(body).encode()
        return item


class Run:
    """What came of a job."""

    def __init__(self, folder: Path, url: str, *, slabs: bool = True, old: Collection[str] = ()) -> None:
        model, data = import_onnx(digits_model(), "digits-net"), deal(NAMES, seed=1)
        self.store = BlobStore(folder / "server" / "blobs", durable=False)
        worker = Worker(JOB, model, self.store, slabs=slabs)
        if worker._slabs is not None:
            worker._slabs._least = 0  # the model is a small one
        storage = quick(folder / "server")
        state = State(model=worker.initial())
        storage.save(state, (), 0.0)
        self.offers: list[dict[str, Any]] = []
        with ExitStack() as stack:
            link = stack.enter_context(Link(url, "server"))
            self.wire = Watched(link, set(NAMES) - set(old))
            wire: Any = self.wire
            site = SiteLink(wire, TOPICS)
            job = RunnableJob(JOB, model.architecture, state, storage, self.store, worker, keep=None)
            runner = JobRunner(job, site)
            daemon = Server([runner], site)
            offer = runner._dispatcher.offer

            def noted(command: Any, **more: Any) -> Any:
                self.offers.append(command.offer)
                self.wire.offer(command.device, command.round, command.offer)
                return offer(command, **more)

            runner._dispatcher.offer = noted  # type: ignore[method-assign]
            link.subscribe(TOPICS.server_subscriptions())
            link.start()
            threads, agents = [], []
            for name in NAMES:
                board = stack.enter_context(DeviceStore(folder / name))
                there = stack.enter_context(Link(url, name))
                there.subscribe(TOPICS.device_subscriptions(name))
                there.start()
                heard: Any = Old(there) if name in old else there
                kind = find("generic-x86-64")
                agents.append(
                    agent_on(
                        board,
                        heard,
                        data.devices[name],
                        device=name,
                        site="default",
                        clock=time.monotonic,
                        profile=kind,
                    )
                )
                threads.append(threading.Thread(target=agents[-1].run, args=(True,)))
            stack.callback(lambda: [t.join(20) for t in threads])
            stack.callback(lambda: [a.stop() for a in agents])
            for thread in threads:
                thread.start()
            stack.callback(threading.Timer(120, daemon.stop).cancel)
            daemon.run(until_finished=True)
        self.final = runner.state
        assert len(self.final.history) == JOB.rounds
        assert all(d["progress"] == "folded" for r in self.final.history for d in r["devices"].values())


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The models of the same job without slabs."""
    folder, port = tmp_path_factory.mktemp("plain"), free_port()
    (folder / "conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\n")
    process = subprocess.Popen([find_mosquitto(), "-c", str(folder / "conf")], stderr=subprocess.DEVNULL)
    try:
        while not listens(port):
            time.sleep(0.02)
        run = Run(folder, f"mqtt://127.0.0.1:{port}", slabs=False)
    finally:
        process.kill()
        process.wait()
    assert run.wire.to_all == 0
    return [r["model"] for r in run.final.history]


def test_slabs_travel_once_and_everybody_trains_to_the_same_bits(
    broker: str, tmp_path: Path, wanted: list[str], patient: None
) -> None:
    run = Run(tmp_path, broker)
    assert [r["model"] for r in run.final.history] == wanted
    assert sorted({len(o["slabs"]) for o in run.offers}) == [1, 2, 3]
    assert all(all(said) for said in run.wire.shared.values())
    each = sum(o["weights"]["size"] for o in run.offers)
    slabs = {ref["sha256"]: ref["size"] for o in run.offers for ref in o["slabs"]}
    graphs = {o[k]["sha256"]: o[k]["size"] for o in run.offers for k in ("training", "inference")}
    assert sum(slabs.values()) < 0.5 * each
    assert run.wire.to_all + run.wire.to_one < 1.5 * (sum(slabs.values()) + sum(graphs.values()))


def test_an_older_board_pulls_its_weights_as_ever(
    broker: str, tmp_path: Path, wanted: list[str], patient: None
) -> None:
    run = Run(tmp_path, broker, old=["a", "f"])
    assert [r["model"] for r in run.final.history] == wanted
    assert not any(run.wire.shared["a"] + run.wire.shared["f"])
    assert all(all(run.wire.shared[name]) for name in "bcde")


# Boards wait long for what never comes; `tests/device/network/test_slab_downloads.py` has a clock for that.
@pytest.mark.soak
@pytest.mark.parametrize("broker", [OLD_RULES], indirect=True, ids=["older rules"])
def test_boards_that_hear_nothing_on_shared_topics_ask_on_their_own(
    broker: str, tmp_path: Path, wanted: list[str]
) -> None:
    run = Run(tmp_path, broker)
    assert [r["model"] for r in run.final.history] == wanted
    assert all(said[0] and not said[-1] for said in run.wire.shared.values())
    assert run.wire.to_one > run.wire.to_all
