"""The thread that carries out orders on identities and releases: no order ends it, and none waits for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedprune.core.errors import ProtocolError
from fedprune_server.web.state.admin_executor import MOST, Clerk
from fedprune_server.web.state.order_messages import EXPIRED, Answer, Order


def answer(clerk: Clerk) -> Answer:
    return clerk._answers.get(timeout=30)


def test_whatever_comes_of_an_order_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clerk, outcomes = Clerk(tmp_path, None), iter(["a\x1b[1mb" + "x" * 5000, ValueError("a bug"), "well"])

    def carry_out(order: Order) -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(clerk, "carry_out", carry_out)
    for number in (1, 2, 3):
        clerk.give(Order(number, "ann", "deny", device="a"))
    first, second, third = (answer(clerk) for _ in range(3))
    assert (first.ok, first.text[:6]) == (True, "a [1mb")
    assert (second.ok, third) == (False, Answer(3, True, "well"))
    clerk.close()


def test_an_order_that_waited_too_long_behind_others_is_not_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = [5.0], list[int]()

    def carry_out(order: Order) -> str:
        done.append(order.number)
        now[0] += 600.0
        return "well"

    clerk = Clerk(tmp_path, None, lambda: now[0])
    monkeypatch.setattr(clerk, "carry_out", carry_out)
    for number in (1, 2):
        clerk.give(Order(number, "ann", "revoke", device="a", until=600.0))
    assert [answer(clerk), answer(clerk)] == [Answer(1, True, "well"), Answer(2, False, EXPIRED)]
    assert done == [1]
    clerk.close()


def test_no_more_orders_wait_than_can_be_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clerk, begun, go_on = Clerk(tmp_path, None), threading.Event(), threading.Event()

    def carry_out(order: Order) -> str:
        begun.set()
        go_on.wait(30)
        return "well"

    monkeypatch.setattr(clerk, "carry_out", carry_out)
    order = Order(1, "ann", "deny", device="a")
    clerk.give(order)
    assert begun.wait(30)
    for _ in range(MOST):
        clerk.give(order)
    with pytest.raises(ProtocolError, match="orders are waiting"):
        clerk.give(order)
    clerk._closed = True
    go_on.set()
    clerk.close()
    assert answer(clerk).ok
    assert clerk.answer() is None  # those that waited are not begun any more
