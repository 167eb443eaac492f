"""The thread that carries out orders on identities and releases: no order ends it, and none waits for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedprune.core.errors import ProtocolError
from fedprune_server.web.state.admin_executor import MOST, AdminExecutor
from fedprune_server.web.state.order_queue import EXPIRED, Answer, Order


def answer(executor: AdminExecutor) -> Answer:
    return executor._answers.get(timeout=30)


def test_whatever_comes_of_an_order_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, outcomes = AdminExecutor(tmp_path, None), iter(["a" + "x" * 5000, ValueError("a bug"), "well"])

    def carry_out(order: Order) -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(executor, "carry_out", carry_out)
    for number in (1, 2, 3):
        executor.submit(Order(number, "ann", "deny", device="a"))
    first, second, third = (answer(executor) for _ in range(3))
    assert first == Answer(1, True, "a" + "x" * 5000)
    assert (second.ok, third) == (False, Answer(3, True, "well"))
    executor.close()


def test_an_order_that_waited_too_long_behind_others_is_not_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = [5.0], list[int]()

    def carry_out(order: Order) -> str:
        done.append(order.number)
        now[0] += 600.0
        return "well"

    executor = AdminExecutor(tmp_path, None, lambda: now[0])
    monkeypatch.setattr(executor, "carry_out", carry_out)
    for number in (1, 2):
        executor.submit(Order(number, "ann", "revoke", device="a", until=600.0))
    assert [answer(executor), answer(executor)] == [Answer(1, True, "well"), Answer(2, False, EXPIRED)]
    assert done == [1]
    executor.close()


def test_no_more_orders_wait_than_can_be_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, begun, go_on = AdminExecutor(tmp_path, None), threading.Event(), threading.Event()

    def carry_out(order: Order) -> str:
        begun.set()
        go_on.wait(30)
        return "well"

    monkeypatch.setattr(executor, "carry_out", carry_out)
    order = Order(1, "ann", "deny", device="a")
    executor.submit(order)
    assert begun.wait(30)
    for _ in range(MOST):
        executor.submit(order)
    with pytest.raises(ProtocolError, match="orders are waiting"):
        executor.submit(order)
    executor._closed = True
    go_on.set()
    executor.close()
    assert answer(executor).ok
    assert list(executor.answers()) == []  # those that waited are not begun any more
