"""The power fails at every single write of updates; every time the board comes back on one whole release."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import FedpruneError, RuntimeUnavailableError
from fedprune_device.launcher.launcher import SlotExit, run_service
from fedprune_device.launcher.slot_store import KEY_FILE, SlotRecord, SlotStore
from fedprune_device.launcher.state import COMMITTED, ROLLED_BACK, STABLE, DamagedError, LauncherState, UpdateOutcome
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_device.releases.release_trial import ReleaseTrial
from support.fakes.runtime_releases import PUBLIC, source, versions_in
from support.faults.power_cuts import EACH_KIND, KINDS, CutError, cuts, power

pytestmark = pytest.mark.board

ATTEMPTS = 3
SIGILL = "onnxruntime kills the process that runs a small graph (SIGILL)"
Bad = tuple[SlotExit, Callable[[Path | None], None] | None, str]


def healthy(_: Path | None) -> None:
    """Nothing is wrong."""


def no_such_instruction(_: Path | None) -> None:
    raise RuntimeUnavailableError(SIGILL)


BAD: dict[str, Bad] = {
    "crashes at import": (SlotExit("ended with exit code 1 before it was healthy"), None, "exit code 1"),
    "hangs at import": (SlotExit("not healthy within 300 s"), None, "not healthy within 300 s"),
    "is killed by SIGILL": (SlotExit("killed by SIGILL before it was healthy"), None, "killed by SIGILL"),
    "lacks an instruction": (SlotExit("ended with exit code 51"), no_such_instruction, SIGILL),
    "never reaches the broker": (SlotExit("not healthy within 300 s"), healthy, "had not reached the broker"),
}


class Board:
    """A board whose processes are functions: it boots, runs what its launcher starts, and updates when it is idle."""

    def __init__(self, root: Path, releases: dict[int, Path], bad: Bad) -> None:
        self.home = SlotStore(root)
        self.updater = ReleaseInstaller(root, PUBLIC)
        self.releases = {number: folder for number, folder in releases.items() if number <= 3}
        self.bad = bad
        self.ran: list[int] = []
        self.idle = False

    def run_until_idle(self) -> None:
        """Boot until nothing is left to do."""
        self.idle = False
        for _ in range(40):
            if self.idle:
                return
            run_service(self.home, self.run)
        raise AssertionError("the board never comes to rest")

    def run_on_fast_disk(self) -> None:
        """`run_until_idle`, on a disk that needn't be waited for."""
        with power():
            self.run_until_idle()

    def run(self, slot: str, record: SlotRecord, state: LauncherState | None) -> SlotExit:
        assert versions_in(self.home.root / slot) == {f"VERSION = {record.version}"}, "two versions are mixed"
        self.ran.append(record.version)
        if state is None:
            self.update()
            return SlotExit("restarted", 0)
        assert state.left < ATTEMPTS, "the attempt was taken off before the start"
        trial = ReleaseTrial.current({"FEDPRUNE_ROOT": str(self.home.root), "FEDPRUNE_SLOT": slot})
        end, health, _ = self.bad if record.version == 3 else (SlotExit("", 0), healthy, "")
        if health is not None:
            try:
                trial.check(lambda: health(None))
            except FedpruneError:
                return end
        if record.version != 3:
            trial.commit()
            self.update()
        return end

    def update(self) -> None:
        state = self.home.load()
        floor = state.highest if state.phase == STABLE else state.highest - 1
        later = sorted(n for n in self.releases if n > floor)
        if later:
            self.updater.stage(source(self.releases[later[0]]))
            self.updater.arm(ATTEMPTS)
        self.idle = not later

    def settled_state(self) -> LauncherState:
        """The state, once the checks that hold for every board at rest have passed."""
        state = self.home.load()
        assert state.phase == STABLE
        assert self.home.checked_record(state.stable).version == self.ran[-1]
        assert list((self.home.root / "incoming").iterdir()) == []
        return state


def copy_of(fresh: Path, root: Path) -> Path:
    shutil.copytree(fresh, root)
    return root


def stage(board: Board, release: Path, *, arm: bool = True) -> None:
    with power():
        board.updater.stage(source(release))
        if arm:
            board.updater.arm(ATTEMPTS)


# At every push the tests below cut at random operations and in the first installation, `test_release_updates.py` in
# updates that are downloaded.
@pytest.mark.soak
@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("how", ["lacks an instruction", "crashes at import", "never reaches the broker"])
def test_a_cut_at_any_write_of_a_good_and_a_bad_update_ends_on_the_good_one(
    fresh: Path, releases: dict[int, Path], tmp_path: Path, how: str, kind: str
) -> None:
    bad = BAD[how]
    calm = Board(copy_of(fresh, tmp_path / "calm"), releases, bad)
    with power() as supply:
        calm.run_until_idle()
    points = supply.names
    calm.settled_state()
    assert len(points) >= 150, (
        "three kinds of cut and three of bad releases: 1,600 points and more, soaked ones included"
    )
    for at, cut in cuts(kind, points):
        board = Board(copy_of(fresh, tmp_path / "cut"), releases, bad)
        with power(at, cut), pytest.raises(CutError):
            board.run_until_idle()
        board.run_on_fast_disk()
        state = board.settled_state()
        assert (board.ran[-1], state.highest) == (2, 3)
        assert (state.outcome.version, state.outcome.result) == (3, ROLLED_BACK)
        assert bad[2] in state.outcome.reason
        shutil.rmtree(board.home.root)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(1, 120), st.sampled_from(KINDS)), max_size=8), bad=st.sampled_from(sorted(BAD))
)
def test_many_cuts_in_a_row_still_end_on_a_release_that_works(
    fresh: Path,
    releases: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[tuple[int, str]],
    bad: str,
) -> None:
    board = Board(copy_of(fresh, tmp_path_factory.mktemp("many") / "board"), releases, BAD[bad])
    for at, kind in cuts:
        with power(at, kind):
            try:
                board.run_until_idle()
            except CutError:
                continue
    board.run_on_fast_disk()
    state = board.settled_state()
    assert board.ran[-1] in (1, 2), "a release that never was healthy doesn't stay"
    assert state.outcome.result == ROLLED_BACK
    assert state.outcome.reason


