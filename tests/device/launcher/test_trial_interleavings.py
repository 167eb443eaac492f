"""Any command in every gap of updates, and a kill there: what is tried, runs and is reported, against a simple model.

Processes are functions that share a disk and its locks. A gap is before each write, and where a process only runs.
"""

import fcntl
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import FedpruneError
from fedprune.wire.fleet_messages import COMMITTED, ROLLED_BACK, STAGED, TRIAL, ReleaseReport
from fedprune.wire.messages import parse_message
from fedprune_device.launcher import slot_store, state
from fedprune_device.launcher.launcher import SlotExit, launch
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore, running_slot_text
from fedprune_device.launcher.state import STABLE, LauncherState
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.releases.installer import MAX_STAGED_STARTS, ReleaseInstaller
from fedprune_device.releases.release_agent import ReleaseAgent
from fedprune_device.releases.release_trial import ReleaseTrial
from support.fakes.runtime_releases import PUBLIC, make_release, set_up, source, versions_in
from support.faults.power_cuts import power

pytestmark = pytest.mark.board

ATTEMPTS = 3  # more than the kills of an interleaving, so that a good release is always kept
GOOD, BAD, ON_A_STICK = 2, 3, 4
READERS = ("slots", "predict", "--help", "run --help")
WHILE_READING = "predict, run, update"  # a process that outlives an update, whose next one would write its slot
ACTIONS = (*READERS, WHILE_READING, "run", "update", "kill", "kill the child alone")


class KilledError(BaseException):
    """SIGKILL."""


class WaitingError(BaseException):
    """A lock isn't free: the process, which has changed nothing yet, goes on at a later gap."""


class Board:
    """A board and its model: the releases that were marked for a trial, and the attempts of each, for which `run` has
    starts to `spend`. The server offers one release; `plan` has the action of a gap, by the gap's number.
    """

    def __init__(self, root: Path, releases: dict[int, Path], offered: int, plan: dict[int, str]) -> None:
        self.home, self.releases, self.offered, self.plan = SlotStore(root), releases, offered, plan
        self.gaps = self.actions = self.boots = self.spend = 0
        self.waiting: list[str] = []
        self.written: list[int] = []
        self.ran: list[int] = []
        self.marked, self.attempts = {1}, Counter[int]()
        self.is_served = self.is_idle = False

    def gap(self) -> None:
        self.gaps += 1
        self.check_state()
        actions, self.waiting = [*self.waiting, *filter(None, [self.plan.get(self.gaps)])], []
        for action in actions:
            if action.startswith("kill"):
                raise KilledError(action)
            self.act(action)

    def act(self, action: str) -> None:
        try:
            self.do(*action.split(", "))
        except WaitingError:
            self.waiting.append(action)
        except KilledError:
            pass

    def check_state(self) -> None:
        """Compare the state with the model, when it has changed."""
        written = [(self.home.folder / name).stat().st_ino for name in ("copy.json", "state.json")]
        if written == self.written:
            return
        self.written, now = written, self.home.load()
        if now.phase == state.TRIAL:
            self.marked.add(now.highest)
            if ATTEMPTS - now.left > self.attempts[now.highest]:
                assert self.spend, "only `run` uses an attempt up"
                self.spend -= 1
                self.attempts[now.highest] += 1
        if now.phase == state.STAGED:
            assert MAX_STAGED_STARTS - now.left <= self.boots
        if now.outcome is not None and now.outcome.result == state.ROLLED_BACK:
            version = now.outcome.version
            was_staged_only = version not in self.marked and self.boots > MAX_STAGED_STARTS
            assert was_staged_only or self.attempts[version] == ATTEMPTS, "rolled back before its starts had failed"

    def do(self, action: str, *inner_actions: str) -> None:
        """What another process does in this gap; it has gaps itself."""
        self.actions += 1
        before, is_refused = (self.actions, self.content()), False
        if action == "update":
            with suppress(FedpruneError):
                self.update(ON_A_STICK)
        elif action in READERS:
            launch(self.home, action.split(), lambda *chosen: self.read(*chosen, inner_actions))
        else:
            try:
                for _ in range(4):
                    self.boot()
                    if self.is_idle:
                        break
            except BlockingIOError:
                is_refused = True
        if action in READERS or is_refused:
            assert self.actions > before[0] or self.content() == before[1], f"{action} has changed something"

    def content(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.home.root.rglob("*") if path.is_file()}

    def boot(self) -> None:
        """A start of the service."""
        before = self.spend
        self.boots += 1
        self.spend += 1
        try:
            launch(self.home, ["run", "--patient"], self.serve)
        finally:
            self.spend = before

    @contextmanager
    def process(self, slot: str, record: SlotRecord) -> Iterator[None]:
        """The life of a process, in which nobody writes its slot."""
        assert versions_in(self.home.root / slot) == {f"VERSION = {record.version}"}
        self.gap()
        yield
        assert self.home.checked_record(slot) == record, "its slot was written"

    def read(self, slot: str, record: SlotRecord, trial: LauncherState | None, actions: Sequence[str]) -> SlotExit:
        assert trial is None
        with self.process(slot, record):
            for action in actions:
                self.act(action)
        return SlotExit("", 0)

    def serve(self, slot: str, record: SlotRecord, trial_state: LauncherState | None) -> SlotExit:
        assert not self.is_served, "two services"
        self.is_served = True
        self.spend -= trial_state is None
        self.ran.append(record.version)
        environment = {"FEDPRUNE_ROOT": str(self.home.root), "FEDPRUNE_SLOT": slot}
        trial = ReleaseTrial.current(environment)
        assert (trial is None) == (trial_state is None)
        try:
            with self.process(slot, record):
                assert running_slot_text(environment) == f"slot {slot} with release {record.version}"
                for number, report in self.reports(slot):
                    own_report = {COMMITTED if trial is None else TRIAL}
                    assert report in (own_report if number == record.version else {STAGED, TRIAL, ROLLED_BACK})
                if trial is not None and record.version != BAD:
                    trial.check(self.gap)
                    trial.commit()
                    assert self.reports(slot) == {(record.version, COMMITTED)}
                    trial = None
                if trial is None:
                    with suppress(FedpruneError):  # an update from a stick is under way
                        self.is_idle = not self.update(self.offered)
                    self.gap()
        except KilledError as error:
            if trial_state is None or error.args == ("kill",):
                raise
        finally:
            self.is_served = False
        if trial is not None:
            self.spend += 1  # the next one, by the same launcher
        return SlotExit("exit code 1")

    def reports(self, slot: str) -> set[tuple[int, str]]:
        """What the board's agent tells the server when it has connected: releases and their states."""
        sent: list[Any] = []
        link: Any = type("Link", (), {"publish": lambda _, _topic, raw, _qos=1: sent.append(parse_message(raw))})()
        connection = BoardConnection(link, MessageChannel("d", "site"))
        ReleaseAgent(connection, ReleaseInstaller(self.home.root, PUBLIC, running_slot=slot)).on_birth()
        return {(report.number, report.state) for report in sent if isinstance(report, ReleaseReport)}

    def update(self, number: int) -> bool:
        """Install a release and mark it for its trial; False if there was that, or a later one."""
        installer, now = ReleaseInstaller(self.home.root, PUBLIC), self.home.load()
        if number <= now.highest - (now.phase != STABLE):
            return False
        installer.stage(source(self.releases[number]))
        installer.arm(ATTEMPTS)
        return True

    def run_until_idle(self) -> None:
        for _ in range(20):
            with suppress(KilledError):
                self.gap()
                self.is_idle = False
                self.boot()
            if self.is_idle and not self.waiting and self.home.load().phase == STABLE:
                break
        now = self.home.load()
        expected = max(self.marked - {BAD})
        assert (now.phase, self.home.checked_record(now.stable).version, self.ran[-1]) == (STABLE, expected, expected)
        assert BAD not in self.marked or now.outcome.version > BAD or now.outcome.result == state.ROLLED_BACK


