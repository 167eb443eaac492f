"""A region that is lost, and a board that moves, hold no round up and cost no update that is there. Where updates are
stored decides no model: in an asynchronous job their order does."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.jobs.state import Phase, Progress
from support.fakes import asynchronous_shell
from support.fakes.asynchronous_shell import KINDS, history
from support.fakes.synchronous_shell import Shell
from support.fakes.tiny_job import JOB, NAMES

pytestmark = pytest.mark.board

NORTH = NAMES[:1]


class Regional(Shell):
    """A shell whose first board is connected through the aggregator `north`."""

    def __init__(self, job: Job = JOB) -> None:
        super().__init__(job)
        self.region, self.away = "north", False
        self.lost: list[do.Command] = []

    def birth(self, name: str) -> on.DeviceBorn:
        return replace(super().birth(name), region=self.region if name in NORTH else "")

    def answer(self, command: do.Command) -> on.Event | None:
        device = _device(command)
        if self.away and device in NORTH:
            self.lost.append(command)
            return None
        event = super().answer(command)
        if isinstance(event, on.UpdateStored):
            event = replace(event, region=self.coordinator.region_of(event.device))
        return event

    def part(self, given_up: str = "") -> None:
        """The aggregator `north` is away, and with it those below it."""
        self.away = True
        for name in NORTH:
            self.feed(on.DeviceDied(name, self.session))
        self.feed(on.Disconnected("north", given_up))

    def back(self) -> None:
        """It is connected again: first what it missed is repeated, then its boards announce themselves."""
        self.away = False
        self.session += 1
        self.feed(on.Reconnected("north"))
        self.inbox += [self.birth(n) for n in NORTH]
        self.run()

    def until(self, progress: Progress) -> None:
        """Let things happen until the part of the region's board is so far."""
        while self.state.phase is not Phase.TRAINING or self.state.tasks[NORTH[0]].progress is not progress:
            self.feed(self.inbox.pop(0))

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.feed(on.Ticked())
        self.run()


def _device(command: do.Command) -> str:
    match command:
        case do.Extract():
            return command.part.device
        case do.Fold():
            return command.contribution.part.device
        case do.SendOffer() | do.PullUpdate() | do.Acknowledge():
            return command.device
    return ""


@pytest.fixture
def shell() -> Regional:
    made = Regional(replace(JOB, deadline_s=60.0))
    made.arrive()
    return made


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_region_that_is_lost_while_it_makes_an_offer_is_as_late_as_any_board(in_flight: int) -> None:
    shell = Regional(replace(JOB, deadline_s=60.0, in_flight=in_flight))
    shell.arrive()
    shell.away = True  # the command gets lost
    while not shell.lost:
        shell.feed(shell.inbox.pop(0))
    shell.part()
    shell.run()
    for _ in range(2 * len(NAMES)):
        shell.later(60.0)
    assert shell.state.history, "the round has closed"
    ended = shell.state.history[0]["devices"]
    assert ended[NORTH[0]]["progress"] == "refused"
    assert all(ended[n]["progress"] == "folded" for n in NAMES[1:])


@pytest.mark.parametrize("progress", [Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING, Progress.STORED])
def test_a_region_that_comes_back_in_time_costs_nothing(shell: Regional, progress: Progress) -> None:
    whole = Regional(replace(JOB, deadline_s=60.0))
    whole.arrive()
    whole.run()
    shell.until(progress)
    inbox, shell.inbox = shell.inbox, []
    shell.inbox = [e for e in inbox if getattr(e, "device", "") not in NORTH]  # what was on its way is lost
    shell.part()
    shell.run()
    shell.back()
    shell.run()
    assert shell.state.phase is Phase.FINISHED
    found = [{n: d["progress"] for n, d in r["devices"].items()} for r in shell.state.history]
    assert found == [dict.fromkeys(NAMES, "folded")] * len(found)
    assert len(found) == len(whole.state.history)


def test_boards_that_a_region_pulls_from_hear_nothing_of_its_link_that_was_away(shell: Regional) -> None:
    shell.until(Progress.PULLING)
    shell.inbox = [e for e in shell.inbox if not isinstance(e, on.UpdateStored) or e.device not in NORTH]
    shell.part()
    shell.away = False
    (name,) = NORTH
    commands = [*shell.feed(on.Reconnected("north")), *shell.feed(shell.birth(name))]  # on the same connection
    assert {type(c) for c in commands} == {do.PullUpdate}
    shell.run()
    assert shell.state.history[0]["devices"][name]["progress"] == "folded"


