"""`fedprune-server operators` at the terminal."""

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("argon2", reason="the extra console is not installed")

from fedprune.core.disk import file_lock
from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import main
from fedprune_server.cli.operators import wait_for_answer
from fedprune_server.web.audit import Audit
from fedprune_server.web.auth.accounts import Operator
from fedprune_server.web.auth.sessions import OperatorSession
from fedprune_server.web.database import CONSOLE_FILE, ConsoleDatabase
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.order_queue import EXPIRED, WITHDRAWN, OrderAnswer, OrderQueue
from fedprune_server.web.state.orders import OrderService
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter
from fedprune_server.web.views.formatting import action_text
from support.fakes.console_fleet import ConsoleFleet
from support.fakes.recorded_job import play_job
from support.waiting import until


@pytest.fixture
def database(tmp_path: Path) -> Iterator[ConsoleDatabase]:
    """The console's database of a server that runs a job and takes orders."""
    tmp_path.chmod(0o700)
    with StatusWriter(tmp_path / STATUS_FILE) as writer, ConsoleDatabase(tmp_path / CONSOLE_FILE) as opened:
        ConsoleFleet(2, 1).publish(writer)
        yield opened


@pytest.fixture
def orders(tmp_path: Path, database: ConsoleDatabase) -> Iterator[OrderService]:
    with FleetView(tmp_path / STATUS_FILE) as view:
        yield OrderService(view, Audit(database), database)


def send_order(orders: OrderService, kind: str = "pause") -> int:
    session = OperatorSession(Operator("ann", "operator", 0.0, 0.0), "", "")
    return orders.give(session, "terminal", {"order": kind, "job": "trial"}, 30.0)


def wait_past_limit(orders: OrderService, number: int, while_it_sleeps: Callable[[], None]) -> dict[str, Any] | None:
    """The answer to an order, on a clock that passes the limit during the first sleep."""
    clock = [0.0]

    def sleep(_seconds: float) -> None:
        clock[0] = float("inf")
        while_it_sleeps()

    return wait_for_answer(orders, number, lambda: clock[0], sleep)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_is_done_at_the_terminal_is_in_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    for words in (["add", "ann", "--role", "admin"], ["password", "ann"], ["remove", "ann"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("a long horse, a battery\n"))
        assert main(["operators", *words, "--state", str(tmp_path)]) == 0

    database = ConsoleDatabase(tmp_path / CONSOLE_FILE)
    entries = Audit(database).page().items
    database.close()

    assert [action_text(e) for e in entries] == [
        "remove operator ann", "change the password of ann", "add operator ann as admin",
    ]  # fmt: skip
    assert all((e["address"], e["outcome"]) == ("terminal", "done") and e["operator"] for e in entries)


@pytest.fixture(autouse=True)
def running(tmp_path: Path) -> Iterator[None]:
    with file_lock(tmp_path / "lock", "busy", "wait"):
        yield


def test_a_job_that_no_server_runs_is_not_paused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    assert main(["pause", "--state", str(state)]) == ExitCode.STORAGE
    play_job(state)
    assert main(["pause", "--state", str(state)]) == ExitCode.CONFIG
    assert f"no server runs on {state}" in capsys.readouterr().err


def test_a_server_without_a_console_takes_no_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pause", "--state", str(tmp_path)]) == ExitCode.CONFIG
    assert "console" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "message"), [("pause", "job trial is paused"), ("resume", "job trial goes on")])
def test_a_job_is_paused_at_the_terminal_as_at_the_console(
    tmp_path: Path, database: ConsoleDatabase, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve() -> None:
        with ConsoleDatabase(tmp_path / CONSOLE_FILE) as server_database:
            queue = OrderQueue(server_database)
            (order,) = until(lambda: queue.take(1))
            assert (order.kind, order.job) == (kind, "trial")
            queue.answer(OrderAnswer(order.number, True, message))
            queue.flush()

    server = threading.Thread(target=serve)
    server.start()
    assert main([kind, "--state", str(tmp_path)]) == ExitCode.OK
    server.join()
    assert capsys.readouterr().out == f"{message}\n"
    (entry,) = Audit(database).page().items
    assert (entry["address"], entry["action"], entry["outcome"]) == ("terminal", kind, f"done: {message}")
    assert main([kind, "--job", "other", "--state", str(tmp_path)]) == ExitCode.CONFIG
    assert "no job other" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_order_that_the_server_does_not_take_in_time_is_withdrawn(
    database: ConsoleDatabase, orders: OrderService, interrupted: bool
) -> None:
    number = send_order(orders)
    if interrupted:
        with pytest.raises(KeyboardInterrupt, match=WITHDRAWN):
            wait_past_limit(orders, number, interrupt)
    else:
        answer = wait_past_limit(orders, number, lambda: None)
        assert answer is not None
        assert answer["text"] == WITHDRAWN
    assert OrderQueue(database).take(1) == []
    (entry,) = Audit(database).page().items
    assert (entry["action"], entry["outcome"]) == ("pause", WITHDRAWN)


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_order_that_the_server_has_taken_is_not_withdrawn(
    database: ConsoleDatabase, orders: OrderService, interrupted: bool
) -> None:
    queue, number = OrderQueue(database), send_order(orders)

    def take() -> None:
        assert len(queue.take(1)) == 1
        if interrupted:
            raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt, match="taken"):
            wait_past_limit(orders, number, take)
    else:
        answer = wait_past_limit(orders, number, take)
        assert answer is not None
        assert answer["state"] != "done"
    queue.answer(OrderAnswer(1, True, "job trial is paused"))
    queue.flush()
    (entry,) = Audit(database).page().items
    assert entry["outcome"] == "done: job trial is paused"


def test_an_order_of_a_terminal_that_was_killed_expires(
    tmp_path: Path, database: ConsoleDatabase, orders: OrderService
) -> None:
    send_order(orders)
    (row,) = database.rows("SELECT at, until, state FROM orders")
    assert (row["until"] - row["at"], row["state"]) == (pytest.approx(30.0), "waiting")
    later = row["at"] + 31.0
    assert OrderQueue(database, lambda: later).take(1) == []
    with FleetView(tmp_path / STATUS_FILE) as view:
        OrderService(view, Audit(database), database, lambda: later + 60.0).expire()
    (entry,) = Audit(database).page().items
    assert (entry["action"], entry["outcome"]) == ("pause", EXPIRED)