def test_a_release_that_power_cuts_never_let_finish_is_given_up_with_a_reason(
    fresh: Path, releases: dict[int, Path], tmp_path: Path
) -> None:
    board = Board(copy_of(fresh, tmp_path / "board"), {2: releases[2]}, BAD["hangs at import"])
    stage(board, releases[2])

    def cut(*_: object) -> SlotExit:
        raise CutError

    for _ in range(ATTEMPTS):
        with pytest.raises(CutError):
            run_service(board.home, cut)
    board.run_on_fast_disk()
    state = board.settled_state()
    assert board.ran == [1]
    assert state.outcome == UpdateOutcome(2, ROLLED_BACK, "the last attempt ended without a message, as in a power cut")


def test_one_damaged_copy_of_the_state_changes_nothing(fresh: Path, releases: dict[int, Path], tmp_path: Path) -> None:
    for name in ("state.json", "copy.json"):
        for damage in (b"", b"\0" * 300, b'{"format": 1, "body": "{}", "sha256": "00"}'):
            board = Board(copy_of(fresh, tmp_path / "board"), {2: releases[2]}, BAD["hangs at import"])
            board.run_on_fast_disk()
            before = board.settled_state()
            (board.home.folder / name).write_bytes(damage)
            board.run_on_fast_disk()
            assert board.settled_state() == before
            assert before.outcome == UpdateOutcome(2, COMMITTED)
            shutil.rmtree(board.home.root)


def test_with_both_copies_damaged_the_release_that_had_served_before_serves(
    fresh: Path, releases: dict[int, Path], tmp_path: Path
) -> None:
    board = Board(copy_of(fresh, tmp_path / "board"), {}, BAD["hangs at import"])
    stage(board, releases[3])
    for name in ("state.json", "copy.json"):
        (board.home.folder / name).write_bytes(b"\xff" * 64)
    board.run_on_fast_disk()
    state = board.settled_state()
    assert (board.ran, state.highest) == ([1], 3)
    assert "damaged" in state.outcome.reason


@pytest.mark.parametrize("how", ["changed", "missing", "added", "linked"])
def test_a_slot_that_is_not_what_its_record_says_is_not_started(
    fresh: Path, releases: dict[int, Path], tmp_path: Path, how: str
) -> None:
    board = Board(copy_of(fresh, tmp_path / "board"), {2: releases[2]}, BAD["hangs at import"])
    board.run_on_fast_disk()
    assert board.ran[-1] == 2
    state = board.settled_state()
    victim = board.home.root / state.stable / "app" / "part.py"
    if how == "changed":
        victim.write_text("VERSION = 3\n")
    elif how == "added":
        victim.with_name("extra.py").write_text("VERSION = 2\n")
    else:
        victim.unlink()
        if how == "linked":
            victim.symlink_to(victim.with_name("__init__.py"))
    board.run_on_fast_disk()
    after = board.settled_state()
    assert (board.ran[-1], after.stable) == (1, state.other_slot)
    assert after.outcome.version == 2
    assert "app/" in after.outcome.reason
    assert after.outcome.reason.endswith("version 1 serves")


def test_a_damaged_slot_is_still_tried_where_there_is_no_other(fresh: Path, tmp_path: Path) -> None:
    home = SlotStore(copy_of(fresh, tmp_path / "board"))
    (home.root / "a" / "app" / "part.py").write_text("VERSION = 9\n")
    with pytest.raises(DamagedError, match=r"part\.py is damaged"):
        run_service(home, lambda *_: SlotExit("", 0))  # with the server's key nothing is started that it hasn't signed
    (home.root / KEY_FILE).unlink()
    ran = []

    def run(slot: str, record: SlotRecord, state: LauncherState | None) -> SlotExit:
        ran.append((slot, record.version, state))
        return SlotExit("", 0)

    assert run_service(home, run) == 0
    assert ran == [("a", 1, None)]


def test_a_staged_release_that_nobody_arms_is_dropped_in_the_end(
    fresh: Path, releases: dict[int, Path], tmp_path: Path
) -> None:
    board = Board(copy_of(fresh, tmp_path / "board"), {}, BAD["hangs at import"])
    stage(board, releases[2], arm=False)
    for _ in range(11):
        board.run_on_fast_disk()
    state = board.settled_state()
    assert set(board.ran) == {1}
    assert state.outcome == UpdateOutcome(2, ROLLED_BACK, "staged, but not begun in time")
