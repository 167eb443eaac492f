"""Orders about boards and releases, carried out on a server's real identity folder."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ProtocolError
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.wire.fleet_messages import COMMITTED, ReleaseReport
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import Situation
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.open_database import open_database
from fedprune_server.web.state.membership_poller import Member, MembershipPoller, PollResult
from fedprune_server.web.state.order_handler import MAX_WAITING_ORDERS, AdminExecutor
from fedprune_server.web.state.order_queue import EXPIRED, Order, OrderAnswer
from support.fakes.members import member_certificate, serials_of
from support.fakes.runtime_releases import make_release
from support.waiting import until

ANSWERS: queue.Queue[OrderAnswer] = queue.Queue()
"""What executors answer; each test takes all."""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    IdentityFolder.make(tmp_path / "state", "lab").close()
    return tmp_path / "state"


@pytest.fixture
def executor(state: Path, tmp_path: Path) -> Iterator[AdminExecutor]:
    (tmp_path / "releases").mkdir()
    executor = AdminExecutor(state, tmp_path / "releases", ANSWERS.put)
    yield executor
    executor.close()


def send_order(executor: AdminExecutor, kind: str, **fields: str) -> OrderAnswer:
    executor.submit(Order(1, "ann", kind, 1e12, **fields))  # type: ignore[arg-type]
    return ANSWERS.get(timeout=30)


def asks(state: Path, device: str) -> VerifyingKey:
    """A board asks to be let in, and waits."""
    key = SigningKey.make().verifying_key
    with IdentityFolder(state) as identity:
        identity.store.request_approval(device, key.hex, int(time.time()))
    return key


def test_a_board_is_let_in_by_the_fingerprint_that_it_shows_and_by_no_other(
    state: Path, executor: AdminExecutor
) -> None:
    key, other_key = asks(state, "attic"), asks(state, "attic")
    with open_database(state, read_only=True) as database:
        store = IdentityStore(database)
        poller = MembershipPoller(store)
        assert poller.latest() == PollResult(frozenset({"attic"}), None, ())
        wrong = send_order(executor, "approve", device="attic", key="0000-0000-0000-0000")
        assert (wrong.ok, "no key with this fingerprint waits as attic" in wrong.text) == (False, True)
        assert store.members() == {}
        right = send_order(executor, "approve", device="attic", key=f" {key.fingerprint.upper()}")
        assert (right.ok, right.text) == (True, f"attic is approved with key {key.fingerprint}")
        assert set(store.members()) == {"attic"}
        poller.latest()
        assert poller.member("attic") == Member("member")
    assert not send_order(executor, "approve", device="attic", key=key.fingerprint).ok, "it waits no longer"
    assert other_key.fingerprint != key.fingerprint


def test_a_board_is_turned_away_and_one_that_is_in_stays(state: Path, executor: AdminExecutor) -> None:
    assert send_order(executor, "approve", device="attic", key=asks(state, "attic").fingerprint).ok
    asks(state, "attic")
    assert send_order(executor, "deny", device="attic").text == "attic: 1 key turned away"
    assert not send_order(executor, "deny", device="attic").ok
    with IdentityFolder(state) as identity:
        assert set(identity.store.members()) == {"attic"}


def test_a_board_that_is_shut_out_has_no_key_and_no_certificate_any_more(state: Path, executor: AdminExecutor) -> None:
    with IdentityFolder(state) as identity:
        member_certificate(identity, "attic")
    answer = send_order(executor, "revoke", device="attic")
    assert (answer.ok, answer.text.startswith("attic: 1 key and 1 certificate revoked")) == (True, True)
    with IdentityFolder(state) as identity:
        assert identity.store.members() == {}
        assert identity.store.revoked_certificates().keys() == serials_of(state, "attic")
        assert identity.authority.is_list_current(identity.store.revoked_certificates())
    assert not send_order(executor, "revoke", device="nobody").ok


def test_rollouts_are_begun_paused_resumed_and_taken_back(state: Path, executor: AdminExecutor, tmp_path: Path) -> None:
    assert send_order(executor, "approve", device="attic", key=asks(state, "attic").fingerprint).ok
    with IdentityFolder(state) as identity:
        for number in (1, 2, 8):
            make_release(tmp_path / "releases" / f"release-{number}", number, key=identity.key)
    with RolloutStore(state) as store, RolloutStore(state) as reader:

        def alerts() -> list[tuple[str, str]]:
            facts = replace(site_facts(state, {}), disk=None, certificates=())
            return [(a.kind, a.what) for a in evaluate_alerts(Situation(state, site=facts), time.time())]

        def row(*, server: bool = False) -> dict[str, Any]:
            """What is told, once a server that was restarted has looked."""
            if server:
                RolloutCoordinator(store, lambda *_: None).on_connection_change(True)
            answer = MembershipPoller(rollouts=reader).latest()
            assert answer is not None
            latest, *_ = answer.rollouts or ()
            return latest

        def has(number: int) -> None:
            desk = RolloutCoordinator(store, lambda *_: None)
            desk.on_connection_change(True)
            desk.on_report(ReleaseReport("attic", number, COMMITTED, "", 0, 0))

        assert send_order(executor, "rollout_start", release="release-1").ok
        has(1)
        assert send_order(executor, "rollout_start", release="release-2").ok
        assert send_order(executor, "rollout_pause").ok
        assert row()["state"] == "pausing"
        assert (row(server=True)["state"], row()["why"]) == ("paused", "paused: by ann")
        assert alerts() == [("rollout-paused", "the rollout of release 2 is paused: by ann")]
        assert send_order(executor, "rollout_resume").ok
        assert row()["state"] == "resuming"
        assert not send_order(executor, "rollout_resume").ok
        assert row(server=True)["state"] == "running"
        assert alerts() == []
        has(2)
        assert (row()["state"], row()["before"], row()["subject"]) == ("done", "1 (0.1.0)", 2)
        for release in ("1", "release-2", "2" * 30):
            assert not send_order(executor, "rollout_back", release=release).ok
        answer = send_order(executor, "rollout_back", release="2")
        assert (answer.ok, "as release 9, for 1 board" in answer.text) == (True, True), "release-8 keeps its number"
        assert (row()["leaves"], row()["before"]) == (2, None)
        assert not send_order(executor, "rollout_back", release="2").ok, "clicked twice"
        assert send_order(executor, "rollout_stop").ok
        assert (row()["state"], row(server=True)["state"]) == ("stopping", "stopped")
        assert [kind for kind, _ in alerts()] == ["rollout"]


# The thread: no order ends it, and none waits forever.


class Scripted(AdminExecutor):
    """An executor whose orders come to what it is told."""

    def __init__(self, folder: Path, outcome: Callable[[Order], str], clock: Callable[[], float] = time.time) -> None:
        super().__init__(folder, None, ANSWERS.put, clock)
        self._come_to = outcome

    def carry_out(self, order: Order) -> str:
        return self._come_to(order)


def test_whatever_comes_of_an_order_is_answered(tmp_path: Path) -> None:
    def outcome(order: Order) -> str:
        if order.number == 2:
            raise ValueError("a bug")
        return f"{order.number}" + "x" * 5000

    with closing(Scripted(tmp_path, outcome)) as executor:
        for number in (1, 2, 3):
            executor.submit(Order(number, "ann", "deny", 1e12, device="a"))
        first, second, third = (ANSWERS.get(timeout=30) for _ in range(3))
    assert (first, second.ok, third) == (
        OrderAnswer(1, True, "1" + "x" * 5000),
        False,
        OrderAnswer(3, True, "3" + "x" * 5000),
    )


def test_an_order_that_waited_too_long_behind_others_is_not_carried_out(tmp_path: Path) -> None:
    now = [5.0]

    def outcome(order: Order) -> str:
        now[0] += 600.0
        return "well"

    with closing(Scripted(tmp_path, outcome, lambda: now[0])) as executor:
        for number in (1, 2):
            executor.submit(Order(number, "ann", "revoke", 600.0, device="a"))
        answers = [ANSWERS.get(timeout=30), ANSWERS.get(timeout=30)]
    assert answers == [OrderAnswer(1, True, "well"), OrderAnswer(2, False, EXPIRED)]
    assert now == [605.0]


def test_no_more_orders_wait_than_can_be_carried_out(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def outcome(order: Order) -> str:
        begun.set()
        go_on.wait(30)
        return "well"

    executor, order = Scripted(tmp_path, outcome), Order(1, "ann", "deny", 1e12, device="a")
    executor.submit(order)
    assert begun.wait(30)
    for _ in range(MAX_WAITING_ORDERS):
        executor.submit(order)
    with pytest.raises(ProtocolError, match=str(MAX_WAITING_ORDERS)):
        executor.submit(order)
    ending = threading.Thread(target=executor.close)
    ending.start()
    until(lambda: executor._is_closed)
    go_on.set()
    ending.join(30)
    assert ANSWERS.get(timeout=30).ok
    assert ANSWERS.empty()  # those that waited are not begun any more
