"""Aggregators and their parent over real connections of this machine: rows, commands, blobs, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.sync.connection import Connection

from fedprune import __version__
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import BrokerError, FedpruneError, StorageError
from fedprune.jobs.state import Device, Phase, Progress, Task
from fedprune.wire.messages import Birth
from fedprune_server.aggregators import channel, connections, dispatcher, parent
from fedprune_server.aggregators.channel import PIECE, ParentLostError, UnansweredError
from fedprune_server.aggregators.connections import (
    BornBelow,
    DiedBelow,
    EventBelow,
    Item,
    RegionConnections,
    RegionDown,
    RegionUp,
    TrafficBelow,
)
from fedprune_server.aggregators.dispatcher import ParentJob, RegionDispatcher
from fedprune_server.aggregators.messages import Steered
from fedprune_server.aggregators.parent import ParentLink, ParentUp
from fedprune_server.messaging.second_server import OtherServerError
from support.waiting import until

pytestmark = pytest.mark.soak

JOB = "job"
MODEL = "a" * 64


def birth(device: str, session: int = 1) -> Birth:
    return Birth(device, session, "raspberry-pi-5", 10, "test")


def device(region: str) -> Device:
    return Device(1, True, {"name": "raspberry-pi-5"}, None, 10, region=region)


class SlowSocket:
    """A connection whose first message takes until it is let go; reading gives what was sent to another one."""

    def __init__(self, incoming: tuple[str, ...] = ()) -> None:
        self.sent: list[str] = []
        self.began, self.go = threading.Event(), threading.Event()
        self.socket = socket.socket()
        self._incoming = incoming

    def send(self, text: str) -> None:
        self.began.set()
        assert self.go.wait(30)
        self.sent.append(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self._incoming)

    def close(self) -> None:
        self.socket.close()


def _ignored(*_: Any) -> None:
    pass


@pytest.mark.parametrize("most", [60, 2**18])
def test_messages_that_wait_are_sent_together_and_read_one_by_one(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(channel, "_TOGETHER", most)
    messages = [{"kind": "died", "device": f"d{n}", "session": n} for n in range(4)]
    received: list[Any] = []
    with (
        closing(SlowSocket()) as slow,
        channel.Channel(cast("Connection", slow), _ignored, _ignored, _ignored) as sender,
    ):
        sender.send(messages[0])
        assert slow.began.wait(30)
        for message in messages[1:]:
            sender.send(message)
        slow.go.set()
        sender.flush(30)
    sent = [json.loads(text) for text in slow.sent]
    assert sent == (messages if most == 60 else [messages[0], messages[1:]])  # two have 82 characters

    def take(_: Any, message: Any) -> None:
        received.append(message)

    with (
        closing(SlowSocket(tuple(slow.sent))) as other,
        channel.Channel(cast("Connection", other), _ignored, take, _ignored) as reader,
    ):
        reader.run()
    assert received == messages


class Tier:
    """A parent with a job, and aggregators."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = State(MODEL, 3)
        self.store = BlobStore(folder / "parent", durable=False)
        landing = BlobStore(folder / "landing", durable=False)
        self.connections = RegionConnections("127.0.0.1", 0, None, landing, patience_s=5.0)
        about = {"job": {"name": JOB}, "model": MODEL, "name": "net"}
        self.connections.serve({JOB: self.store}, lambda: None)
        self.dispatcher = RegionDispatcher(self.connections, {JOB: ParentJob(about, self.state)})
        self.links: list[ParentLink] = []
        self.stores: dict[str, BlobStore] = {}
        self.seen: list[Item] = []

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.connections.port}"

    def begin(self, region: str) -> ParentLink:
        """An aggregator that isn't let in yet: the parent's loop does that."""
        self.stores[region] = BlobStore(self.folder / region, durable=False)
        link = ParentLink(self.url, region, None, BlobStore(self.folder / f"{region}-landing", durable=False))
        link.serve({JOB: self.stores[region]}, lambda: None)
        self.links.append(link)
        return link

    def join(self, region: str) -> ParentLink:
        link = self.begin(region)
        thread = threading.Thread(target=link.start)
        thread.start()
        up = self.wait(RegionUp)
        self.dispatcher.up(up.region)
        thread.join()
        return link

    def wait(self, kind: type[Any]) -> Any:
        """The next item of a kind; others before it are put into `seen`."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            for item in self.connections.collect():
                self.seen.append(item)
            for i, item in enumerate(self.seen):
                if isinstance(item, kind):
                    return self.seen.pop(i)
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} came, but {self.seen}")

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.connections.close()


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    made = Tier(tmp_path)
    yield made
    made.close()


def heard(link: ParentLink, kind: type[Any]) -> Any:
    """The next item of a kind that an aggregator gets; others before it are dropped."""
    until, waiting = time.monotonic() + 10, WAITING.setdefault(link, [])
    while time.monotonic() < until:
        waiting += link.collect()
        while waiting:
            item = waiting.pop(0)
            if isinstance(item, kind):
                return item
        time.sleep(0.005)
    raise AssertionError(f"no {kind.__name__} came")


WAITING: dict[ParentLink, list[Any]] = {}


def test_an_aggregator_is_told_the_jobs_and_its_rows_alone(tier: Tier) -> None:
    tier.state.devices["ant"], tier.state.devices["bee"] = device("north"), device("coast")
    tier.state.tasks["ant"] = Task(1, (3,), progress=Progress.PULLING)
    tier.state.tasks["bee"] = Task(1, (3,), progress=Progress.STORED, region="north")  # it has moved since
    link = tier.join("north")
    assert link.jobs == {JOB: {"job": {"name": JOB}, "model": MODEL, "name": "net"}}
    assert isinstance(heard(link, ParentUp), ParentUp)
    found = heard(link, Steered)
    assert found.whole
    assert found.head["round"] == 3
    assert set(found.devices) == {"ant", "bee"}
    assert (found.devices["ant"].online, found.devices["bee"].online) == (True, False)
    assert (found.tasks["ant"].progress, found.tasks["bee"].progress) == (Progress.PULLING, Progress.STORED)


def test_what_boards_report_is_collected_some_at_a_time_and_wakes_the_loop_once(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedprune_server.aggregators.connections.TOGETHER", 3)
    link, woken = tier.join("north"), list[int]()
    assert not list(tier.connections.collect())
    tier.connections.serve({JOB: tier.store}, lambda: woken.append(1))
    for number in range(7):
        link.died(f"board-{number}", 1)
    until = time.monotonic() + 10
    while tier.connections._items.qsize() < 7 and time.monotonic() < until:
        time.sleep(0.005)
    found = []
    while tier.connections.waiting:
        found.append([item.device for item in tier.connections.collect() if isinstance(item, DiedBelow)])
    assert found == [["board-0", "board-1", "board-2"], ["board-3", "board-4", "board-5"], ["board-6"]]
    assert woken == [1]


def test_rows_and_commands_go_to_the_region_of_their_device(tier: Tier) -> None:
    for name, region in (("ant", "north"), ("bee", "coast"), ("cat", "")):
        tier.state.devices[name] = device(region)
        tier.state.tasks[name] = Task(1, (3,))
    links = {region: tier.join(region) for region in ("north", "coast")}
    for link in links.values():
        heard(link, Steered)
    orders = [do.Cancel(name, 3, 1, "late") for name in ("ant", "bee", "cat")]
    wake = do.Wake(7.0)
    assert tier.dispatcher.route(JOB, {"ant", "bee", "cat"}, set(), [*orders, wake]) == [orders[2], wake]
    for region, name, order in (("north", "ant", orders[0]), ("coast", "bee", orders[1])):
        found = heard(links[region], Steered)
        assert set(found.devices) == set(found.tasks) == {name}
        assert found.commands == (order,)
        assert found.head == {}  # it was told already


def test_the_end_of_a_job_is_told_to_all(tier: Tier) -> None:
    links = [tier.join("north"), tier.join("coast")]
    for link in links:
        heard(link, Steered)
    assert tier.dispatcher.route(JOB, set(), set(), [do.Finish(MODEL)]) == [do.Finish(MODEL)]
    for link in links:
        assert heard(link, Steered).commands == (do.Finish(MODEL),)


def test_a_device_that_moves_is_offline_where_it_was_which_keeps_its_stored_update(tier: Tier) -> None:
    tier.state.devices["ant"] = device("north")
    tier.state.tasks["ant"] = Task(1, (3,), progress=Progress.STORED, weights="b" * 64, region="north")
    links = {region: tier.join(region) for region in ("north", "coast")}
    for link in links.values():
        heard(link, Steered)
    tier.state.devices["ant"].region = "coast"
    tier.dispatcher.route(JOB, {"ant"}, set(), [])
    there, here = heard(links["north"], Steered), heard(links["coast"], Steered)
    assert (there.devices["ant"].online, here.devices["ant"].online) == (False, True)
    assert there.tasks["ant"].references() >= {"b" * 64}
    tier.state.tasks["ant"].region = "coast"
    tier.dispatcher.route(JOB, set(), {"ant"}, [])
    there, here = heard(links["north"], Steered), heard(links["coast"], Steered)
    assert (there.devices, there.tasks) == ({"ant": None}, {"ant": None})
    assert (here.devices, set(here.tasks)) == ({}, {"ant"})


def test_a_row_that_has_not_changed_is_not_sent_again(tier: Tier) -> None:
    tier.state.devices["ant"] = device("north")
    link = tier.join("north")
    heard(link, Steered)
    tier.state.devices["bee"] = device("north")
    tier.state.tasks |= {"ant": Task(1, (3,)), "bee": Task(1, (3,))}
    tier.dispatcher.route(JOB, set(), {"ant", "bee"}, [])
    found = heard(link, Steered)
    assert (set(found.devices), set(found.tasks)) == ({"bee"}, {"ant", "bee"})  # which is new there
    tier.dispatcher.route(JOB, {"ant"}, {"ant", "bee"}, [])
    found = heard(link, Steered)
    assert (set(found.devices), set(found.tasks)) == ({"ant"}, {"ant", "bee"})


def test_boards_and_events_of_an_aggregator_come_with_their_path(tier: Tier) -> None:
    link = tier.join("north")
    link.born(birth("ant"))
    link.born(birth("bee", 7), "valley")
    link.died("ant", 1)
    link.moved(JOB, {"bee": (3, 4)})
    events = (
        on.Extracted(3, "bee", 1, {}, "valley"),
        on.UpdateStored("bee", 3, 1, "b" * 64, "valley"),
        on.UpdateRejected("bee", 3, 1, "it isn't finite", region="valley"),
        on.OfferRefused("bee", 3, 1, "no room", region="valley"),
    )
    for event in events:
        link.report(JOB, event)
    assert tier.wait(BornBelow) == BornBelow("north", birth("ant"))
    assert tier.wait(BornBelow) == BornBelow("north/valley", birth("bee", 7))
    assert tier.wait(DiedBelow) == DiedBelow("north", "ant", 1)
    assert tier.wait(TrafficBelow) == TrafficBelow(JOB, {"bee": (3, 4)})
    for event in events:
        assert tier.wait(EventBelow) == EventBelow("north", JOB, replace(event, region="north/valley"))


@pytest.mark.parametrize("size", [0, 1, PIECE, 3 * PIECE + 7])
def test_blobs_come_from_the_parent_and_from_other_aggregators(tier: Tier, size: int) -> None:
    north, coast = tier.join("north"), tier.join("coast")
    mine, others = bytes(size), bytes(size) + b"x"
    assert north.fetch(JOB, tier.store.put(mine).sha256) == mine
    assert north.fetch(JOB, tier.stores["coast"].put(others).sha256) == others
    assert coast.fetch(JOB, "c" * 64) is None
    assert tier.connections.fetch(JOB, "coast/valley", BlobStore(tier.folder / "coast").put(others).sha256) == others
    # Nothing is on offer to others before whoever asked has stored it.
    assert not list((tier.folder / "landing").glob("??/*"))


@pytest.mark.parametrize("path", ["/x", "x//y", "..", "a b"])
def test_a_path_that_is_none_ends_the_connection(tier: Tier, path: str) -> None:
    tier.join("north").born(birth("ant"), path)
    assert tier.wait(RegionDown)
    assert not [item for item in tier.seen if isinstance(item, BornBelow)]


def test_a_blob_is_waited_for_until_its_aggregator_is_back_and_no_longer(tier: Tier) -> None:
    tier.connections._patience_s = 0.2
    started = time.monotonic()
    assert tier.connections.fetch(JOB, "north", "b" * 64) is None
    assert time.monotonic() - started < 5
    assert tier.connections.gone("north/valley")
    tier.connections._patience_s = 10.0
    assert not tier.connections.gone("north")
    digest = BlobStore(tier.folder / "north", durable=False).put(b"sums").sha256
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.append(tier.connections.fetch(JOB, "north", digest)))
    thread.start()
    tier.join("north")
    thread.join(10)
    assert found == [b"sums"]


def test_an_aggregator_is_asked_again_after_a_reconnection_until_it_has_answered(tier: Tier) -> None:
    order = do.AddUp(3, 77, MODEL, {}, ())
    answer = tier.connections.ask(JOB, "north", order)  # it isn't there yet
    link = tier.join("north")
    assert order in heard_commands(link)
    tier.links.pop().close()
    region = tier.wait(RegionDown).region
    assert tier.dispatcher.down(region)
    link = tier.join("north")
    assert order in heard_commands(link)
    link.report(JOB, on.AddedUp(3, 76))  # an answer to an earlier process
    link.report(JOB, on.AddedUp(3, 77, "b" * 64))
    assert answer.result(10) == on.AddedUp(3, 77, "b" * 64)


def heard_commands(link: ParentLink) -> tuple[do.Command, ...]:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if commands := heard(link, Steered).commands:
            return tuple(commands)
    raise AssertionError("no command came")


def let_in(tier: Tier, link: ParentLink) -> list[FedpruneError]:
    """Start an aggregator, which the parent lets in or refuses; returns its error."""
    errors = list[FedpruneError]()

    def start() -> None:
        try:
            link.start()
        except FedpruneError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    tier.dispatcher.up(tier.wait(RegionUp).region)
    thread.join(10)
    return errors


def test_another_aggregator_of_a_name_is_refused_for_now(tier: Tier) -> None:
    first = tier.join("north")
    second = tier.begin("north")
    second._landing = BlobStore(tier.folder / "elsewhere", durable=False)
    (error,) = let_in(tier, second)
    assert isinstance(error, BrokerError)  # with which a service starts again: the first may be about to end
    assert "another aggregator is connected as north" in str(error)
    assert first.connected
    assert first.fetch(JOB, tier.store.put(b"x").sha256) == b"x"


def test_another_process_of_an_aggregator_takes_its_place(tier: Tier) -> None:
    first = tier.join("north")
    second = tier.begin("north")
    assert let_in(tier, second) == []
    until(lambda: first._replaced is not None)
    with pytest.raises(OtherServerError, match="its state folder, or a copy of it, is connected as north"):
        first.collect()
    first._thread.join(10)
    assert not first._thread.is_alive()  # it doesn't connect again
    assert second.fetch(JOB, tier.store.put(b"x").sha256) == b"x"


def test_an_aggregator_that_comes_back_replaces_its_own_connection(tier: Tier) -> None:
    first, again = tier.join("north"), tier.begin("north")
    again._process = first._process
    assert let_in(tier, again) == []
    down = tier.wait(RegionDown)
    assert not tier.dispatcher.down(down.region)  # the later one stays
    assert tier.connections.names == ["north"]
    assert again.fetch(JOB, tier.store.put(b"x").sha256) == b"x"
    first.collect()  # which is not told to end


@pytest.mark.parametrize("side", ["parent", "aggregator"])
def test_a_connection_ends_with_either_side_though_the_aggregator_is_not_let_in_yet(tier: Tier, side: str) -> None:
    link = tier.begin("north")
    with pytest.raises(BrokerError, match="no parent answers"):
        link.start(patience_s=0.01)
    ended = tier.wait(RegionUp).region.channel
    (tier.connections if side == "parent" else link).close()
    until(lambda: ended.closed)


def test_another_version_is_refused(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "__version__", "0.0.1")
    with pytest.raises(BrokerError, match=f"it runs fedprune 0.0.1, and its parent {__version__}"):
        tier.begin("north").start()
    assert list(tier.connections.collect()) == []


def test_without_a_parent_an_aggregator_says_so(tier: Tier) -> None:
    link = tier.begin("north")
    tier.connections.close()
    with pytest.raises(BrokerError, match="no parent answers at ws://127"):
        link.start(patience_s=0.3)


def consume(socket: ClientConnection) -> None:
    while True:
        socket.recv(10)


@pytest.mark.parametrize(
    "messages",
    [
        ["no JSON"],
        ["{}"],
        ["[]"],
        [b"a piece of no blob"],
        ['{"kind": "born"}'],
        ['{"kind": "hello", "region": "a/b", "version": "1", "instance": "x", "process": "x"}'],
        ["HELLO", '{"kind": "steal"}'],
        ["HELLO", '{"kind": "born", "birth": "{}", "region": ""}'],
        ["HELLO", '{"kind": "event", "job": "job", "event": ["Closed", {}]}'],
        ["HELLO", '{"kind": "blob", "ref": {"sha256": "x", "size": 1, "leaves": "y"}}'],
        ["HELLO", '{"kind": "traffic", "job": "job", "devices": {"ant": [1]}}'],
        ["HELLO", '{"kind": "died", "device": "ant", "session": Infinity}'],
        ["HELLO", '{"kind": "died", "device": "ant", "session": "?"}'],
    ],
    ids=str,
)
def test_what_is_no_aggregator_is_cut_off_and_the_others_stay(tier: Tier, messages: list[str | bytes]) -> None:
    link = tier.join("north")
    hello = json.dumps({"kind": "hello", "region": "coast", "version": __version__, "instance": "x", "process": "x"})
    with connect(tier.url) as socket:
        for message in messages:
            socket.send(hello if message == "HELLO" else message)
        with pytest.raises(channel.ConnectionClosed):
            consume(socket)
    assert link.fetch(JOB, tier.store.put(b"x").sha256) == b"x"


def test_a_broken_connection_ends_what_waits_for_a_blob(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tier.join("north")
    asked = threading.Event()
    monkeypatch.setattr(tier.connections, "_search", lambda *_: asked.set())  # which never answers
    errors: list[Exception] = []

    def fetch() -> None:
        try:
            link.fetch(JOB, "c" * 64)
        except ParentLostError as error:
            errors.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert asked.wait(10)
    tier.connections.close()
    thread.join(10)
    assert len(errors) == 1


def test_an_aggregator_that_missed_the_end_of_a_job_is_told_with_its_reason(tier: Tier) -> None:
    tier.state.phase = Phase.FINISHED
    end = do.Finish(MODEL, "ended after round 3 of 9: the strategy ended the job")
    tier.dispatcher.route(JOB, set(), set(), [end])
    assert heard(tier.join("north"), Steered).commands == (end,)


def test_a_region_keeps_the_rows_of_boards_that_have_left_an_update_there(tier: Tier) -> None:
    tier.state.devices["ant"] = device("coast")
    tier.state.devices["ant"].past = {"weights": "b" * 64, "region": "north"}
    tier.state.devices["bee"] = device("coast")
    tier.state.devices["bee"].buffer = {"contribution": {"region": "north", "weights": "c" * 64}}
    found = heard(tier.join("north"), Steered)
    assert set(found.devices) == {"ant", "bee"}
    assert not any(d.online for d in found.devices.values())
    assert found.devices["ant"].past["weights"] == "b" * 64


def test_many_rows_come_in_several_messages_and_as_one(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_ROWS", 3)
    for k in range(10):
        tier.state.devices[f"d{k}"] = device("north")
    found = heard(tier.join("north"), Steered)
    assert found.whole
    assert set(found.devices) == {f"d{k}" for k in range(10)}


def test_too_many_connections_are_closed_at_once(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 3)
    link = tier.join("north")
    silent = [socket.create_connection(("127.0.0.1", tier.connections.port)) for _ in range(2)]
    with socket.create_connection(("127.0.0.1", tier.connections.port)) as one_more:
        one_more.settimeout(10)
        assert one_more.recv(1) == b""
    assert link.fetch(JOB, tier.store.put(b"x").sha256) == b"x"
    for connection in silent:
        connection.close()


def test_a_silent_peer_does_not_hold_the_loop_up(tier: Tier) -> None:
    hello = json.dumps({"kind": "hello", "region": "north", "version": __version__, "instance": "x", "process": "x"})
    with connect(tier.url, ping_interval=None) as silent:
        silent.send(hello)
        region = tier.wait(RegionUp).region
        tier.dispatcher.up(region)
        region.channel.give((JOB, tier.store.put(bytes(2**26)).sha256, ""))  # which it never reads
        time.sleep(0.5)
        started = time.monotonic()
        region.channel.close()
        assert time.monotonic() - started < 1


def test_an_aggregator_without_its_parent_does_not_say_that_a_blob_is_nowhere(tier: Tier) -> None:
    def lost(job: str, sha256: str) -> bytes | None:
        raise ParentLostError("the parent isn't connected")

    link = tier.join("north")
    tier.connections._above = lost
    with pytest.raises(ParentLostError):
        link.fetch(JOB, "c" * 64)


def test_a_server_that_cannot_read_a_blob_does_not_say_that_it_is_nowhere(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tier.join("north")
    digest, above = tier.stores["north"].put(b"sums").sha256, tier.store.put(b"ranks").sha256
    disk, ok = BlobStore.map, threading.Event()

    def read(store: BlobStore, sha256: str) -> memoryview:
        if not ok.is_set():
            raise StorageError("can't read it (Input/output error)")
        return disk(store, sha256)

    monkeypatch.setattr(BlobStore, "map", read)
    monkeypatch.setattr(connections, "_LOOK_S", 0.01)
    with pytest.raises(UnansweredError):
        link.fetch(JOB, above)
    assert tier.connections.fetch(JOB, "north", digest) is None  # however often it is asked
    threading.Timer(0.03, ok.set).start()
    assert tier.connections.fetch(JOB, "north", digest) == b"sums"
    assert link.fetch(JOB, above) == b"ranks"


def test_a_parent_finds_a_blob_below_an_aggregator(tier: Tier) -> None:
    link = tier.begin("north")
    link.serve(
        {JOB: tier.stores["north"]},
        lambda: None,
        lambda job, sha256, region: b"sums" if (job, region) == (JOB, "valley") else None,
    )
    thread = threading.Thread(target=link.start)
    thread.start()
    tier.dispatcher.up(tier.wait(RegionUp).region)
    thread.join(10)
    digest = BlobStore(tier.folder / "x").put(b"sums").sha256
    assert tier.connections.fetch(JOB, "north/valley", digest) == b"sums"
    assert tier.connections.fetch(JOB, "north/hill", digest) is None


class Held:
    """The aggregators below an aggregator, which have every blob, and wait before they give one."""

    def __init__(self, tier: Tier) -> None:
        self.may_go, self.asked = threading.Event(), list[str]()
        self.data = [str(number).encode() for number in range(parent._SEARCHES + 5)]
        store = BlobStore(tier.folder / "x", durable=False)
        self.blobs = {store.put(data).sha256: data for data in self.data}
        self.found: list[bytes | None] = []
        self._tier, self._threads = tier, list[threading.Thread]()
        link = tier.begin("north")
        link.serve({JOB: tier.stores["north"]}, lambda: None, self._below)
        threading.Thread(target=link.start).start()
        tier.dispatcher.up(tier.wait(RegionUp).region)

    def _below(self, job: str, sha256: str, region: str) -> bytes | None:
        self.asked.append(sha256)
        assert self.may_go.wait(10)
        return self.blobs[sha256]

    def fetch(self, sha256: str) -> None:
        def fetch() -> None:
            self.found.append(self._tier.connections.fetch(JOB, "north/valley", sha256))

        self._threads.append(threading.Thread(target=fetch))
        self._threads[-1].start()

    def until_asked(self, count: int) -> None:
        until = time.monotonic() + 10
        while len(self.asked) < count:
            assert time.monotonic() < until
            time.sleep(0.005)

    def end(self) -> None:
        self.may_go.set()
        for thread in self._threads:
            thread.join(10)


def test_one_blob_is_asked_of_two_regions_at_a_time(tier: Tier) -> None:
    link, answered = tier.join("north"), threading.Event()

    def below(job: str, sha256: str, region: str) -> bytes | None:
        if region == "hill":
            return b"sums"
        answered.wait(10)
        return None

    link.serve({}, lambda: None, below)
    digest = BlobStore(tier.folder / "other").put(b"sums").sha256
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.append(tier.connections.fetch(JOB, "north/valley", digest)))
    thread.start()
    assert tier.connections.fetch(JOB, "north/hill", digest) == b"sums"
    assert not found
    answered.set()
    thread.join()
    assert found == [None]


def test_an_aggregator_looks_for_so_many_blobs_at_a_time(tier: Tier) -> None:
    held = Held(tier)
    for digest in held.blobs:
        held.fetch(digest)
    held.until_asked(parent._SEARCHES)
    time.sleep(0.2)
    assert len(held.asked) == parent._SEARCHES
    held.end()
    assert sorted(held.found, key=repr) == sorted(held.data, key=repr)


def test_a_search_goes_on_while_its_parent_connects_again(tier: Tier) -> None:
    held = Held(tier)
    digest, data = next(iter(held.blobs.items()))
    held.fetch(digest)
    held.until_asked(1)
    (link,) = tier.links
    assert link._channel is not None
    link._channel.close()
    tier.dispatcher.down(tier.wait(RegionDown).region)
    tier.dispatcher.up(tier.wait(RegionUp).region)
    other = list(held.blobs)[1]
    held.fetch(other)
    held.until_asked(2)  # the new connection is in use
    time.sleep(0.2)
    assert held.asked == [digest, other]
    held.end()
    assert data in held.found


def test_an_aggregator_that_ends_does_not_say_that_a_blob_below_it_is_nowhere(tier: Tier) -> None:
    ends, asked = threading.Event(), threading.Event()

    def below(job: str, sha256: str, region: str) -> bytes | None:
        asked.set()
        if ends.is_set():
            return b"sums"
        raise ParentLostError("this server ends")

    link = tier.begin("north")
    link.serve({JOB: tier.stores["north"]}, lambda: None, below)
    thread = threading.Thread(target=link.start)
    thread.start()
    tier.dispatcher.up(tier.wait(RegionUp).region)
    thread.join(10)
    digest = BlobStore(tier.folder / "x").put(b"sums").sha256
    found: list[bytes | None] = []
    fetch = threading.Thread(target=lambda: found.append(tier.connections.fetch(JOB, "north/valley", digest)))
    fetch.start()
    assert asked.wait(10)
    assert found == []
    ends.set()
    fetch.join(10)
    assert found == [b"sums"]


def test_what_waits_for_an_aggregator_ends_with_the_server(tier: Tier) -> None:
    errors: list[Exception] = []

    def fetch() -> None:
        try:
            tier.connections.fetch(JOB, "north", "c" * 64)
        except ParentLostError as error:
            errors.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    tier.connections.close()
    thread.join(10)
    assert len(errors) == 1


def said(region: str, instance: str) -> str:
    hello = {"kind": "hello", "region": region, "version": __version__, "instance": instance, "process": instance}
    return json.dumps(hello)


def born(name: str) -> str:
    return json.dumps({"kind": "born", "birth": birth(name).to_bytes().decode(), "region": ""})


def handled(tier: Tier, count: int) -> list[Item]:
    """Items that the loop handles once so many wait, apart from connections."""
    until, found = time.monotonic() + 10, list[Item]()
    while tier.connections._items.qsize() < count:
        assert time.monotonic() < until
        time.sleep(0.005)
    for item in tier.connections.collect():
        match item:
            case RegionUp():
                tier.dispatcher.up(item.region)
            case RegionDown():
                tier.dispatcher.down(item.region)
            case _:
                found.append(item)
    return found


@pytest.mark.parametrize("instance", ["same", "another"])
def test_events_of_a_connection_that_was_replaced_or_refused_are_dropped(tier: Tier, instance: str) -> None:
    queue = tier.connections._items
    with connect(tier.url) as first, connect(tier.url) as second:
        first.send(said("north", "same"))
        assert handled(tier, 1) == []
        stale, latest = (first, second) if instance == "same" else (second, first)
        second.send(said("north", instance))
        for count, (peer, name) in enumerate(((stale, "ant"), (latest, "bee")), 1):
            until(lambda count=count: queue.qsize() >= count)
            peer.send(born(name))
        assert handled(tier, 3) == [BornBelow("north", birth("bee"))]
        assert tier.connections.names == ["north"]


def test_a_server_that_was_away_does_not_wait_twice_for_aggregators_that_do_not_come_back(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now[0]))
    regions = tier.connections
    regions._patience_s = 3600.0
    regions.expect(["north", "coast"])
    regions.waited(3000.0)
    now[0] += 599.0
    assert regions.given_up() == []
    now[0] += 2.0
    assert sorted(regions.given_up()) == ["coast", "north"]
    assert regions.given_up() == []
    regions.expect(["valley"])
    regions.waited(5000.0)  # it has the time to connect again
    now[0] += 59.0
    assert regions.given_up() == []
    regions.waited(0.0)
    now[0] += 2.0
    assert regions.given_up() == ["valley"]


def test_an_aggregator_is_told_how_long_it_was_away(tier: Tier) -> None:
    assert heard(tier.join("north"), ParentUp).away_s == 0.0
    tier.links.pop().close()
    assert tier.dispatcher.down(tier.wait(RegionDown).region)
    tier.connections._away["north"] -= 100.0
    assert 100.0 <= heard(tier.join("north"), ParentUp).away_s < 110.0


def test_an_aggregator_that_is_away_is_named_as_long_as_boards_are_its_own(tier: Tier) -> None:
    now = 1_800_000_000.0
    tier.state.devices["ant"], tier.state.devices["bee"] = device("north/valley"), device("coast")
    link = tier.join("north")
    assert link.lost_since is None
    assert tier.dispatcher.lost(now) == []
    link.close()
    tier.dispatcher.down(tier.wait(RegionDown).region)
    (found,) = tier.dispatcher.lost(now)
    assert (found.name, found.boards, found.waited) == ("north", 1, False)
    assert now - 5 < found.since <= now
    assert tier.connections.connected() == {"north": False}
    tier.connections._patience_s = 0.0
    (found,) = tier.dispatcher.lost(now)
    assert found.waited
    tier.state.devices["ant"].region = "coast"  # its boards have moved
    assert tier.dispatcher.lost(now + 11) == []
    tier.state.devices["ant"].region = "north"
    tier.state.phase = Phase.FINISHED
    assert tier.dispatcher.lost(now + 22) == []


def test_changed_jobs_are_noticed(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "FIRST_S", 0.01)
    link = tier.join("north")
    assert not link.outdated
    known = tier.dispatcher._jobs[JOB]
    tier.dispatcher._jobs = {JOB: replace(known, about={**known.about, "name": "other"})}
    next(iter(tier.connections._regions.values())).channel.close()
    tier.dispatcher.up(tier.wait(RegionUp).region)
    until = time.monotonic() + 10
    while not link.outdated and time.monotonic() < until:
        time.sleep(0.01)
    assert link.outdated
