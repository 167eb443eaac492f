"""Orders about who is let in and about releases, carried out on a server's real identity folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.security.certificates import make_request, make_tls_key
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.wire.fleet_messages import COMMITTED, ReleaseReport
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.monitoring.alerts import Snapshot, evaluate
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.ota.store import RolloutStore
from fedprune_server.web.state.admin_executor import AdminExecutor
from fedprune_server.web.state.order_queue import Answer, Order
from fedprune_server.web.state.surroundings import Member, Members, ReleaseWatch, SurroundingsPoller
from support.fakes.runtime_releases import make_release


@pytest.fixture
def state(tmp_path: Path) -> Path:
    IdentityFolder.make(tmp_path / "state", "lab").close()
    return tmp_path / "state"


@pytest.fixture
def executor(state: Path, tmp_path: Path) -> Iterator[AdminExecutor]:
    (tmp_path / "releases").mkdir()
    made = AdminExecutor(state, tmp_path / "releases")
    yield made
    made.close()


def ordered(executor: AdminExecutor, kind: str, **fields: str) -> Answer:
    """The answer to an order."""
    executor.submit(Order(1, "ann", kind, **fields))  # type: ignore[arg-type]
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for answer in executor.answers():
            return answer
        time.sleep(0.005)
    raise TimeoutError


def asks(state: Path, device: str) -> VerifyingKey:
    """A board asks to be let in, and waits."""
    key = SigningKey.make().verifying
    with IdentityFolder(state) as identity:
        identity.store.ask(device, key.hex, int(time.time()))
    return key


def test_a_board_is_let_in_by_the_fingerprint_that_it_shows_and_by_no_other(
    state: Path, executor: AdminExecutor
) -> None:
    key, other = asks(state, "attic"), asks(state, "attic")
    with closing(IdentityStore(state / "identity" / "identity.db", read_only=True)) as store:
        members = Members(store)
        assert members.look() == {"attic"}
        wrong = ordered(executor, "approve", device="attic", key="0000-0000-0000-0000")
        assert (wrong.ok, "no key with this fingerprint waits as attic" in wrong.text) == (False, True)
        assert store.members() == {}
        right = ordered(executor, "approve", device="attic", key=f" {key.fingerprint.upper()}")
        assert (right.ok, right.text) == (True, f"attic is let in with key {key.fingerprint}")
        assert set(store.members()) == {"attic"}
        members.look()
        assert members.status("attic") == Member("member")
    assert not ordered(executor, "approve", device="attic", key=key.fingerprint).ok, "it waits no longer"
    assert other.fingerprint != key.fingerprint


def test_a_board_at_an_earlier_signing_key_is_known_to_be(state: Path, executor: AdminExecutor) -> None:
    key = asks(state, "attic")
    assert ordered(executor, "approve", device="attic", key=key.fingerprint).ok
    with IdentityFolder(state) as identity:
        earlier = identity.key.verifying.id.hex()
        identity.rotate()
        members = Members(identity.store, identity.behind)
        for known, behind in ((earlier, "signing key"), (identity.key.verifying.id.hex(), None)):
            with IdentityFolder(state) as other:  # another connection, as the server's
                other.store.hear([], [(key.hex, known, identity.authority.pins[-1].hex())])
            members.look()
            assert members.status("attic") == Member("member", None, behind)


def test_a_board_is_turned_away_and_one_that_is_in_stays(state: Path, executor: AdminExecutor) -> None:
    key = asks(state, "attic")
    assert ordered(executor, "approve", device="attic", key=key.fingerprint).ok
    asks(state, "attic")
    assert ordered(executor, "deny", device="attic").text == "attic: 1 key turned away"
    assert not ordered(executor, "deny", device="attic").ok
    with IdentityFolder(state) as identity:
        assert set(identity.store.members()) == {"attic"}


def test_a_board_that_is_shut_out_has_no_key_and_no_certificate_any_more(state: Path, executor: AdminExecutor) -> None:
    key = asks(state, "attic")
    assert ordered(executor, "approve", device="attic", key=key.fingerprint).ok
    with IdentityFolder(state) as identity:
        identity.authority.issue_device("lab", "attic", make_request(make_tls_key(), "attic"))
        (issued,) = identity.authority.of_device("attic")
    told = ordered(executor, "revoke", device="attic")
    assert (told.ok, told.text.startswith("attic: 1 key and 1 certificate revoked")) == (True, True)
    with IdentityFolder(state) as identity:
        assert identity.store.members() == {}
        assert identity.authority.is_revoked(issued.serial)
        assert identity.authority.crl_is_right()
    assert not ordered(executor, "revoke", device="nobody").ok


def test_rollouts_are_begun_paused_resumed_and_taken_back(state: Path, executor: AdminExecutor, tmp_path: Path) -> None:
    key = asks(state, "attic")
    assert ordered(executor, "approve", device="attic", key=key.fingerprint).ok
    with IdentityFolder(state) as identity:
        for number in (1, 2, 8):
            make_release(tmp_path / "releases" / f"release-{number}", number, key=identity.key)
    with RolloutStore(state) as store, RolloutStore(state) as seen:

        def alerts() -> list[tuple[str, str]]:
            facts = replace(site_facts(state, {}), disk=None, certificates=())
            return [(a.kind, a.what) for a in evaluate(Snapshot(state, site=facts), time.time())]

        def row(*, server: bool = False) -> dict[str, Any]:
            """What is told, once a server that was started anew has looked."""
            if server:
                RolloutCoordinator(store, lambda *_: None).connected(True)
            told = SurroundingsPoller(releases=ReleaseWatch(seen)).look()
            found, *_ = told.rollouts or ()
            return found

        def has(number: int) -> None:
            desk = RolloutCoordinator(store, lambda *_: None)
            desk.connected(True)
            desk.reported(ReleaseReport("attic", number, COMMITTED, "", 0, 0))

        assert ordered(executor, "rollout_start", release="release-1").ok
        has(1)
        assert ordered(executor, "rollout_start", release="release-2").ok
        assert ordered(executor, "rollout_pause").ok
        assert row()["state"] == "pausing"
        assert (row(server=True)["state"], row()["why"]) == ("paused", "paused: by ann")
        assert alerts() == [("rollout-paused", "the rollout of release 2 is paused: by ann")]
        assert ordered(executor, "rollout_resume").ok
        assert row()["state"] == "resuming"
        assert not ordered(executor, "rollout_resume").ok
        assert row(server=True)["state"] == "running"
        assert alerts() == []
        has(2)
        assert (row()["state"], row()["before"], row()["subject"]) == ("done", "1 (0.1.0)", 2)
        for release in ("1", "release-2", "2" * 30):
            assert not ordered(executor, "rollout_back", release=release).ok
        told = ordered(executor, "rollout_back", release="2")
        assert (told.ok, "as release 9, for 1 board" in told.text) == (True, True), "release-8 keeps its number"
        assert (row()["leaves"], row()["before"]) == (2, None)
        assert not ordered(executor, "rollout_back", release="2").ok, "clicked twice"
        assert ordered(executor, "rollout_stop").ok
        assert (row()["state"], row(server=True)["state"]) == ("stopping", "stopped")
        assert [kind for kind, _ in alerts()] == ["rollout"]
