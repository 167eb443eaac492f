"""Brokers that refuse wills: what is tried, what is remembered, and that a link gets through."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import BrokerError
from fedprune.wire import link as link_module
from fedprune.wire.link import Link
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.will_trial import AGAIN_S, WillTrial
from support.faults.will_broker import NOT_AUTHORIZED, WillBroker

pytestmark = pytest.mark.soak

UNAVAILABLE, BAD_PASSWORD, NOT_ALLOWED, SILENCE = 136, 134, 135, 0


def tried(trial: WillTrial, broker: Callable[[bool], int | None], times: int) -> list[bool]:
    """Which connections had a will at a broker that answers with a code, `SILENCE`, or None for welcome."""
    seen = []
    for _ in range(times):
        seen.append(trial.begin())
        code = broker(seen[-1])
        if code is None:
            trial.accepted()
        elif code != SILENCE:
            trial.refused(code)
        trial.ended()
    return seen


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (UNAVAILABLE, [True, False, False, False]),
        (SILENCE, [True, True, False, True, False, False]),
        (NOT_ALLOWED, [True, True, False, False]),
        (BAD_PASSWORD, [True, True, True, True]),
    ],
)
def test_a_broker_that_refuses_wills_is_connected_to_without(code: int, expected: list[bool]) -> None:
    assert tried(WillTrial(), lambda will: code if will else None, len(expected)) == expected


@pytest.mark.parametrize("silent", range(8))
def test_a_broker_that_was_slow_or_starting_has_the_will_in_the_end(silent: int) -> None:
    """Whatever a connection without one was good for meanwhile."""
    trial = WillTrial()
    left = [SILENCE] * silent
    tried(trial, lambda _: left.pop() if left else None, silent)
    assert tried(trial, lambda _: None, 2)[1]
    assert tried(trial, lambda _: None, 3) == [True] * 3
    assert not trial.pending


def test_the_other_try_is_made_at_once_but_not_again_and_again() -> None:
    """The broker may have gone meanwhile: connections that don't come about neither begin nor end at it."""
    trial = WillTrial()
    tried(trial, lambda _: SILENCE, 2)
    assert not trial.begin()
    assert not trial.accepted()
    trial.ended()
    assert trial.at_once
    assert trial.begin()
    assert not trial.at_once
    assert trial.begin()


@given(st.lists(st.sampled_from([None, UNAVAILABLE, NOT_ALLOWED, BAD_PASSWORD, SILENCE]), max_size=30))
def test_whatever_happens_a_broker_that_takes_wills_gets_one_soon(answers: list[int | None]) -> None:
    """And one that refuses everybody is not asked without a will for ever."""
    now = [0.0]
    trial, left = WillTrial(lambda: now[0]), iter(answers)
    tried(trial, lambda _: next(left), len(answers))
    assert True in tried(trial, lambda _: UNAVAILABLE, 2)
    tried(trial, lambda _: None, 1)
    now[0] += AGAIN_S
    assert tried(trial, lambda _: None, 1) == [True]
    assert not trial.pending


def test_what_was_found_out_is_remembered_for_a_day() -> None:
    now = [0.0]
    trial = WillTrial(lambda: now[0])
    tried(trial, lambda will: UNAVAILABLE if will else None, 2)
    now[0] = AGAIN_S - 1
    assert tried(trial, lambda _: None, 1) == [False]
    now[0] = AGAIN_S
    assert tried(trial, lambda will: UNAVAILABLE if will else None, 3) == [True, False, False]


@pytest.mark.mosquitto
class TestWithMosquitto:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_module, "MAX_DELAY", 0.1)

    @pytest.mark.parametrize(("habit", "code", "first"), [("refuse", 3, 1), ("refuse", NOT_AUTHORIZED, 2)])
    def test_a_link_gets_through_and_remembers(
        self, mosquitto: Any, habit: str, code: int, first: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        broker = WillBroker(mosquitto.port, habit, code)
        with closing(broker), closing(Link(broker.url, "board", will=lambda: ("wills", b"gone"))) as link:
            link.subscribe(["x"])
            link.start()
            assert link.get(30) == ConnectionUp()
            assert link.publish("x", b"hello")
            assert link.get(30) == ("x", b"hello")
            assert broker.wills == [True] * first + [False]
            broker.cut()
            assert isinstance(link.get(30), ConnectionDown)
            assert link.get(30) == ConnectionUp()
            assert broker.wills == [True] * first + [False] * 2
            assert "takes no connection with a will" in caplog.text

    def test_a_broker_that_hangs_up_is_believed_after_one_more_try(self, mosquitto: Any) -> None:
        broker = WillBroker(mosquitto.port, "hang up", 0)
        with closing(broker), closing(Link(broker.url, "board", will=lambda: ("wills", b"gone"))) as link:
            link.start()
            assert link.get(30) == ConnectionUp()
            assert broker.wills == [True, True, False, True, False]

    def test_a_broker_that_only_was_slow_gets_the_will_again(self, mosquitto: Any) -> None:
        broker = WillBroker(mosquitto.port, "hang up", 0)
        broker.then = "none"  # it has started
        with closing(broker), closing(Link(broker.url, "board", will=lambda: ("wills", b"gone"))) as link:
            link.start()
            assert link.get(30) == ConnectionUp()
            assert broker.wills == [True, True, False, True]

    def test_a_broker_that_refuses_everybody_is_named(self, start_mosquitto: Callable[..., Any]) -> None:
        broker = start_mosquitto(settings="listener {port} 127.0.0.1\nallow_anonymous false\n")
        with pytest.raises(BrokerError, match=r"it refuses the connection \(not authorized\)"):
            Link(broker.url, "board", will=("wills", b"gone")).start()
