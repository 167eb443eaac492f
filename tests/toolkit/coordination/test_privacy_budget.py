"""The ledger of privacy: what counts, when, at which multiplier, and that a job can't forget it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination import Phase, State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.privacy_budget import JobPrivacyBudget, count_holders, release_cost
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune.model.selection import Selection
from fedprune.updates.privacy import Privacy
from fedprune.updates.privacy_cost import epsilon_for
from support.fakes import tiny_job as toy
from support.fakes.coordinator_shell import MaskingShell, Shell
from support.fakes.strategy_rounds import NET, TRAINED

pytestmark = pytest.mark.board

LOCAL = Privacy(clip=1.0, noise_multiplier=2.0)
SHARED = Privacy(clip=1.0, noise_multiplier=2.0, noise="shared", boards=2)


class Fleet(Shell):
    """Three boards that deliver, but for those that are silent; every evaluation says what it is told."""

    def __init__(self, job: Job, silent: tuple[str, ...] = ()) -> None:
        super().__init__(job)
        self.silent, self.evaluations = silent, list[do.Evaluate]()
        self.session = 0

    def arrive(self) -> None:
        self.session += 1
        self.inbox += [on.DeviceBorn(n, self.session, {"name": "toy"}, 10 * (1 + i)) for i, n in enumerate(toy.NAMES)]

    def answer(self, command: do.Command) -> on.Event | None:
        match command:
            case do.SendOffer() if command.device in self.silent:
                return None
            case do.Evaluate():
                self.evaluations.append(command)
                return on.Evaluated(command.round, {"epsilon_next": 1e3 * (command.foreseen or 0.0)})
        return super().answer(command)

    def run(self) -> None:
        self.arrive()
        for _ in range(2000):
            if self.state.phase is Phase.FINISHED:
                return
            if not self.inbox:
                self.now = min(w for w in self.wakes if w > self.now)
                self.inbox.append(on.Ticked())
            self.feed(self.inbox.pop(0))

    @property
    def releases(self) -> dict[str, dict[str, int]]:
        return {n: d.releases for n, d in self.state.devices.items()}


@pytest.mark.parametrize("schedule", [{}, {"kind": "async", "arrivals": 3}])
def test_local_noise_counts_with_every_offer(schedule: dict[str, Any]) -> None:
    job = replace(toy.JOB, strategy="fedavg", density=0.0, options={"densities": [1.0]}, schedule=schedule)
    fleet = Fleet(replace(job, privacy=LOCAL))
    fleet.run()
    rounds = fleet.evaluations[-1].round
    assert fleet.releases == {n: {"2.0": rounds} for n in toy.NAMES}
    assert (fleet.evaluations[-1].spent, fleet.evaluations[-1].foreseen) == (rounds / 4, (rounds + 1) / 4)


def test_shared_noise_counts_for_who_delivered_at_the_noise_that_was_there() -> None:
    fleet = Fleet(replace(toy.JOB, privacy=SHARED), silent=("b",))
    fleet.run()
    # Two of three delivered, one of which may be curious: one board's part of the noise remains.
    remaining_noise = {repr(2 * math.sqrt(1 / 2)): 3}
    assert fleet.releases == {"a": remaining_noise, "b": {}, "c": remaining_noise}
    complete_fleet = Fleet(replace(toy.JOB, privacy=SHARED))
    complete_fleet.run()
    assert complete_fleet.releases == {n: {"2.0": 3} for n in toy.NAMES}


class Cohorts(MaskingShell, Fleet):
    """Five boards in two secure sums; or, without masks, in one plain sum."""

    NAMES = ("a", "b", "c", "d", "e")
    SUMS = (NAMES[:3], NAMES[3:])

    def arrive(self) -> None:
        self.session += 1
        self.inbox += [on.DeviceBorn(name, self.session, {"name": "toy"}, 10) for name in self.NAMES]

    def answer(self, command: do.Command) -> on.Event | None:
        if isinstance(command, do.SumMasked):
            sums = [{"total": "0", "narrow": 0, "devices": list(cohort)} for cohort in self.SUMS]
            return on.Unmasked(command.round, sums, {})
        return super().answer(command)


def test_with_secure_aggregation_only_the_noise_of_its_own_cohort_counts_for_a_board() -> None:
    job = replace(toy.JOB, devices=5, privacy=SHARED)
    fleet = Cohorts(replace(job, secure_aggregation=True))
    fleet.run()
    # The server sees both sums: one has the noise of three boards, the other that of two; one of each may be curious.
    three, two = {"2.0": 3}, {repr(2 * math.sqrt(1 / 2)): 3}
    assert fleet.releases == {"a": three, "b": three, "c": three, "d": two, "e": two}
    together = Cohorts(job)
    together.run()
    assert together.releases == {name: {repr(2 * math.sqrt(4 / 2)): 3} for name in Cohorts.NAMES}


def test_all_boards_count_alike_under_privacy() -> None:
    for privacy, weights in ((Privacy(), {10, 20}), (LOCAL, {1}), (Privacy(clip=1.0), {1})):
        fleet = Fleet(replace(toy.JOB, privacy=privacy))
        fleet.run()
        assert {t.weight for t in fleet.state.tasks.values()} == weights


def test_a_budget_ends_the_job_before_it_is_overdrawn() -> None:
    # The shell says an ε of a thousand times what was spent: 250 a round.
    fleet = Fleet(replace(toy.JOB, rounds=9, privacy=replace(LOCAL, epsilon_budget=750.0)))
    fleet.run()
    assert [c.round for c in fleet.evaluations] == [1, 2, 3]
    assert fleet.state.phase is Phase.FINISHED
    richer_job = make_coordinator(
        replace(fleet.job, privacy=replace(LOCAL, epsilon_budget=1e4)), toy.ARCHITECTURE, fleet.state
    )
    richer_job.resume(fleet.now)
    assert richer_job.state.phase is Phase.WAITING  # with more to spend it continues


class Accounted(Fleet):
    """Every evaluation says the ε that there is; one board is silent from a round on."""

    def __init__(self, job: Job, silent_from: int = 99) -> None:
        super().__init__(job)
        self.silent_from = silent_from

    def answer(self, command: do.Command) -> on.Event | None:
        if isinstance(command, do.SendOffer) and command.round >= self.silent_from and command.device == "b":
            return None
        if isinstance(command, do.Evaluate):
            return on.Evaluated(command.round, {"epsilon_next": epsilon_for(command.foreseen or 0.0, SHARED.delta)})
        return super().answer(command)


def test_sums_of_too_few_are_shown_to_nobody_where_that_would_overdraw_the_budget() -> None:
    # Four rounds of all three boards are within it; without the part of the noise of one the fourth isn't.
    job = replace(toy.JOB, rounds=9, privacy=replace(SHARED, epsilon_budget=epsilon_for(4 / 4 + 0.01, SHARED.delta)))
    for silent_from, rounds in ((99, 4), (4, 3)):
        fleet = Accounted(job, silent_from)
        fleet.run()
        assert fleet.state.phase is Phase.FINISHED
        assert [h["model"] for h in fleet.state.history] == [f"m{r + 1}" for r in range(rounds)]
        assert (fleet.state.model, fleet.state.round) == (f"m{rounds}", rounds)
        assert fleet.releases == {n: {"2.0": rounds} for n in toy.NAMES}
        saved_state = fleet.state.to_json()
        for settings in (job, replace(job, rounds=20)):  # nobody trains for nothing after a restart
            restarted = make_coordinator(settings, toy.ARCHITECTURE, State.from_json(saved_state))
            (end,) = restarted.resume(fleet.now)
            assert isinstance(end, do.Finish)
            assert end.model == f"m{rounds}"
            assert end.reason.startswith(f"ended after round {rounds} of ")
            assert restarted.state.phase is Phase.FINISHED
        richer_job = make_coordinator(
            replace(job, privacy=replace(SHARED, epsilon_budget=9.0)), toy.ARCHITECTURE, restarted.state
        )
        richer_job.resume(fleet.now)
        assert richer_job.state.phase is Phase.WAITING


@pytest.mark.parametrize("privacy", [LOCAL, SHARED])
def test_a_crash_counts_nothing_twice_and_forgets_nothing(privacy: Privacy) -> None:
    job = replace(toy.JOB, rounds=2, privacy=privacy)
    uninterrupted = Fleet(job)
    uninterrupted.run()
    for at in range(1, 40):
        fleet = Fleet(job)
        fleet.arrive()
        for _ in range(at):
            if fleet.inbox:
                fleet.feed(fleet.inbox.pop(0))
        fleet.crash()
        for _ in range(200):
            if fleet.inbox:
                fleet.feed(fleet.inbox.pop(0))
        assert fleet.state.phase is Phase.FINISHED
        assert fleet.releases == uninterrupted.releases, at


@pytest.mark.parametrize(("before", "after"), [(LOCAL, Privacy()), (Privacy(), LOCAL), (Privacy(clip=1.0), LOCAL)])
def test_a_job_is_private_from_its_first_round_to_its_last(before: Privacy, after: Privacy) -> None:
    fleet = Fleet(replace(toy.JOB, privacy=before))
    fleet.run()
    with pytest.raises(ConfigError, match="noise_multiplier"):
        make_coordinator(replace(toy.JOB, privacy=after), toy.ARCHITECTURE, State.from_json(fleet.state.to_json()))


@pytest.mark.parametrize("devices", [{}, {"a": JobDevice(1, True, {}, None, 10)}])
def test_a_model_that_is_evaluated_before_any_release_has_cost_nothing(devices: dict[str, JobDevice]) -> None:
    budget = JobPrivacyBudget(State("m0", devices=devices), LOCAL)  # type: ignore[arg-type]
    assert (budget.largest_cost(), budget.largest_cost_after_next()) == (0.0, 1 / LOCAL.noise_multiplier**2)


@given(st.lists(st.tuples(*(st.integers(1, n) for n in NET.sizes)), min_size=1, max_size=5), st.data())
def test_no_coordinate_of_a_board_has_less_noise_than_it_is_credited(
    widths: list[tuple[int, ...]], data: st.DataObject
) -> None:
    kinds = data.draw(st.lists(st.integers(0, 1), min_size=len(widths), max_size=len(widths)))
    orders = [tuple(np.array(data.draw(st.permutations(range(n)), "rank")) for n in NET.sizes) for _ in range(2)]
    full_selections = [Selection.of(NET, NET.sizes, order) for order in orders]
    board_selections = {
        str(i): full_selections[kind].with_widths(w) for i, (kind, w) in enumerate(zip(kinds, widths, strict=True))
    }
    tasks = {
        name: DeviceTask(1, w, offer={"ranking": str(kind), "widths": list(w)})
        for (name, w, kind) in zip(board_selections, widths, kinds, strict=True)
    }
    coverage = {}
    for name, selection in board_selections.items():
        marks = {}
        for tensor in TRAINED:
            marks[tensor] = np.zeros(NET.by_name[tensor].shape, int)
            marks[tensor][np.ix_(*selection.maps(tensor))] = 1
        coverage[name] = marks
    for name, credited in count_holders(tasks).items():
        fewest = min(
            int(sum(board_marks[t] for board_marks in coverage.values())[coverage[name][t] == 1].min()) for t in TRAINED
        )
        assert 1 <= credited <= fewest


@pytest.mark.parametrize("kind", ["synchronous", "async"])
def test_a_round_that_begins_again_and_again_overdraws_no_budget(kind: str) -> None:
    privacy = replace(LOCAL, epsilon_budget=4.0)
    schedule: dict[str, Any] = {} if kind == "synchronous" else {"schedule": {"kind": kind}}
    fleet = Fleet(replace(toy.JOB, privacy=privacy, rounds=50, **schedule), silent=tuple(toy.NAMES))
    fleet.run()
    costs = [release_cost(d.releases) for d in fleet.state.devices.values()]
    assert all(epsilon_for(c, 1e-5) <= 4.0 < epsilon_for(c + 0.25, 1e-5) for c in costs)
    assert fleet.state.phase is Phase.FINISHED
    assert fleet.state.round == 0
