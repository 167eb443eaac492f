"""Releases that a server offers: pulled, tried, kept or taken back, refused, and every end is reported."""

import hashlib
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from fedprune.releases.release import Release
from fedprune.security.keys import SigningKey
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import (
    COMMITTED,
    DOWNLOADING,
    REFUSED,
    ROLLED_BACK,
    STAGED,
    TRIAL,
    ReleaseReport,
    ReleaseWithdrawn,
)
from fedprune_device.launcher.launcher import run_service
from fedprune_device.launcher.state import STABLE
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.releases.installer import ReleaseInstaller, ReleaseSource
from fedprune_device.releases.release_agent import NO_IDENTITY, NO_LAUNCHER, ReleaseAgent, board_installer
from support.fakes.release_site import SHARED, Board, ReleaseServer
from support.fakes.runtime_releases import make_release, make_wheel, set_up
from support.faults.power_cuts import KINDS, TURNS, CutError, cuts, power
from support.waiting import until

pytestmark = pytest.mark.board

BIG: dict[str, bytes | str] = {"library/big.txt": "VERSION = 2\n" + random.Random(0).randbytes(1_000_000).hex()}


Make = Callable[..., Board]


@pytest.fixture
def board(copy_board: Callable[..., Path], tmp_path: Path) -> Make:
    def make(*offered: Path, name: str = "board") -> Board:
        return Board(copy_board(name), ReleaseServer(tmp_path / f"{name}-server", *offered))

    return make


def states(board: Board, number: int) -> list[str]:
    """What the board said of a release, without repetitions."""
    reported = [r.state for r in board.server.reports if r.number == number]
    return [state for i, state in enumerate(reported) if i == 0 or reported[i - 1] != state]


def test_a_good_release_is_pulled_tried_and_kept(board: Make, releases: dict[int, Path]) -> None:
    it = board(releases[2])
    it.run_until_idle()
    assert states(it, 2) == [DOWNLOADING, STAGED, TRIAL, COMMITTED]
    assert it.ran == [1, 2]
    state = it.home.load()
    assert (state.phase, it.home.checked_record(state.stable).version) == (STABLE, 2)
    left = [p for p in (it.home.root / "incoming").rglob("*") if p.is_file()]
    assert left == [], "nothing of it stays beside the slot"


def test_one_that_crashes_goes_back_and_the_server_hears_why(board: Make, releases: dict[int, Path]) -> None:
    it = board(releases[3], releases[4])
    it.run_until_idle()
    assert states(it, 3) == [DOWNLOADING, STAGED, TRIAL, ROLLED_BACK]
    assert "exit code 1" in it.server.final_report(3).reason
    assert it.ran == [1, 3, 3, 3, 1, 4], "a release that went back is not tried again, a higher one is"


def test_what_runs_is_reported_whatever_the_state_says(board: Make) -> None:
    it = board()
    it.home.save(replace(it.home.load().roll_back("by somebody else"), stable="b"))
    it.serve(slot="a")
    assert states(it, 1) == [COMMITTED]


def test_an_offer_of_what_the_board_knows_is_answered_from_its_disk(board: Make, releases: dict[int, Path]) -> None:
    it = board(releases[2], releases[3])
    it.run_until_idle()
    wants, it.server.reports = it.server.wants, []
    it.server.offers.insert(0, it.server.offer(releases[1]))
    it.run_until_idle()
    reported = list(dict.fromkeys((r.number, r.state) for r in it.server.reports))
    assert reported == [(3, ROLLED_BACK), (1, REFUSED), (2, COMMITTED)], (
        "it runs the second, whatever came of the third"
    )
    assert "expected a number above 3" in it.server.final_report(1).reason
    assert it.server.wants == wants, "nothing is pulled again"


@pytest.mark.parametrize("seed", range(5))
def test_messages_that_come_twice_or_get_lost_cost_time_alone(
    board: Make, releases: dict[int, Path], seed: int
) -> None:
    it, chance, asked = board(releases[2]), random.Random(seed), 0.0
    it.server.mangle = lambda raw: [raw] * chance.choice((0, 1, 1, 2))

    def again() -> bool:
        nonlocal asked
        if it.now > asked + 60:  # as the server does while it hears nothing
            asked = it.now
            it.server.next()
        return False

    it.until = again
    it.run_until_idle()
    assert states(it, 2)[-1] == COMMITTED
    assert it.ran[-1] == 2


