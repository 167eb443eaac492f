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
from support.faults.will_broker import WillBroker

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


@pytest.mark.mosquitto
class TestWithMosquitto:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_module, "MAX_DELAY", 0.1)

    @pytest.mark.parametrize(("habit", "code", "first"), [("refuse", 3, 1)])
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

    def test_a_broker_that_refuses_everybody_is_named(self, start_mosquitto: Callable[..., Any]) -> None:
        broker = start_mosquitto(settings="listener {port} 127.0.0.1\nallow_anonymous false\n")
        with pytest.raises(BrokerError, match=r"it refuses the connection \(not authorized\)"):
            Link(broker.url, "board", will=("wills", b"gone")).start()
