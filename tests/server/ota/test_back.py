"""Rollouts that are paused and taken back: by a server that is killed in between, and what boards then have."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ConfigError, ReleaseError
from fedprune.releases.release import MANIFEST, Release, verified_release
from fedprune.releases.rollout import Fate, RolloutPhase
from fedprune.security.keys import SigningKey
from fedprune.wire.fleet_messages import COMMITTED, REFUSED, ReleaseOffer, ReleaseReport, ReleaseWithdrawn
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.ota.rollouts import RolloutTerms, start_rollout, take_back
from fedprune_server.ota.store import RolloutEntry, RolloutStore
from support.fakes.runtime_releases import make_release

NAMES = [f"board-{i}" for i in range(10)]
HALF = RolloutTerms((0.5, 1.0))


class CrashError(Exception):
    """The server dies."""


class Field:
    """A server with real releases, and boards that refuse numbers that they have seen, like real ones."""

    def __init__(self, folder: Path) -> None:
        self.state, self.folder = folder / "state", folder
        with IdentityFolder.make(self.state, "lab") as identity:
            self.key = identity.key
            for name in NAMES:
                key = SigningKey.make().verifying_key.hex
                identity.store.request_approval(name, key, 1)
                identity.store.approve(name, key, 2)
        self.now = 1000.0
        self.seen = dict.fromkeys(NAMES, 0)
        self.has: dict[str, Release] = {}
        self.answers: list[ReleaseReport] = []
        self.withdrawn: list[tuple[str, int]] = []
        self.sent: Callable[[], None] = lambda: None
        self.silent: set[str] = set()
        self.desk: RolloutCoordinator | None = None
        self.store = RolloutStore(self.state)

    def release(self, number: int) -> Path:
        return make_release(self.folder / f"release-{number}", number, key=self.key)

    def server(self) -> None:
        """A server comes up on what is on the disk."""
        self.store.close()
        self.store = RolloutStore(self.state)
        self.desk = RolloutCoordinator(self.store, self.send, clock=lambda: self.now, monotonic=lambda: self.now)
        self.desk.on_connection_change(True)

    def send(self, device: str, message: Any) -> None:
        self.sent()
        if isinstance(message, ReleaseWithdrawn):
            self.withdrawn.append((device, message.number))
        elif isinstance(message, ReleaseOffer) and device not in self.silent:
            release = verified_release(
                message.manifest.encode(), bytes.fromhex(message.signature), self.key.verifying_key
            )
            for file in release.files:
                assert self.store.blobs.has(file.sha256)
            state = COMMITTED
            if release.number > self.seen[device]:
                self.seen[device], self.has[device] = release.number, release
            elif self.has[device].number != release.number:
                state = REFUSED
            self.answers.append(ReleaseReport(device, release.number, state, "", 0, 0))

    def is_live(self, minutes: int = 8) -> None:
        for _ in range(minutes):
            if self.desk is None:
                self.server()
            assert self.desk is not None
            self.now += 60.0
            answers, self.answers = self.answers, []
            for answer in answers:
                self.desk.on_report(answer)
            self.desk.tick()

    def request(self, what: Callable[[RolloutStore], Any]) -> Any:
        with RolloutStore(self.state) as store:  # the command line is another process
            return what(store)

    @property
    def entry(self) -> RolloutEntry:
        entry = self.store.latest_entry()
        assert entry is not None
        return entry

    def numbers(self) -> dict[int, int]:
        """How many boards have which release."""
        numbers = [r.number for r in self.has.values()]
        return {n: numbers.count(n) for n in set(numbers)}


@pytest.fixture
def field(tmp_path: Path) -> Field:
    field = Field(tmp_path)
    start_rollout(field.state, field.release(1), RolloutTerms((1.0,)))
    field.is_live()
    assert field.numbers() == {1: 10}
    return field


@pytest.mark.parametrize("restart", [False, True])
def test_a_pause_lets_no_further_board_begin_until_it_is_resumed(field: Field, restart: bool) -> None:
    start_rollout(field.state, field.release(2), HALF)
    field.silent = set(NAMES)
    field.is_live(2)
    field.request(lambda s: s.pause("a storm"))
    field.silent = set()
    for _ in range(20):
        if restart:
            field.desk = None
        field.is_live(1)
    assert field.entry.rollout.phase is RolloutPhase.PAUSED
    assert field.entry.rollout.why == "paused: a storm"
    assert field.numbers() == {1: 5, 2: 5}, "those at it end, and the next stage waits"
    field.request(lambda s: s.resume())
    if restart:
        field.desk = None
    field.is_live()
    assert (field.entry.rollout.phase, field.numbers()) == (RolloutPhase.DONE, {2: 10})


def test_boards_go_back_to_what_they_had_under_a_number_that_none_has_seen(field: Field) -> None:
    start_rollout(field.state, field.release(2), HALF)
    field.is_live(1)
    took = {n for n, r in field.has.items() if r.number == 2}
    assert len(took) == 5
    begun = take_back(field.state, "it is hot", release=2, above=6)
    message = "rollout 3: back from release 2 to what release 1 (0.1.0) holds, as release 7, for"
    assert begun.way_back_text() == f"{message} {len(begun.rollout.boards)} boards"
    field.is_live()
    entries = field.store.entries()
    assert [e.rollout.phase for e in entries] == [RolloutPhase.DONE, RolloutPhase.STOPPED, RolloutPhase.DONE]
    assert entries[1].rollout.why == "stopped: boards go back: it is hot"
    assert set(begun.rollout.boards) == took
    assert field.numbers() == {7: 10}, "the other half was given it before the server saw the order, and goes back, too"
    assert {r.version for r in field.has.values()} == {"0.1.0"}
    with pytest.raises(ConfigError, match="release 2"):
        take_back(field.state, "clicked twice", release=2)
    with pytest.raises(ConfigError, match="release 7"):
        take_back(field.state, "once more", release=7)
    with pytest.raises(ReleaseError, match="release 3"):
        start_rollout(field.state, field.release(3), HALF)
    other_release = make_release(field.folder / "other", 7, key=field.key)
    with pytest.raises(ReleaseError, match="release 7"):
        start_rollout(field.state, other_release, HALF)


def test_a_server_that_dies_at_any_message_takes_all_back_all_the_same(tmp_path: Path) -> None:
    for at in (1, 2, 5, 9, 14):
        (tmp_path / str(at)).mkdir()
        field = Field(tmp_path / str(at))
        start_rollout(field.state, field.release(1), RolloutTerms((1.0,)))
        field.is_live(2)
        start_rollout(field.state, field.release(2), HALF)
        field.is_live(1)
        took = {n for n, r in field.has.items() if r.number == 2}
        take_back(field.state, "bad")
        left = at

        def crash() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise CrashError

        field.sent = crash
        for _ in range(12):
            with suppress(CrashError):
                field.is_live(1)
                continue
            field.desk = None
        assert took
        assert all(field.has[n].number == 3 for n in took)
        assert field.entry.rollout.phase is RolloutPhase.DONE
        assert field.store.entries_under_way() == []


def test_nothing_is_taken_back_without_something_to_go_back_to(field: Field, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="release 1"):
        take_back(field.state, "x")
    start_rollout(field.state, field.release(2), HALF)
    with pytest.raises(ConfigError, match="release 2"):
        take_back(field.state, "x")
    field.is_live()
    with pytest.raises(ReleaseError, match="above 2"):
        take_back(field.state, "x", number=2)
    first = Release.from_bytes((field.folder / "release-1" / MANIFEST).read_bytes())
    field.store.blobs.delete(first.files[0].sha256)
    with pytest.raises(ReleaseError, match=r"release 1 "):
        take_back(field.state, "x")
    assert field.entry.number == 2, "what was refused has changed nothing"
    assert field.entry.stop_reason is None


def test_a_board_that_failed_or_left_is_not_taken_back(field: Field) -> None:
    start_rollout(field.state, field.release(2), RolloutTerms((1.0,), success=0.5, errors=0.5))
    field.silent = {"board-9"}
    field.is_live(1)
    assert field.desk is not None
    field.desk.on_report(ReleaseReport("board-3", 2, REFUSED, "no room", 0, 0))
    with IdentityFolder(field.state) as identity:
        identity.revoke("board-4")
    begun = take_back(field.state, "x")
    assert sorted(begun.rollout.boards) == sorted(set(NAMES) - {"board-3", "board-4"})
    assert all(b.fate is Fate.WAITING for b in begun.rollout.boards.values())
