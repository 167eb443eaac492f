"""Staged rollouts: whatever boards report, whenever, what does badly reaches few and stops with its reasons."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.releases.rollout import Fate, Give, Rollout, RolloutCommand, RolloutPhase, TickAt, Withdraw
from fedprune.releases.rollout_plan import CAREFUL_STAGES, RolloutPlan, Stage

pytestmark = pytest.mark.board

NAMES = [f"board-{i:02}" for i in range(40)]


def plan(*stages: Stage, **changes: Any) -> RolloutPlan:
    return RolloutPlan("7", stages or CAREFUL_STAGES, **changes)


def given_by(commands: list[RolloutCommand]) -> list[str]:
    return [c.board for c in commands if isinstance(c, Give)]


def wake(commands: list[RolloutCommand]) -> float:
    return next(c.at for c in commands if isinstance(c, TickAt))


def test_one_board_then_a_tenth_then_all() -> None:
    rollout = Rollout.for_boards(plan(), NAMES)
    first = given_by(rollout.tick(0))
    assert len(first) == 1
    second = given_by(rollout.report_success(first[0], 10))
    assert len(second) == 3, "four of forty are a tenth"
    third: list[str] = []
    for name in second:
        third += given_by(rollout.report_success(name, 20))
    assert sorted([*first, *second, *third]) == NAMES
    for name in third:
        rollout.report_success(name, 30)
    assert (rollout.phase, rollout.failures()) == (RolloutPhase.DONE, {})


def test_a_rollback_on_the_first_board_stops_all_and_says_why() -> None:
    rollout = Rollout.for_boards(plan(), NAMES)
    first = given_by(rollout.tick(0))[0]
    assert rollout.report_failure(first, "onnxruntime kills\nthe process (SIGILL)", 5) == []
    assert rollout.phase is RolloutPhase.STOPPED
    assert rollout.why == f"stage 1: 1 of 1 board failed ({first}: onnxruntime kills the process (SIGILL))"
    assert rollout.tick(10**9) == []
    assert rollout.report_success(first, 6) == []


def test_a_board_that_says_nothing_has_failed_at_its_deadline() -> None:
    rollout = Rollout.for_boards(plan(board_seconds=60), NAMES)
    commands = rollout.tick(100)
    first = given_by(commands)[0]
    assert wake(commands) == 160
    assert wake(rollout.tick(159.9)) == 160
    rollout.report_success(first, 160)
    assert rollout.failures() == {first: "said nothing until its deadline"}
    assert rollout.phase is RolloutPhase.STOPPED


@pytest.mark.parametrize("paused", [False, True])
def test_a_board_of_an_earlier_stage_that_goes_back_after_all_stops_the_rollout(paused: bool) -> None:
    rollout = Rollout.for_boards(plan(Stage(0.5), Stage(1)), ["a", "b"])
    first = given_by(rollout.tick(0))[0]
    second = given_by(rollout.report_success(first, 1))[0]
    if paused:
        rollout.pause("wait", 2)
    assert rollout.report_failure(first, "it went back", 3) == [Withdraw(second)]
    assert (rollout.phase, rollout.failures()) == (RolloutPhase.STOPPED, {first: "it went back"})


def test_boards_that_come_later_are_in_the_last_stage() -> None:
    rollout = Rollout.for_boards(plan(Stage(0.5), Stage(1)), ["a", "b"])
    first = given_by(rollout.tick(0))[0]
    assert given_by(rollout.add_board("c", 1)) == []
    assert set(given_by(rollout.report_success(first, 2))) == {"a", "b", "c"} - {first}
    assert given_by(rollout.add_board("d", 3)) == ["d"]
    assert rollout.add_board("d", 3) == []


def test_boards_that_leave_count_neither_way() -> None:
    rollout = Rollout.for_boards(plan(Stage(1, success=1, errors=0)), ["a", "b", "c"])
    rollout.tick(0)
    rollout.report_success("a", 1)
    assert given_by(rollout.remove_boards(["a", "b", "stranger"], 2)) == []
    assert (rollout.phase, rollout.failures()) == (RolloutPhase.RUNNING, {})
    rollout.report_success("b", 3)
    assert rollout.boards["b"].fate is Fate.GONE
    rollout.report_success("c", 4)
    assert (rollout.phase, rollout.failures()) == (RolloutPhase.DONE, {})
    assert rollout.remove_boards(["a"], 5) == []
    assert rollout.boards["a"].fate is Fate.WELL


def test_a_board_that_left_and_is_let_in_again_is_a_new_one() -> None:
    rollout = Rollout.for_boards(plan(Stage(0.5), Stage(1)), ["a", "b"])
    first = given_by(rollout.tick(0))[0]
    second = given_by(rollout.remove_boards([first], 1))[0]
    assert {first, second} == {"a", "b"}
    rollout.add_board(first, 2)
    assert (rollout.boards[first].fate, rollout.boards[first].stage) == (Fate.WAITING, 1)
    assert given_by(rollout.report_success(second, 3)) == [first]


def test_somebody_can_stop_it() -> None:
    rollout = Rollout.for_boards(plan(Stage(1)), ["a", "b"])
    rollout.tick(0)
    assert rollout.stop("the wrong\nfile") == [Withdraw("a"), Withdraw("b")]
    assert rollout.why == "stopped: the wrong file"
    assert rollout.stop("again") == []


@st.composite
def plans(draw: st.DrawFn) -> RolloutPlan:
    shares = [*sorted(draw(st.sets(st.floats(0.01, 0.99), max_size=4))), 1.0]
    stages = []
    for share in shares:
        success = draw(st.floats(0.1, 1))
        errors = draw(st.floats(0, max(0.0, min(1 - success, 0.9))))
        stages.append(Stage(share, success, errors, draw(st.floats(1, 500))))
    return RolloutPlan("ab", tuple(stages), draw(st.floats(1, 100)), draw(st.integers(0, 99)))


KINDS = st.sampled_from(["tick", "success", "success", "success", "failure", "new", "removal"])
EVENTS = st.lists(st.tuples(KINDS, st.integers(0, 45), st.floats(0, 40)), max_size=80)


def play(rollout: Rollout, kind: str, name: str, now: float) -> list[RolloutCommand]:
    if kind == "tick":
        return rollout.tick(now)
    if kind == "failure":
        return rollout.report_failure(name, "went back", now)
    if kind == "removal":
        return rollout.remove_boards([name], now)
    return rollout.add_board(name, now) if kind == "new" else rollout.report_success(name, now)


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(1, 40), EVENTS)
def test_whatever_is_reported_no_stage_begins_before_the_last_one_did_well(
    chosen: RolloutPlan, size: int, events: list[tuple[str, int, float]]
) -> None:
    rollout, now, had, left = Rollout.for_boards(chosen, NAMES[:size]), 0.0, set[str](), set[str]()
    commands = rollout.tick(now)
    for kind, number, seconds in [*events, *[("tick", 0, 600.0)] * (len(chosen.stages) + 2)]:
        for name in given_by(commands):
            assert name not in had or name in left, "nobody is given it twice, but who left and came back"
            had.add(name)
        left |= {n for n, b in rollout.boards.items() if b.fate is Fate.GONE}
        for before in range(rollout.stage):
            names = [b for b in rollout.boards.values() if b.stage == before and b.fate is not Fate.GONE]
            once_well = sum(b.fate in (Fate.WELL, Fate.FAILED) for b in names)
            assert once_well >= chosen.stages[before].success * len(names) - 1e-9
        assert all(rollout.boards[n].stage <= rollout.stage for n in had - left), "who came back may wait again"
        if rollout.phase is RolloutPhase.RUNNING:
            assert commands == [] or wake(commands) > now, "it always says when it is to be woken"
            for stage, limits in enumerate(chosen.stages):
                names = [b for b in rollout.boards.values() if b.stage == stage and b.fate is not Fate.GONE]
                assert sum(b.fate is Fate.FAILED for b in names) <= limits.errors * len(names) + 1e-9
        copy = Rollout.from_dict(json.loads(json.dumps(rollout.to_dict())))
        assert copy == rollout
        now += seconds
        name = NAMES[number] if number < len(NAMES) else f"new-{number}"
        stopped = rollout.phase is not RolloutPhase.RUNNING
        commands = play(rollout, kind, name, now)
        assert play(copy, kind, name, now) == commands, "the same events, the same commands"
        assert copy == rollout
        assert not (stopped and commands)
    assert rollout.phase is not RolloutPhase.RUNNING, "every state has a deadline"
    if rollout.phase is RolloutPhase.STOPPED:
        assert rollout.why
        assert re.search(r"boards? failed", rollout.why)
        assert not given_by(commands)
    else:
        assert all(b.fate in (Fate.WELL, Fate.FAILED, Fate.GONE) for b in rollout.boards.values())


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.integers(0, 9))
def test_groups_are_every_board_once_whatever_order_they_come_in(names: set[str], seed: int) -> None:
    chosen = plan(seed=seed)
    groups = chosen.groups(sorted(names))
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert groups == chosen.groups(sorted(names, reverse=True))
    assert len(groups[0]) == 1


def test_a_board_that_is_on_its_way_gets_more_time_but_never_beyond_its_stage() -> None:
    rollout = Rollout.for_boards(plan(Stage(1.0, seconds=1000), board_seconds=100), NAMES[:2])
    rollout.tick(0)
    rollout.report_progress(NAMES[0], 90, 100)
    rollout.tick(100)
    assert rollout.failures() == {NAMES[1]: "said nothing until its deadline"}
    rollout = Rollout.for_boards(plan(Stage(1.0, seconds=1000), board_seconds=100), NAMES[:1])
    rollout.tick(0)
    for now in range(50, 1000, 50):
        assert wake(rollout.report_progress(NAMES[0], now, 100)) == min(now + 100, 1000)
    rollout.report_success(NAMES[0], 1000)
    assert rollout.failures() == {NAMES[0]: "its stage's time is over"}
    rollout.report_progress(NAMES[0], 1001, 100)
    assert rollout.phase is RolloutPhase.STOPPED


def test_boards_get_their_time_anew_after_nobody_could_listen() -> None:
    rollout = Rollout.for_boards(plan(Stage(0.5, success=0.5, seconds=1000), Stage(1.0), board_seconds=100), NAMES[:4])
    rollout.report_success(given_by(rollout.tick(0))[0], 10)
    assert wake(rollout.restore_deadlines(5000)) == 5100
    assert rollout.failures() == {}
    rollout.tick(5100)
    assert len(rollout.failures()) == 3
    before = rollout.to_dict()
    assert rollout.restore_deadlines(9000) == []
    assert rollout.to_dict() == before, "what is over stays over"


def test_a_paused_rollout_gives_nothing_further_and_what_is_under_way_ends() -> None:
    rollout = Rollout.for_boards(plan(Stage(0.5), Stage(1)), ["a", "b", "c", "d"])
    first = given_by(rollout.tick(0))
    rollout.pause("a storm\nis coming", 1)
    assert (rollout.phase, rollout.why) == (RolloutPhase.PAUSED, "paused: a storm is coming")
    rollout = Rollout.from_dict(json.loads(json.dumps(rollout.to_dict())))
    for name in first:
        assert given_by(rollout.report_success(name, 2)) == []
    assert rollout.add_board("e", 3) == [TickAt(float("inf"))]
    assert given_by(rollout.tick(10**6)) == []
    assert rollout.failures() == {}
    assert sorted(given_by(rollout.resume(10**6))) == sorted({"a", "b", "c", "d", "e"} - set(first))
    assert (rollout.phase, rollout.why) == (RolloutPhase.RUNNING, "")


def test_a_board_that_joins_the_last_stage_during_a_pause_has_its_time_afterwards() -> None:
    rollout = Rollout.for_boards(plan(Stage(1, seconds=100), board_seconds=60), ["a"])
    rollout.tick(0)
    rollout.pause("wait", 1)
    rollout.add_board("late", 2)
    rollout.report_success("a", 3)
    assert rollout.phase is RolloutPhase.PAUSED
    commands = rollout.resume(1000)
    assert (given_by(commands), wake(commands)) == (["late"], 1060)


steps = st.lists(
    st.tuples(st.sampled_from(["pause", "go_on", "tick", "join"]), st.just(""))
    | st.tuples(st.sampled_from(["well", "failed", "without"]), st.sampled_from(NAMES[:6])),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(steps)
def test_whatever_happens_nothing_is_given_while_it_is_paused(events: list[tuple[str, str]]) -> None:
    rollout = Rollout.for_boards(plan(Stage(0.4, 0.5, 0.5), Stage(1, 0.5, 0.5)), NAMES[:6])
    for now, (what, name) in enumerate(events):
        paused = rollout.phase is RolloutPhase.PAUSED
        commands: list[RolloutCommand] = {
            "pause": lambda now=now: rollout.pause("x", now), "go_on": lambda now=now: rollout.resume(now),
            "tick": lambda now=now: rollout.tick(now), "join": lambda now=now: rollout.add_board(f"new-{now}", now),
            "well": lambda now=now, name=name: rollout.report_success(name, now),
            "failed": lambda now=now, name=name: rollout.report_failure(name, "bad", now),
            "without": lambda now=now, name=name: rollout.remove_boards([name], now),
        }[what]()  # fmt: skip
        assert not (paused and what != "go_on" and given_by(commands))
        assert Rollout.from_dict(json.loads(json.dumps(rollout.to_dict()))) == rollout
    if rollout.phase.is_under_way:
        rollout.resume(100)
        assert [n for n, b in rollout.boards.items() if b.fate is Fate.WAITING and b.stage <= rollout.stage] == []


def apply_step(rollout: Rollout, kind: str, name: str, now: float) -> list[RolloutCommand]:
    match kind:
        case "well":
            return rollout.report_success(name, now)
        case "failed":
            return rollout.report_failure(name, "bad", now)
        case "join":
            return rollout.add_board(name, now)
        case "without":
            return rollout.remove_boards([name], now)
    return rollout.tick(now)


@settings(deadline=None)
@given(plans(), st.integers(1, 40), EVENTS)
def test_what_is_counted_along_is_what_counting_anew_gives(
    plan: RolloutPlan, count: int, events: list[tuple[str, int, float]]
) -> None:
    rollout, now = Rollout.for_boards(plan, NAMES[:count]), 0.0
    rollout.mark_saved()
    saved = {name: board.to_dict() for name, board in rollout.boards.items()}
    for kind, number, seconds in events:
        name, now = f"board-{number:02}", now + seconds
        anew = Rollout.from_dict(json.loads(json.dumps(rollout.to_dict())))
        assert apply_step(rollout, kind, name, now) == apply_step(anew, kind, name, now)
        assert rollout == anew
        assert (rollout.stage_count, rollout.busy_boards.keys()) == (anew.stage_count, anew.busy_boards.keys())
        # The rows of those that have changed are enough to save.
        saved |= {name: rollout.boards[name].to_dict() for name in rollout.changed_boards}
        rollout.mark_saved()
        assert Rollout.from_dict({**rollout.to_dict_without_boards(), "boards": saved}) == rollout
