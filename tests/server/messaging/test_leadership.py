"""Servers of one identity on one topic: which of them serves, and what can't make another one end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import EpochFile, unseal
from fedprune.wire.fleet_messages import ServerPresence, ServerQuery
from fedprune.wire.messages import parse
from fedprune.wire.queues import ConnectionUp, Event
from fedprune.wire.topics import Topics
from fedprune_server.messaging import leadership
from fedprune_server.messaging.leadership import SETTLED_S, Leadership, OtherServerError, ServerInstance
from support.waiting import until

pytestmark = pytest.mark.soak

TOPIC = Topics("lab").servers()
KEY = SigningKey.make()


class Hub:
    """A broker of one topic."""

    def __init__(self) -> None:
        self.ends: list[End] = []
        self.said: list[bytes] = []
        self.news = threading.Condition()

    def settle(self) -> None:
        """Wait until everything published has been handled, answers included."""
        with self.news:
            assert self.news.wait_for(lambda: all(end.idle for end in self.ends if end.connected), 30)

    def publish(self, payload: bytes) -> None:
        self.said.append(payload)
        for end in self.ends:
            if end.connected:
                end.put((TOPIC, payload))


class End:
    """A connection to a hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._items, self._news = hub, deque[tuple[str, bytes] | Event](), hub.news
        self._waits = False
        self.connected, self.trouble = False, ""

    @property
    def idle(self) -> bool:
        """Whether its reader has handled all that came; ask under the hub's lock."""
        return self._waits and not self._items

    def subscribe(self, topics: list[str]) -> None:
        assert topics == [TOPIC]

    def start(self, timeout: float = 0.0, *, patient: bool = False) -> None:
        assert patient
        self._hub.ends.append(self)
        self.connect()

    def connect(self) -> None:
        self.connected = True
        self.put(ConnectionUp())

    def put(self, item: tuple[str, bytes] | Event) -> None:
        with self._news:
            self._items.append(item)
            self._news.notify_all()

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        assert topic == TOPIC
        if self.connected:
            self._hub.publish(payload)
        return self.connected

    def get(self, timeout: float | None = None) -> tuple[str, bytes] | Event | None:
        with self._news:
            self._waits = True
            self._news.notify_all()
            self._news.wait_for(lambda: bool(self._items), timeout)
            self._waits = False
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        self.connected = False


class Lab:
    def __init__(self, folder: Path) -> None:
        self.folder, self.hub = folder, Hub()
        self.now = 100.0
        self.made: list[Leadership] = []

    def server(
        self, name: str, *, key: SigningKey = KEY, stopping: threading.Event | None = None, **more: Any
    ) -> tuple[Leadership, End, EpochFile]:
        end = End(self.hub)
        made = Leadership(end, "lab", key, ServerInstance(self.folder / name, **more), stopping, clock=lambda: self.now)
        # Answers are awaited until all have come, not for a time that a busy machine may exceed.
        made._closed.wait = lambda timeout=None: bool(self.hub.settle())  # type: ignore[method-assign]
        self.made.append(made)
        return made, end, EpochFile(self.folder / name, lambda: float(len(self.made)))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    for server in made.made:
        server.close()


def superseded(server: Leadership) -> bool:
    try:
        server.confirm()
    except OtherServerError:
        return True
    return False


def serving(lab: Lab, name: str, **more: Any) -> tuple[Leadership, End, EpochFile]:
    server, end, epochs = lab.server(name, **more)
    server.enter(epochs, take_over=False)
    return server, end, epochs


def test_a_second_server_is_refused_and_one_that_takes_over_ends_the_first(lab: Lab) -> None:
    lost = threading.Event()
    first, _, epochs = serving(lab, "first", stopping=lost)
    second, _, later = lab.server("second")
    with pytest.raises(OtherServerError, match=r"another server runs this fleet: on .*first, since"):
        second.enter(later, take_over=False)
    assert not superseded(first)
    second.enter(later, take_over=True)
    assert lost.wait(20)
    with pytest.raises(OtherServerError, match=r"has taken this fleet over: on .*second, since"):
        first.confirm()
    assert not superseded(second)
    assert later.next() > epochs.written  # boards take what it says for later


def test_a_server_whose_broker_would_end_with_it_is_not_replaced(lab: Lab) -> None:
    first, _, _ = serving(lab, "first", embedded=True)
    for take_over in (False, True):
        second, _, later = lab.server("second")
        with pytest.raises(OtherServerError, match="The broker is part of that server and ends with it"):
            second.enter(later, take_over=take_over)
    assert not superseded(first)


def places(server: Leadership) -> list[tuple[str, bool]]:
    return [(Path(c.folder).name, c.leads) for c in server.candidates()]