def test_what_was_pulled_before_a_restart_is_not_pulled_again(board: Make, tmp_path: Path) -> None:
    it = board(make_release(tmp_path / "big", 2, extra_files=BIG, unpacked=3 * 10**6))
    lives, passed, cut = 0, 0, False
    leaves: list[tuple[str, str, int]] = []

    def let_one_chunk_through(raw: bytes) -> list[bytes]:
        """Let one chunk through in each of the board's lives."""
        nonlocal passed, cut
        if not raw.startswith(b"FPC"):
            return [raw]
        if passed == lives:
            cut = True
            return []
        passed, chunk = lives, Chunk.parse(raw)
        leaves.extend((chunk.part, chunk.sha256, index) for index, _ in chunk.leaves())
        return [raw]

    it.server.mangle, it.until = let_one_chunk_through, lambda: cut and not it.server.inbox
    while not it.server.done:
        lives, cut = lives + 1, False
        run_service(it.home, it.run)
        assert lives < 100
    assert lives > 5
    assert len(leaves) == len(set(leaves)) > 30, "no leaf comes twice"
    assert states(it, 2)[-1] == COMMITTED


def test_a_release_that_is_withdrawn_is_not_tried(board: Make, releases: dict[int, Path]) -> None:
    it = board(releases[2])
    it.is_quiet = lambda: False
    it.until = lambda: STAGED in states(it, 2)
    it.serve()
    it.server.offers = []
    it.server.next = lambda: it.server.say(ReleaseWithdrawn(2, "too many failed"))  # type: ignore[method-assign]
    it.is_quiet, it.until = (lambda: True), (lambda: it.now > 20)
    it.now = 0
    it.serve()
    state = it.home.load()
    assert (state.phase, it.ran) == (STABLE, [])
    assert state.outcome.reason == "withdrawn: too many failed"
    assert [p for p in (it.home.root / "incoming").rglob("*") if p.is_file()] == []


