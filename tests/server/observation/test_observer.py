"""No observer ends a turn or makes it long, and none misses what has happened."""

import logging
from collections.abc import Sequence

import pytest

from fedprune_server.observation.observer import (
    MAX_DEFERRAL_S,
    MAX_LOOP_SHARE,
    LoopBlocked,
    Observers,
    TurnEvent,
    TurnSaved,
)
from fedprune_server.observation.snapshot import JobSnapshot, LazyMapping
from support.fakes.shown_jobs import TRAINING_SNAPSHOT

OTHER = JobSnapshot(name="other")


class Taking:
    """An observer that takes some seconds for each job, and notes what it has seen."""

    def __init__(self, now: list[float], seconds: float) -> None:
        self._now, self._seconds = now, seconds
        self.seen: list[tuple[str, list[float]]] = []

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self._now[0] += self._seconds
        self.seen.append((snapshot.name, [event.happened_at for event in events]))


class Failing:
    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        raise OSError("no place is left")


def turn(at: float) -> list[tuple[JobSnapshot, list[TurnEvent]]]:
    return [(TRAINING_SNAPSHOT, [TurnEvent(at, TurnSaved(0.1))]), (OTHER, [TurnEvent(at, TurnSaved(0.2))])]


def test_one_that_fails_is_logged_once_and_hides_nothing_from_the_next(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    well = Taking(now, 0.0)
    observers = Observers([Failing(), well], lambda: now[0])
    with caplog.at_level(logging.ERROR, "fedprune.server"):
        for number in range(3):
            observers.show(turn(number))
    assert len(well.seen) == 6
    (line,) = caplog.messages
    assert "Failing" in line
    assert "no place is left" in line


def test_a_slow_one_has_its_share_of_the_time_and_misses_nothing() -> None:
    now = [100.0]
    slow, quick = Taking(now, 0.1), Taking(now, 0.0)
    observers = Observers([slow, quick], lambda: now[0])
    for number in range(1000):
        observers.show(turn(number))
        now[0] += 0.05
    assert len(quick.seen) == 2000
    spent = 0.1 * len(slow.seen)
    assert 0 < spent <= 1.5 * MAX_LOOP_SHARE * (now[0] - 100.0)
    for job in (TRAINING_SNAPSHOT.name, OTHER.name):
        ats = [at for name, times in slow.seen if name == job for at in times]
        assert ats == list(range(len(ats))), "in order, each once"
        assert len(ats) > 900


def test_the_slowest_is_called_again_within_the_time_that_is_promised() -> None:
    now = [0.0]
    slow = Taking(now, 1e6)
    observers = Observers([slow], lambda: now[0])
    observers.show(turn(0))
    now[0] += MAX_DEFERRAL_S
    observers.show(turn(1))
    assert len(slow.seen) == 4


def test_while_the_loop_waits_all_are_called_at_once() -> None:
    now = [0.0]
    slow = Taking(now, 1.0)
    observers = Observers([slow], lambda: now[0])
    observers.show([(TRAINING_SNAPSHOT, [])])
    observers.show([(TRAINING_SNAPSHOT, [TurnEvent(1.0, TurnSaved(0.1))])])
    observers.show([(TRAINING_SNAPSHOT, [TurnEvent(2.0, LoopBlocked())])], at_once=True)
    assert [times for _, times in slow.seen] == [[], [1.0, 2.0]]


def test_an_observer_that_waits_itself_is_not_called_within_its_own_call() -> None:
    calls = []

    class Waiting:
        def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
            calls.append(snapshot.name)
            observers.show(turn(1), at_once=True)

    observers = Observers([Waiting()])
    observers.show([(TRAINING_SNAPSHOT, [])])
    assert calls == [TRAINING_SNAPSHOT.name]


def test_what_is_lazy_is_made_once_and_only_if_somebody_looks() -> None:
    calls: list[int] = []

    def make() -> dict[str, int]:
        calls.append(1)
        return {"a": 1}

    lazy = LazyMapping(make)
    assert calls == []
    assert (dict(lazy), len(lazy), lazy.get("b")) == ({"a": 1}, 1, None)
    assert calls == [1]