def test_a_server_knows_who_else_was_started_and_who_replaced_it(lab: Lab) -> None:
    first, _, _ = serving(lab, "first")
    assert lab.server("doctor", looks_only=True)[0].others()
    assert places(first) == []
    second, _, later = lab.server("second")
    with pytest.raises(OtherServerError):
        second.enter(later, take_over=False)
    assert places(first) == [("second", False)]
    (before,) = first.candidates()
    lab.server("second")[0].others()
    (after,) = first.candidates()
    assert after.since == before.since < after.heard_at
    third, _, last = lab.server("third")
    third.enter(last, take_over=True)
    until(lambda: places(first) == [("second", False), ("third", True)])
    lab.hub.settle()
    assert places(third) == []  # the one that it replaced is no news


def test_candidates_are_bounded_and_those_of_the_same_lease_are_none(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leadership, "_CANDIDATES", 2)
    first, _, _ = serving(lab, "first", lease="ab" * 16)
    lab.server("standby", lease="ab" * 16)
    for name in ("a", "b", "c"):
        lab.server(name)[0].others()
    assert places(first) == [("b", False), ("c", False)]


def test_a_server_that_answers_no_more_keeps_nobody_from_starting(lab: Lab) -> None:
    first, end, _ = serving(lab, "first")
    old = [raw for raw in lab.hub.said if isinstance(parse(unseal(KEY.verifying, TOPIC, raw).body), ServerQuery)]
    lab.server("asks")[0].others()
    answer = next(r for r in lab.hub.said if isinstance(parse(unseal(KEY.verifying, TOPIC, r).body), ServerPresence))
    end.close()
    second, _, later = lab.server("second")
    for raw in (answer, *old):  # repeated by a listener
        lab.hub.publish(raw)
    second.enter(later, take_over=False)
    lab.hub.publish(answer)
    assert not superseded(second)
    assert not superseded(first)


def test_one_that_was_cut_off_yields_to_a_server_that_has_served_for_long(lab: Lab) -> None:
    first, end, _ = serving(lab, "first")
    end.connected = False
    second, _, _ = serving(lab, "second")
    lab.now += 2 * SETTLED_S
    end.connect()
    until(lambda: superseded(first))
    assert not superseded(second)


def test_one_that_has_just_started_yields_to_a_server_that_was_only_slow(lab: Lab) -> None:
    first, end, _ = serving(lab, "first")
    lab.now += 2 * SETTLED_S
    end.connected = False
    second, _, _ = serving(lab, "second")
    end.connect()
    until(lambda: superseded(second))
    assert not superseded(first)


def test_two_that_start_at_once_become_one(lab: Lab) -> None:
    servers = [lab.server(name) for name in ("first", "second")]
    for server, _, epochs in servers:
        server.enter(epochs, take_over=False, alone=True)
    until(lambda: any(superseded(s) for s, _, _ in servers))
    lab.hub.settle()
    assert sum(superseded(s) for s, _, _ in servers) == 1


def test_between_servers_of_one_database_its_lease_decides(lab: Lab) -> None:
    first, _, _ = serving(lab, "first", lease="ab" * 16)
    second, _, _ = serving(lab, "second", lease="ab" * 16)
    assert second.others() == []
    lab.now += 2 * SETTLED_S
    other, _, epochs = lab.server("other", lease="cd" * 16)
    with pytest.raises(OtherServerError):
        other.enter(epochs, take_over=False)
    assert not superseded(first)
    assert not superseded(second)


def test_a_server_of_another_identity_is_not_believed(lab: Lab) -> None:
    first, _, _ = serving(lab, "first")
    lab.now += 2 * SETTLED_S
    stranger, _, epochs = lab.server("stranger", key=SigningKey.make())
    stranger.enter(epochs, take_over=True)
    lab.hub.settle()
    assert not superseded(first)
    assert not superseded(stranger)


def test_a_flood_on_the_servers_topic_costs_a_few_signature_checks_a_second(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []
    monkeypatch.setattr(leadership, "unseal", lambda key, topic, raw: (checked.append(raw), unseal(key, topic, raw))[1])
    first, end, _ = serving(lab, "first")
    for _ in range(1000):
        lab.hub.publish(b"nonsense")
    until(lambda: not end._items)
    assert 0 < checked.count(b"nonsense") <= 20
    lab.now += 1
    other, _, epochs = lab.server("other")
    with pytest.raises(OtherServerError):
        other.enter(epochs, take_over=False)
    assert not superseded(first)


def test_a_broker_that_keeps_servers_apart_is_named(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lab.hub, "publish", lambda _payload: None)
    monkeypatch.setattr(leadership, "_CONNECT_S", 0.0)
    serving(lab, "first")
    assert "can't be seen" in caplog.text
    assert "broker-config" in caplog.text
