"""The coordinator that runs rollouts: stages, thresholds, deadlines, restarts, and what boards are told."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, ReleaseError
from fedprune.releases.release import FILES, Release, read_release
from fedprune.releases.rollout import Fate, Rollout, RolloutPhase
from fedprune.releases.rollout_plan import CAREFUL_STAGES, RolloutPlan, Stage
from fedprune.wire.fleet_messages import (
    COMMITTED,
    DOWNLOADING,
    REFUSED,
    ROLLED_BACK,
    STAGED,
    TRIAL,
    ReleaseOffer,
    ReleaseReport,
    ReleaseWithdrawn,
)
from fedprune.wire.messages import parse_message
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.ota.store import RolloutStore
from support.fakes.runtime_releases import KEY, make_release

NAMES = [f"board-{i}" for i in range(10)]
GOOD = (DOWNLOADING, STAGED, TRIAL, COMMITTED)
BAD = (DOWNLOADING, STAGED, TRIAL, ROLLED_BACK)
HANGS = (DOWNLOADING, STAGED)
SILENT: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("release") / "7", 7)


class Site:
    """A coordinator and boards that say what they are made to say, one report a minute."""

    def __init__(self, folder: Path, release: Path) -> None:
        self.folder, self.release = folder, release
        self.now = 1000.0
        self.wall = 1.7e9
        self.members = {*NAMES, "newcomer"}
        self.fates: dict[str, tuple[str, ...]] = {}
        self.usual = GOOD
        self.offered: dict[str, float] = {}
        self.withdrawn: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.lost = 0
        self.coordinator: RolloutCoordinator | None = None
        self.store = RolloutStore(folder)
        for file in read_release(release, KEY.verifying_key)[0].files:
            self.store.blobs.put((release / FILES / file.sha256).read_bytes())

    def offer(self, number: int = 7) -> ReleaseOffer:
        contents, manifest, signature = read_release(self.release, KEY.verifying_key)
        return ReleaseOffer(number, manifest.decode(), signature.hex(), ("ab" * 32,) * len(contents.files), 3, 600.0)

    def begin(self, *stages: Stage, number: int = 7, joins: bool = True, names: list[str] = NAMES) -> int:
        plan = RolloutPlan(str(number), stages or CAREFUL_STAGES, board_seconds=3600.0)
        with RolloutStore(self.folder) as store:  # the command line is another process
            return store.begin(self.offer(number), Rollout.for_boards(plan, names), self.wall, joins=joins)

    def start(self) -> RolloutCoordinator:
        """A daemon comes up."""
        self.store.close()
        self.store = RolloutStore(self.folder)
        self.coordinator = RolloutCoordinator(
            self.store, self.send, lambda: self.members, lambda: self.wall, lambda: self.now
        )
        self.coordinator.on_connection_change(True)
        return self.coordinator

    def send(self, device: str, message: Any) -> None:
        assert parse_message(message.to_bytes()) == message
        if isinstance(message, ReleaseOffer):  # a server that dies now has to know of it
            assert self.rollout.boards[device].fate is not Fate.WAITING
        if self.lost:
            self.lost -= 1
            return
        if isinstance(message, ReleaseOffer):
            self.offered.setdefault(device, self.now)
            self.steps.setdefault(device, 0)
        elif isinstance(message, ReleaseWithdrawn):
            self.withdrawn[device] = message.reason

    def report(self, device: str, state: str, number: int = 7, done: int = 0) -> None:
        reason = "killed by SIGILL" if state in (ROLLED_BACK, REFUSED) else ""
        assert self.coordinator is not None
        self.coordinator.on_report(ReleaseReport(device, number, state, reason, done, 10))

    def minute(self) -> None:
        self.now += 60
        assert self.coordinator is not None
        for device in sorted(self.steps):
            states = self.fates.get(device, self.usual)
            at = self.steps[device]
            if at < len(states) and device not in self.withdrawn:
                self.steps[device] += 1
                self.report(device, states[at])
        self.coordinator.tick()

    def is_live(self, hours: float = 4, restart: bool = False) -> Rollout:
        for _ in range(int(60 * hours)):
            if restart:
                self.start()
            self.minute()
        return self.rollout

    @property
    def rollout(self) -> Rollout:
        entry = self.store.latest_entry()
        assert entry is not None
        return entry.rollout

    @property
    def reports(self) -> dict[str, Any]:
        entry = self.store.latest_entry()
        assert entry is not None
        return entry.reports

    def stage(self, number: int) -> list[str]:
        return sorted(n for n, b in self.rollout.boards.items() if b.stage == number)


@pytest.fixture
def site(tmp_path: Path, release: Path) -> Site:
    site = Site(tmp_path, release)
    site.start()
    return site


@pytest.mark.parametrize("restart", [False, True])
def test_a_good_release_goes_to_all_stage_after_stage(site: Site, restart: bool) -> None:
    site.begin(Stage(0.1), Stage(0.5), Stage(1.0))
    rollout = site.is_live(restart=restart)
    assert (rollout.phase, rollout.failures(), sorted(site.offered)) == (RolloutPhase.DONE, {}, NAMES)
    ends = [max(site.offered[n] for n in site.stage(i)) for i in range(3)]
    begins = [min(site.offered[n] for n in site.stage(i)) for i in range(3)]
    assert begins[1] >= ends[0] + 4 * 60
    assert begins[2] >= ends[1] + 4 * 60


@pytest.mark.parametrize("restart", [False, True])
def test_a_bad_release_reaches_one_board_and_stops_with_its_reason(site: Site, restart: bool) -> None:
    site.usual = BAD
    site.begin()
    rollout = site.is_live(restart=restart)
    assert rollout.phase is RolloutPhase.STOPPED
    assert list(site.offered) == site.stage(0)
    assert rollout.failures() == {site.stage(0)[0]: "rolled back: killed by SIGILL"}
    assert "stage 1: 1 of 1 board failed" in rollout.why


@pytest.mark.parametrize(("states", "minutes"), [(SILENT, 60), (HANGS, 62), ((DOWNLOADING, STAGED, TRIAL), 96)])
def test_every_state_has_a_deadline_after_which_the_board_has_failed(
    site: Site, states: tuple[str, ...], minutes: int
) -> None:
    site.usual = states
    site.begin()
    site.is_live(hours=(minutes - 1) / 60)
    assert site.rollout.phase is RolloutPhase.RUNNING
    site.is_live(hours=4 / 60)
    (name,) = site.offered
    assert site.rollout.phase is RolloutPhase.STOPPED
    assert site.rollout.failures() == {name: "said nothing until its deadline"}
    assert site.withdrawn == {name: "said nothing until its deadline"}, "it shall not install it some day"


def test_a_slow_download_goes_on_as_long_as_it_gets_on(site: Site) -> None:
    site.usual = SILENT
    site.begin()
    site.is_live(hours=1 / 60)
    (name,) = site.offered
    for done in range(10):
        site.report(name, DOWNLOADING, done=done)
        site.is_live(hours=50 / 60)
    assert site.rollout.phase is RolloutPhase.RUNNING
    for _ in range(2):
        site.report(name, DOWNLOADING, done=9)
        site.is_live(hours=50 / 60)
    assert site.rollout.phase is RolloutPhase.STOPPED, "to say the same again is no progress"


def test_a_board_that_comes_back_hears_its_offer_again_and_a_new_one_is_in_the_last_stage(site: Site) -> None:
    site.usual = SILENT
    site.begin()
    site.is_live(hours=1 / 60)
    assert site.coordinator is not None
    (name,) = site.offered
    site.offered.clear()
    site.coordinator.on_birth(name)
    assert list(site.offered) == [name]
    site.coordinator.on_birth("newcomer")
    site.coordinator.on_birth(NAMES[0] if NAMES[0] != name else NAMES[1])
    assert list(site.offered) == [name]
    assert site.rollout.boards["newcomer"].stage == 2


def test_files_are_for_the_boards_that_are_given_the_release(site: Site) -> None:
    site.usual = HANGS
    site.begin()
    site.is_live(hours=3 / 60)
    assert site.coordinator is not None
    (name,) = site.offered
    files = {f.sha256 for f in Release.from_bytes(site.offer().manifest.encode()).files}
    assert {n: site.coordinator.downloadable_files(n) for n in [*NAMES, "stranger"]} == {
        n: (files if n == name else frozenset()) for n in [*NAMES, "stranger"]
    }
    site.is_live(hours=2)
    assert site.coordinator.downloadable_files(name) == frozenset()


def test_somebody_stops_it_and_boards_that_are_at_it_hear_of_that(site: Site) -> None:
    site.begin(Stage(0.5), Stage(1.0))
    site.usual = HANGS
    site.is_live(hours=3 / 60)
    with RolloutStore(site.folder) as store:
        store.stop("it is Friday")
    site.is_live(hours=2 / 60)
    assert (site.rollout.phase, site.rollout.why) == (RolloutPhase.STOPPED, "stopped: it is Friday")
    assert sorted(site.withdrawn) == sorted(site.offered) == site.stage(0)
    assert site.coordinator is not None
    site.withdrawn.clear()
    site.report(NAMES[0], STAGED)
    site.report(NAMES[1], STAGED, number=99)
    site.report(NAMES[2], COMMITTED)
    assert list(site.withdrawn) == [NAMES[0]], "what came from a stick is not ours to stop"


def test_a_broker_that_was_away_for_hours_blames_no_board_for_it(site: Site) -> None:
    site.begin(Stage(1.0))
    site.is_live(hours=2 / 60)
    assert site.coordinator is not None
    site.coordinator.on_connection_change(False)
    for _ in range(3 * 60):
        site.now += 60
        site.coordinator.tick()
    site.coordinator.on_connection_change(True)
    assert (site.rollout.phase, site.rollout.failures()) == (RolloutPhase.RUNNING, {})
    site.now += 58 * 60
    site.coordinator.tick()
    assert site.rollout.failures() == {}, "each has its time anew"
    assert site.is_live().phase is RolloutPhase.DONE


@pytest.mark.parametrize(("jump", "restart"), [(2 * 3600, False), (-1.6e9, True)])
def test_a_clock_that_is_set_fails_nobody_and_holds_up_no_deadline(site: Site, jump: float, restart: bool) -> None:
    site.fates = {NAMES[4]: SILENT}
    site.now += 60 * 86_400  # the machine has been up for long
    site.begin(Stage(1.0, success=0.9, errors=0.1))
    site.is_live(hours=2 / 60)
    site.wall += jump
    if restart:
        site.now = 5.0  # the machine's clock that only grows starts again
        site.start()
    site.is_live(hours=0.5)
    assert site.rollout.failures() == {}
    assert site.is_live(hours=1.5).phase is RolloutPhase.DONE
    assert site.rollout.failures() == {NAMES[4]: "said nothing until its deadline"}


def test_a_revoked_board_gets_no_more_files_and_offers_until_it_is_let_in_again(site: Site) -> None:
    site.usual = HANGS
    site.begin(Stage(1.0, success=0.9, errors=0.1))
    site.is_live(hours=1 / 60)
    assert site.coordinator is not None
    site.coordinator.drop_boards([NAMES[2], "stranger"])
    site.coordinator.drop_boards([NAMES[2]])
    site.offered.clear()
    site.is_live(hours=10 / 60)
    assert NAMES[2] not in site.offered
    assert (site.coordinator.downloadable_files(NAMES[2]), bool(site.coordinator.downloadable_files(NAMES[3]))) == (
        frozenset(),
        True,
    )
    site.coordinator.on_birth(NAMES[2])
    assert NAMES[2] in site.offered
    assert site.coordinator.downloadable_files(NAMES[2])


def test_what_a_board_reports_of_another_release_with_this_number_is_not_counted(site: Site) -> None:
    site.usual = ()
    site.begin(Stage(1.0))
    coordinator = site.start()
    coordinator.on_report(ReleaseReport(NAMES[0], 7, COMMITTED, "", 0, 0, "ab" * 32))
    assert site.rollout.boards[NAMES[0]].fate is Fate.GIVEN
    manifest = hashlib.sha256(site.offer().manifest.encode()).hexdigest()
    coordinator.on_report(ReleaseReport(NAMES[0], 7, COMMITTED, "", 0, 0, manifest))
    assert site.rollout.boards[NAMES[0]].fate is Fate.WELL


def test_one_rollout_at_a_time_and_never_a_lower_number(site: Site) -> None:
    assert site.begin() == 1
    with pytest.raises(ConfigError, match="rollout 1, of release 7"):
        site.begin(number=8)
    site.is_live()
    assert site.begin(number=7) == 2
    site.is_live()
    with pytest.raises(ReleaseError, match=r"release 6: .*7 or more"):
        site.begin(number=6)
    with pytest.raises(ConfigError, match="rollout"):
        site.store.stop("nothing")


reports = st.tuples(
    st.sampled_from([*NAMES, "stranger"]), st.sampled_from([*GOOD, ROLLED_BACK, REFUSED]), st.integers(6, 8)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(reports | st.floats(1, 5000) | st.just("restart") | st.just("stop"), max_size=40))
def test_whatever_is_said_in_whatever_order_the_disk_knows_it_and_no_stage_is_skipped(
    release: Path, tmp_path_factory: pytest.TempPathFactory, events: list[Any]
) -> None:
    site = Site(tmp_path_factory.mktemp("site"), release)
    site.begin(Stage(0.2), Stage(0.6, success=0.5, errors=0.5), Stage(1.0, success=0.5, errors=0.5))
    site.start()
    for event in events:
        assert site.coordinator is not None
        if event == "restart":
            site.start()
        elif event == "stop":
            with RolloutStore(site.folder) as store, suppress(ConfigError):
                store.stop("enough")
        elif isinstance(event, float):
            site.now += event
            site.coordinator.tick()
        else:
            site.report(event[0], event[1], event[2])
        rollout = site.rollout
        for name in site.offered:
            assert rollout.boards[name].stage <= max(rollout.stage, 0)
        assert all(b.reason for b in rollout.boards.values() if b.fate is Fate.FAILED)
        if rollout.phase is RolloutPhase.STOPPED:
            assert rollout.why


def test_a_rollout_waits_where_its_files_are_missing_and_can_be_stopped_there(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.begin()
    digest = site.store.blobs.names()[0]
    data = site.store.blobs.read(digest)
    site.store.blobs.delete(digest)
    site.start()
    site.is_live(0.5)
    assert "files of its release are missing" in caplog.text
    assert site.offered == {}
    site.store.blobs.put(data)
    site.start()
    assert site.offered
    site.store.blobs.delete(digest)
    site.start()
    site.store.stop("elsewhere")
    site.is_live(0.1)
    assert site.rollout.phase is RolloutPhase.STOPPED


@pytest.mark.parametrize("restart", [False, True])
def test_boards_that_are_revoked_leave_the_rollout_and_stop_nothing(site: Site, restart: bool) -> None:
    site.fates = dict.fromkeys(NAMES[:5], SILENT)
    site.begin(Stage(1.0, success=0.9, errors=0.1))
    site.is_live(hours=2 / 60)
    site.members -= set(NAMES[:5])
    rollout = site.is_live(restart=restart)
    assert (rollout.phase, rollout.failures(), site.withdrawn) == (RolloutPhase.DONE, {}, {})
    assert {n for n, b in rollout.boards.items() if b.fate is Fate.GONE} == set(NAMES[:5])
