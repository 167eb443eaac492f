"""Which updates and devices a round counts, declines, asks again and leaves out."""

from dataclasses import replace

import pytest

from fedprune.coordination import Phase
from fedprune.coordination import events as on
from support.fakes.synchronous_shell import Shell
from support.fakes.tiny_job import JOB, NAMES

pytestmark = pytest.mark.board


def test_weights_never_sum_to_more_than_sums_hold() -> None:
    shell = Shell(replace(JOB, weight_limit=0.0))
    shell.inbox = [on.DeviceBorn(n, 1, {"name": "toy"}, s) for n, s in zip(NAMES, (2**24, 2**23, 1), strict=True)]
    shell.run()
    weights = [p.weight for p in shell.closes[1][0].contributions]

    assert sum(weights) <= 2**24
    assert weights[0] / weights[1] == pytest.approx(2, rel=1e-4)
    assert weights[2] >= 1


def test_an_update_cannot_say_what_it_counts_for() -> None:
    shell = Shell()
    shell.arrive()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.UpdateAnnounced) and event.device == "a":
            event = replace(event, samples=10**9, steps=10**9)
        shell.feed(event)

    assert {p.weight for p in shell.closes[1][0].contributions} == {10}
    assert max(p.steps for p in shell.closes[1][0].contributions) <= JOB.recipe.steps(10)


@pytest.mark.parametrize("gone", ["", "b"])
def test_who_is_late_is_cancelled_unless_it_is_asked_once_more(gone: str) -> None:
    shell = Shell(replace(JOB, devices=2))
    shell.arrive()
    shell.run_silently()
    if gone:
        shell.feed(on.DeviceDied(gone, shell.session))
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    shell.feed(on.UpdateAnnounced("a", 1, 1, "0", {"sha256": "x"}, 10, 2))  # it was ready a moment too late

    assert set(shell.state.tasks) == {"a", "b", "c"} - {gone}
    assert [n for n, _, _ in shell.cancellations] == [*gone]


def test_an_update_of_an_earlier_run_of_the_job_is_declined() -> None:
    shell = Shell()
    shell.arrive()
    for _ in range(7):
        shell.feed(shell.inbox.pop(0))
    shell.feed(on.UpdateAnnounced("a", 1, 1, "another start", {"sha256": "x"}, 10, 2))

    assert shell.cancellations[-1][:2] == ("a", 1)


def test_a_device_that_keeps_refusing_is_left_out_until_it_connects_again() -> None:
    shell = Shell(replace(JOB, rounds=6, devices=2))
    shell.arrive()
    asked = []
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.UpdateAnnounced) and event.device == "c":
            asked.append(event.round)
            event = on.OfferRefused("c", event.round, event.attempt, "label 7 is out of range")
        shell.feed(event)
    assert asked == [2, 3, 4]  # the first round began before it was there
    assert "label 7" in shell.state.devices["c"].excluded
    shell.feed(on.DeviceBorn("c", 9, {"name": "toy"}, 10))

    assert not shell.state.devices["c"].excluded
    assert shell.state.devices["c"].widths


def test_a_device_without_a_plan_is_left_out() -> None:
    shell = Shell(replace(JOB, density=0.0, devices=1))
    shell.feed(on.DeviceBorn("a", 1, {"name": "no such thing"}, 10))

    assert shell.state.devices["a"].excluded
    assert shell.state.phase is Phase.WAITING


def test_a_rejected_update_does_not_count() -> None:
    shell = Shell()
    shell.arrive()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.Folded) and event.device == "c" and event.round == 1:
            shell.feed(on.UpdateRejected("c", 1, event.attempt, "not finite"))
        shell.feed(event)

    assert [p.part.device for p in shell.closes[1][0].contributions] == ["a", "b"]
    assert shell.state.history[0]["devices"]["c"]["reason"] == "not finite"


def test_death_of_an_earlier_session_is_ignored() -> None:
    shell = Shell(replace(JOB, devices=4))
    shell.feed(on.DeviceBorn("a", 2, {"name": "toy"}, 10))
    shell.feed(on.DeviceDied("a", 1))
    assert shell.state.devices["a"].online
    shell.feed(on.DeviceDied("a", 2))

    assert not shell.state.devices["a"].online
