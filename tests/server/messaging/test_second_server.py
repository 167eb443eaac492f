"""Servers of one identity on one topic: which of them serves, and what can't make another one end."""

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.security.signed_envelope import SignedEnvelope, unseal
from fedprune.wire.fleet_messages import ServerPresence, ServerQuery
from fedprune.wire.messages import Message, parse_message
from fedprune.wire.queues import ConnectionUp, Event
from fedprune.wire.topics import Topics
from fedprune_server.messaging import second_server
from fedprune_server.messaging.second_server import ASK_INTERVAL_S, OtherServerError, SecondServerGuard, ServerInstance
from support.waiting import until

TOPIC = Topics("lab").servers()
KEY = SigningKey.make()


class Hub:
    """A broker of one topic."""

    def __init__(self) -> None:
        self.ends: list[End] = []
        self.published: list[bytes] = []
        self.news = threading.Condition()

    def settle(self) -> None:
        """Wait until everything published has been handled, answers included."""
        with self.news:
            assert self.news.wait_for(lambda: all(end.idle for end in self.ends if end.connected), 30)

    def publish(self, payload: bytes) -> None:
        self.published.append(payload)
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
        self.guards: list[SecondServerGuard] = []

    def server(
        self, name: str, *, key: SigningKey = KEY, stopping: threading.Event | None = None, **fields: Any
    ) -> tuple[SecondServerGuard, End]:
        end = End(self.hub)
        instance = ServerInstance(self.folder / name, **fields)
        guard = SecondServerGuard(end, "lab", key, instance, stopping, clock=lambda: self.now)
        # Answers are awaited until all have come, not for a time that a busy machine may exceed.
        guard._closed.wait = lambda timeout=None: bool(self.hub.settle())  # type: ignore[method-assign]
        self.guards.append(guard)
        return guard, end

    def serving(self, name: str, **fields: Any) -> tuple[SecondServerGuard, End]:
        """A server that serves, and whose question is long past."""
        server, end = self.server(name, **fields)
        server.enter()
        self.now += 2
        return server, end


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for server in lab.guards:
        server.close()


def opened_message(raw: bytes) -> Message:
    return parse_message(unseal(KEY.verifying_key, TOPIC, raw).body)


def is_refused(server: SecondServerGuard) -> bool:
    try:
        server.enter()
    except OtherServerError:
        return True
    return False


def has_to_end(server: SecondServerGuard) -> bool:
    try:
        server.confirm()
    except OtherServerError:
        return True
    return False


def test_a_second_server_is_refused_and_the_first_goes_on(lab: Lab) -> None:
    first, _ = lab.serving("first")
    for _ in range(3):
        second, end = lab.server("second")
        with pytest.raises(OtherServerError, match="first"):
            second.enter()
        end.close()
    assert not has_to_end(first)


def test_who_only_looks_finds_a_server_and_answers_none(lab: Lab) -> None:
    doctor, _ = lab.server("doctor", only_looks=True)
    lab.hub.settle()
    first, _ = lab.serving("first")
    assert [Path(o.folder).name for o in lab.server("doctor", only_looks=True)[0].others()] == ["first"]
    assert not has_to_end(first)
    assert doctor.others() == []  # it asked before


def test_at_a_server_s_own_broker_all_others_give_way(lab: Lab) -> None:
    lab.server("early")  # there before the broker's server has begun to serve
    first, _ = lab.server("first", owns_broker=True)
    third, _ = lab.server("third")
    first.enter()
    assert is_refused(third)
    second_again, _ = lab.server("second")
    assert is_refused(second_again)
    assert not has_to_end(first)


def test_a_server_that_answers_no_more_keeps_nobody_from_starting(lab: Lab) -> None:
    first, end = lab.serving("first")
    old = [raw for raw in lab.hub.published if isinstance(opened_message(raw), ServerQuery)]
    lab.server("asks", only_looks=True)[0].others()
    answer = next(raw for raw in lab.hub.published if isinstance(opened_message(raw), ServerPresence))
    end.close()
    second, _ = lab.server("second")
    for raw in (answer, *old):  # repeated by a listener
        lab.hub.publish(raw)
    second.enter()
    lab.hub.publish(answer)
    lab.hub.settle()
    assert not has_to_end(second)
    assert not has_to_end(first)


def test_one_that_was_cut_off_gives_way_to_the_one_that_serves(lab: Lab) -> None:
    stopping = threading.Event()
    first, end = lab.serving("first", stopping=stopping)
    end.connected = False
    second, _ = lab.serving("second")
    end.connect()
    assert stopping.wait(20)
    with pytest.raises(OtherServerError, match="second"):
        first.confirm()
    lab.hub.settle()
    assert not has_to_end(second)


@pytest.mark.parametrize("number", range(3))  # ids are random: each may be the smaller one
def test_one_that_comes_back_while_another_begins_stays(lab: Lab, number: int) -> None:
    first, end = lab.serving("first")
    end.connected = False
    second, _ = lab.server("second")
    lab.hub.settle()
    end.connect()
    lab.hub.settle()
    assert is_refused(second)
    assert not has_to_end(first)


def test_of_two_that_start_at_once_one_stays(lab: Lab) -> None:
    servers = [lab.server(name)[0] for name in ("first", "second")]
    assert sorted(map(is_refused, servers)) == [False, True]
    lab.hub.settle()
    assert not any(map(has_to_end, servers))


def test_between_servers_of_one_database_its_lease_decides(lab: Lab) -> None:
    first, _ = lab.serving("first", lease="ab" * 16)
    second, _ = lab.serving("second", lease="ab" * 16)
    assert second.others() == []
    assert is_refused(lab.server("other", lease="cd" * 16)[0])
    assert not has_to_end(first)
    assert not has_to_end(second)


def test_a_server_of_another_identity_is_not_believed(lab: Lab) -> None:
    first, end = lab.serving("first")
    stranger, _ = lab.serving("stranger", key=SigningKey.make())
    end.connected = False
    end.connect()
    lab.hub.settle()
    assert not has_to_end(first)
    assert not has_to_end(stranger)


def test_a_flood_on_the_servers_topic_costs_a_few_signature_checks_a_second(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []

    def check(key: VerifyingKey, topic: str, raw: bytes) -> SignedEnvelope:
        checked.append(raw)
        return unseal(key, topic, raw)

    monkeypatch.setattr(second_server, "unseal", check)
    first, end = lab.serving("first")
    for _ in range(1000):
        lab.hub.publish(b"nonsense")
    until(lambda: not end._items)
    assert 0 < checked.count(b"nonsense") <= 20
    lab.now += 1
    assert is_refused(lab.server("other")[0])
    assert not has_to_end(first)


def test_two_that_were_parted_without_losing_a_connection_find_each_other(lab: Lab) -> None:
    _, end = lab.serving("first")
    end.connected = False
    lab.serving("second")
    end.connected = True  # as after a bridge between two brokers has come back
    lab.hub.settle()
    assert not any(map(has_to_end, lab.guards))
    lab.now += ASK_INTERVAL_S
    until(lambda: any(map(has_to_end, lab.guards)))
    lab.hub.settle()
    assert sorted(map(has_to_end, lab.guards)) == [False, True]