def test_a_release_that_is_withdrawn_while_it_is_unpacked_is_dropped_only_then(
    board: Make, releases: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that unpacks still reads the files."""
    it, stage, file_counts, turns_after = board(releases[2]), ReleaseInstaller.stage, list[int](), count()

    def files() -> int:
        return sum(path.is_file() for path in (it.home.root / "incoming").rglob("*"))

    def stage_slowly(installer: ReleaseInstaller, release: ReleaseSource) -> Release:
        file_counts.append(files())
        it.server.next = lambda: None  # type: ignore[method-assign]
        it.server.say(ReleaseWithdrawn(2, "too many failed"))
        said_at = it.now
        until(lambda: it.now > said_at + 4)  # the agent's loop has turned many times
        file_counts.append(files())
        return stage(installer, release)

    def is_over() -> bool:
        is_unpacked = file_counts[1:] and "fedprune-staging" not in {thread.name for thread in threading.enumerate()}
        return bool(is_unpacked) and next(turns_after) > 2

    monkeypatch.setattr(ReleaseInstaller, "stage", stage_slowly)
    it.until = is_over
    it.serve()
    assert file_counts[0] == file_counts[1] > 0
    state = it.home.load()
    assert (state.phase, state.outcome.reason, files()) == (STABLE, "withdrawn: too many failed", 0)


def refusal_reason(it: Board) -> str:
    """Why the only release was refused; the board is as it was."""
    it.run_until_idle()
    (report,) = (r for r in it.server.reports if r.state == REFUSED)
    state = it.home.load()
    assert (state.phase, state.highest, it.ran) == (STABLE, 1, [1])
    assert list((it.home.root / "b").iterdir()) == []
    return report.reason


@pytest.mark.parametrize(
    ("changes", "offered", "reason"),
    [
        ({"key": SigningKey.make()}, {}, "signature"),
        ({"machine": "pdp11"}, {}, "got pdp11"),
        ({"launcher": 99}, {}, "launcher"),
        ({"number": 1, "version": "0.1.1"}, {}, "a number above 1"),
        ({}, {"number": 3}, "offer of release 3"),
        ({}, {"leaves": ("ab" * 32,)}, "got 1 files"),
        ({}, {"signature": "ab" * 64}, "signature"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_reason_before_anything_is_pulled(
    board: Make, tmp_path: Path, changes: dict[str, Any], offered: dict[str, Any], reason: str
) -> None:
    it = board(make_release(tmp_path / "release", **{"number": 2, **changes}))
    it.server.offers = [structs.replace(it.server.offers[0], **offered)]
    assert reason in refusal_reason(it)
    assert it.server.wants == 0


def test_a_board_without_room_pulls_nothing(
    board: Make, releases: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**24))
    it = board(releases[2])
    assert "no room" in refusal_reason(it)
    assert it.server.wants == 0


def test_files_that_are_not_what_was_signed_are_refused(board: Make, tmp_path: Path) -> None:
    big = make_release(tmp_path / "big", 2, extra_files=BIG, unpacked=3 * 10**6)
    it = board(big)
    it.server.mangle = lambda raw: [raw[:-1] + bytes([raw[-1] ^ 1])] if raw.startswith(b"FPC") else [raw]
    assert "arrived damaged" in refusal_reason(it)
    it = board(big, name="table")
    it.server.offers = [structs.replace(it.server.offers[0], leaves=("ab" * 32,) * 2)]
    assert "contradicts itself" in refusal_reason(it) or "damaged" in refusal_reason(it)


def test_a_board_without_launcher_or_identity_says_so(releases: dict[int, Path], tmp_path: Path) -> None:
    assert board_installer(None, {}) == NO_LAUNCHER
    assert board_installer(None, {"FEDPRUNE_ROOT": str(tmp_path), "FEDPRUNE_SLOT": "a"}) == NO_IDENTITY
    server = ReleaseServer(tmp_path / "server", releases[2])
    agent = ReleaseAgent(BoardConnection(server, MessageChannel("d", "site")), NO_LAUNCHER)
    for _ in range(2):
        agent.on_message(server.offers[0])
    assert server.reports == 2 * [ReleaseReport("d", 2, REFUSED, NO_LAUNCHER, 0, 0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "half"),
    [
        pytest.param(TURNS, 0, marks=pytest.mark.once),
        *(pytest.param(kind, half, marks=pytest.mark.soak) for kind in KINDS for half in (0, 1)),
    ],
)
def test_a_cut_at_any_write_of_a_pulled_release_ends_on_a_good_one(
    board: Make, releases: dict[int, Path], kind: str, half: int
) -> None:
    """Every sixth write by turns; of the others every second or third, half of them in each part."""
    calm = board(releases[2], releases[3], name="calm")
    with power() as supply:
        calm.run_until_idle()
    assert supply.count >= 250
    first, step = (0, 3) if kind == TURNS else (3 * half, 6) if kind == "before" else (2 * half, 4)
    for at, how in islice(cuts(kind, supply.names), first, None, step):
        it = board(releases[2], releases[3], name="cut")
        with power(at, how), pytest.raises(CutError):
            it.run_until_idle()
        with power():
            it.run_until_idle()
        state = it.home.load()
        assert (state.phase, state.highest, it.home.checked_record(state.stable).version) == (STABLE, 3, 2)
        ended = it.server.final_report(2)
        assert ended.state == COMMITTED
        ended = it.server.final_report(3)
        assert (ended.state, "exit code 1" in ended.reason or "without a message" in ended.reason) == (
            ROLLED_BACK,
            True,
        )
        assert [p for p in (it.home.root / "incoming").iterdir() if p.is_file()] == []
        shutil.rmtree(it.home.root)
        shutil.rmtree(it.server.store.root)


def shared_wheel(folder: Path) -> Path:
    return make_wheel(folder / "runtime-1-py3-none-any.whl", {"runtime/core.txt": f"{SHARED}\n" + "x" * 100_000})


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _replace_by_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere.txt"))
    file.symlink_to("elsewhere.txt")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "other text": lambda file: file.write_text(f"{SHARED}\n"),
    "missing": Path.unlink,
    "a link": _replace_by_link,
}


@pytest.mark.parametrize("damaged", ["", *DAMAGE])
def test_a_wheel_that_the_running_slot_has_is_copied_and_fetched_only_if_it_is_damaged(
    tmp_path: Path, damaged: str
) -> None:
    shared = shared_wheel(tmp_path)
    first, second = (make_release(tmp_path / f"release-{n}", n, shared=shared) for n in (1, 2))
    set_up(tmp_path / "board", first)
    it = Board(tmp_path / "board", ReleaseServer(tmp_path / "server", second))
    if damaged:  # after the launcher has compared the slot with its record
        DAMAGE[damaged](it.home.root / "a" / "runtime" / "core.txt")
        it.serve()
    it.run_until_idle()
    assert it.home.checked_record(it.home.load().stable).version == 2
    wheel_digests = {digest_of(path) for path in (second / "wheels").iterdir()}
    assert it.server.requested == wheel_digests | ({digest_of(shared)} if damaged else set())
    assert it.server.final_report(2).state == COMMITTED


def test_copied_files_are_checked_against_the_release(tmp_path: Path) -> None:
    """A slot's record names the files of a wheel, and nobody has signed that."""
    shared = shared_wheel(tmp_path)
    first, second = (make_release(tmp_path / f"release-{n}", n, shared=shared) for n in (1, 2))
    installer = set_up(tmp_path / "board", first)
    record = installer.home.record("a")
    installer.home.write_record("a", replace(record, wheels={digest_of(shared): ("app/part.py",)}))
    it = Board(tmp_path / "board", ReleaseServer(tmp_path / "server", second))
    assert refusal_reason(it)
    assert it.ran == [1]