def test_a_stored_update_waits_for_its_region_until_that_is_given_up(shell: Regional) -> None:
    shell.until(Progress.STORED)
    shell.inbox = [e for e in shell.inbox if not isinstance(e, on.Folded) or e.device not in NORTH]
    shell.part()
    shell.run()
    for _ in range(5):
        shell.later(60.0)
    assert shell.state.phase is Phase.TRAINING
    shell.part("its aggregator north was away for too long")
    shell.run()
    ended = shell.state.history[0]["devices"]
    assert (ended[NORTH[0]]["progress"], ended[NORTH[0]]["kind"]) == ("refused", "late")
    assert "north was away" in ended[NORTH[0]]["reason"]
    assert shell.state.devices[NORTH[0]].failures == 0


@pytest.mark.parametrize("in_flight", [0, 1])
def test_an_offer_that_its_aggregator_cannot_make_does_not_hold_the_round_up(in_flight: int) -> None:
    shell = Regional(replace(JOB, deadline_s=60.0, in_flight=in_flight))
    shell.arrive()
    shell.away = True  # the offer isn't made
    shell.run()
    (name,) = NORTH
    assert shell.state.tasks[name].progress is Progress.EXTRACTING
    attempt = shell.state.tasks[name].attempt
    shell.feed(on.OfferRefused(name, 1, attempt, "blob abc is on no server of the tier", region="north"))
    shell.run()
    for _ in range(2 * len(NAMES)):
        if not shell.state.history:
            shell.later(60.0)
    ended = shell.state.history[0]["devices"]
    assert (ended[name]["progress"], ended[name]["reason"]) == ("refused", "blob abc is on no server of the tier")
    assert all(ended[n]["progress"] == "folded" for n in NAMES[1:])
    assert shell.state.devices[name].failures == 0


def test_the_deadline_comes_if_the_last_offer_cannot_be_made(shell: Regional) -> None:
    shell.away = True
    while not shell.lost:
        shell.feed(shell.inbox.pop(0))
    while shell.state.tasks.count(Progress.EXTRACTING) > 1:
        shell.feed(shell.inbox.pop(0))
    assert shell.state.deadline is None
    shell.feed(on.OfferRefused(NORTH[0], 1, 1, "blob abc is on no server of the tier", region="north"))
    assert shell.state.deadline == shell.now + 60.0


@pytest.mark.parametrize("progress", [Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING])
def test_a_board_that_moves_is_offered_the_same_where_it_is(shell: Regional, progress: Progress) -> None:
    shell.until(progress)
    late = [e for e in shell.inbox if isinstance(e, on.Extracted) and e.device in NORTH]
    shell.inbox = [e for e in shell.inbox if getattr(e, "device", "") not in NORTH]
    shell.region, shell.session = "south", shell.session + 1
    commands = shell.feed(shell.birth(NORTH[0]))
    assert shell.state.devices[NORTH[0]].region == "south"
    assert [_device(c) for c in commands if isinstance(c, do.Extract)] == list(NORTH)
    assert not [c for c in commands if isinstance(c, do.SendOffer)]
    for event in late:  # of the region that it has left
        assert shell.feed(event) == []
    if progress is Progress.PULLING:
        task = shell.state.tasks[NORTH[0]]
        assert task.update is not None
        shell.inbox.append(on.UpdateStored(NORTH[0], 1, task.attempt, task.update["sha256"], "south"))
    shell.run()
    assert shell.state.phase is Phase.FINISHED
    assert all(d["progress"] == "folded" for r in shell.state.history for d in r["devices"].values())
    assert shell.closes[1][0].contributions[0].region == "south"


def report(progress: Progress, attempt: int, region: str) -> on.Event:
    """A region's report that a part has failed at this point."""
    if progress is Progress.OFFERED:
        return on.OfferRefused(NORTH[0], 1, attempt, "no room", region=region)
    return on.UpdateRejected(NORTH[0], 1, attempt, "the board no longer has it", "gone", region)


@pytest.mark.parametrize("progress", [Progress.OFFERED, Progress.PULLING])
def test_a_part_fails_only_where_its_board_is_now(shell: Regional, progress: Progress) -> None:
    shell.until(progress)
    shell.inbox = [e for e in shell.inbox if getattr(e, "device", "") not in NORTH]
    shell.region, shell.session = "south", shell.session + 1
    for event in map(shell.answer, shell.feed(shell.birth(NORTH[0]))):
        if isinstance(event, on.Extracted):
            shell.feed(event)
    task = shell.state.tasks[NORTH[0]]
    assert task.progress is progress
    shell.feed(report(progress, task.attempt, "north"))
    assert task.progress is progress
    assert shell.state.devices[NORTH[0]].failures == 0
    shell.feed(report(progress, task.attempt, "south"))
    assert task.progress is Progress.REFUSED
    assert shell.state.devices[NORTH[0]].failures == 1