def flock(descriptor: int, operation: int, take: Any = fcntl.flock) -> None:
    """The lock of one process among several: a function can't wait for another that waits for it."""
    try:
        take(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        if operation & fcntl.LOCK_NB:
            raise
        raise WaitingError from None


@pytest.mark.once
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.soak)])
def test_only_run_tries_a_release_and_nothing_writes_what_runs(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = {n: make_release(tmp_path / str(n), n) for n in (1, 2, 3, 4)}
    fresh = set_up(tmp_path / "fresh", releases[1]).home.root
    monkeypatch.setattr(slot_store, "verify_signature", cache(slot_store.verify_signature))
    monkeypatch.setattr(fcntl, "flock", flock)

    def play(offered: int, plan: dict[int, str]) -> int:
        board = Board(Path(shutil.copytree(fresh, tmp_path / "board")), releases, offered, plan)
        try:
            with power(gap=board.gap):
                board.run_until_idle()
        except Exception as error:
            raise AssertionError(f"with release {offered} and {plan}") from error
        shutil.rmtree(board.home.root)
        return board.gaps

    chance, played = random.Random(count), 0
    for offered in (GOOD, BAD):
        gaps = play(offered, {})
        plans = [{gap: action} for gap, action in product(range(1, gaps + 1), ACTIONS)]
        chance.shuffle(plans)
        plans.insert(0, {1: WHILE_READING})
        while len(plans) < count // 2:
            plans.append({gap: chance.choice(ACTIONS) for gap in chance.sample(range(1, gaps + 40), 2)})
        for plan in plans[: count // 2]:
            play(offered, plan)
            played += 1
    print(f"{played} interleavings")