def test_an_update_is_not_acknowledged_for_a_region_that_its_board_has_left(shell: Regional) -> None:
    shell.until(Progress.PULLING)
    late = [e for e in shell.inbox if isinstance(e, on.UpdateStored) and e.device in NORTH]
    shell.inbox = [e for e in shell.inbox if e not in late]
    shell.region, shell.session = "south", shell.session + 1
    shell.feed(shell.birth(NORTH[0]))
    assert [shell.feed(e) for e in late] == [[]]  # it may have been deleted there, since nothing refers to it any more
    assert shell.state.tasks[NORTH[0]].progress is Progress.PULLING


def test_a_stored_update_fails_where_it_is_wherever_its_board_is(shell: Regional) -> None:
    shell.until(Progress.STORED)
    shell.inbox = [e for e in shell.inbox if not isinstance(e, on.Folded) or e.device not in NORTH]
    shell.region, shell.session = "south", shell.session + 1
    shell.feed(shell.birth(NORTH[0]))
    task = shell.state.tasks[NORTH[0]]
    shell.feed(report(Progress.STORED, task.attempt, "south"))
    assert task.progress is Progress.STORED
    shell.feed(report(Progress.STORED, task.attempt, "north"))
    assert task.progress is Progress.REFUSED


@pytest.mark.parametrize("lost", ["north/valley", "north"])
def test_a_part_is_in_each_region_of_its_path(shell: Regional, lost: str) -> None:
    shell.region = "north/valley"
    shell.session += 1
    shell.inbox += [shell.birth(n) for n in NORTH]
    shell.until(Progress.STORED)
    shell.inbox = [e for e in shell.inbox if not isinstance(e, on.Folded) or e.device not in NORTH]
    shell.feed(on.Disconnected("north/val", "it was away for too long"))
    shell.feed(on.Disconnected("valley", "it was away for too long"))
    assert shell.state.tasks[NORTH[0]].progress is Progress.STORED
    (again,) = shell.feed(on.Reconnected(lost))
    assert isinstance(again, do.Fold)
    shell.feed(on.Disconnected(lost, "it was away for too long"))
    shell.run()
    assert shell.state.history[0]["devices"][NORTH[0]]["progress"] == "refused"


def test_a_lost_region_costs_no_part_that_is_elsewhere(shell: Regional) -> None:
    shell.until(Progress.EXTRACTING)
    shell.state.devices[NORTH[0]].past = {"region": "south"}
    assert shell.feed(on.Disconnected("south", "it was away for too long")) == []
    assert shell.feed(on.Reconnected("south")) == []
    assert shell.state.tasks[NORTH[0]].progress is Progress.EXTRACTING
    shell.state.devices[NORTH[0]].past = None
    here = NAMES[1]
    while shell.state.tasks[here].progress is not Progress.STORED:
        shell.feed(shell.inbox.pop(0))
    shell.state.devices[here].region = "north"  # where it is by now; its update isn't
    shell.feed(on.Disconnected("north", "it was away for too long"))
    assert shell.state.tasks[here].progress is Progress.STORED


class Scattered(asynchronous_shell.Shell):
    """An asynchronous job whose boards are in these regions."""

    def __init__(self, job: Job, regions: Mapping[str, str]) -> None:
        super().__init__(job)
        self.regions = regions

    def come(self, *names: str) -> None:
        for name in names or NAMES:
            self.sessions[name] += 1
            region = self.regions.get(name, "")
            self.feed(on.DeviceBorn(name, self.sessions[name], {"name": "toy"}, 10, region=region))

    def answer(self, command: do.Command) -> on.Event | None:
        event = super().answer(command)
        if isinstance(event, on.UpdateStored):
            event = replace(event, region=self.coordinator.region_of(event.device))
        return event

    def run_in_order(self, seed: int) -> None:
        """Run with the order of arrival that a seed gives."""
        self.come()
        dice = random.Random(seed)
        while self.state.phase is not Phase.FINISHED:
            if self.inbox:
                self.feed(self.inbox.pop(dice.randrange(len(self.inbox))))
            else:
                self.tick()


@pytest.mark.parametrize("kind", KINDS)
def test_an_asynchronous_job_in_regions_closes_as_on_one_server_that_hears_the_same_order(kind: str) -> None:
    models = set()
    for seed in range(5):
        alone, tier = Scattered(KINDS[kind], {}), Scattered(KINDS[kind], {"a": "north", "b": "north/valley"})
        alone.run_in_order(seed)
        tier.run_in_order(seed)
        assert {c.region for close in tier.closes for c in close.contributions} == {"", "north", "north/valley"}
        here = [
            replace(close, contributions=tuple(replace(c, region="") for c in close.contributions))
            for close in tier.closes
        ]
        assert here == alone.closes
        assert history(tier) == history(alone)
        models.add(history(alone)[-1])
    whole = kind in ("all", "window")  # each round has the updates of all boards, so that nothing is left to order
    assert len(models) == 1 if whole else len(models) > 1
