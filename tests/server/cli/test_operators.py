"""`fedprune-server operators` at the terminal."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

pytest.importorskip("argon2", reason="the extra console is not installed")

from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import main
from fedprune_server.web.audit import Audit
from fedprune_server.web.database import FILE, ConsoleDatabase
from fedprune_server.web.state import status
from fedprune_server.web.state.order_queue import Answer, OrderQueue
from fedprune_server.web.state.status import StatusWriter
from fedprune_server.web.views.formatting import action_text
from support.fakes.console_fleet import ConsoleFleet


def test_what_is_done_at_the_terminal_is_in_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    for words in (["add", "ann", "--role", "admin"], ["password", "ann"], ["remove", "ann"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("a long horse, a battery\n"))
        assert main(["operators", *words, "--state", str(tmp_path)]) == 0

    database = ConsoleDatabase(tmp_path / FILE)
    entries = Audit(database).page().items
    database.close()

    assert [action_text(e) for e in entries] == [
        "remove operator ann", "change the password of ann", "add operator ann as admin",
    ]  # fmt: skip
    assert all((e["address"], e["outcome"]) == ("terminal", "done") and e["operator"] for e in entries)


def test_a_user_without_a_name_is_in_the_audit_log_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user often has no entry in the list of users."""
    tmp_path.chmod(0o700)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    monkeypatch.setattr("sys.stdin", io.StringIO("a long horse, a battery\n"))
    assert main(["operators", "add", "ann", "--state", str(tmp_path)]) == 0

    database = ConsoleDatabase(tmp_path / FILE)
    entries = Audit(database).page().items
    database.close()

    assert [e["operator"] for e in entries] == ["uid 54321"]


@pytest.mark.parametrize(("kind", "said"), [("pause", "job trial is paused"), ("resume", "job trial goes on")])
def test_a_job_is_paused_at_the_terminal_as_at_the_console(
    tmp_path: Path, kind: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o700)
    assert main([kind, "--state", str(tmp_path)]) == ExitCode.CONFIG
    assert "no server that takes orders" in capsys.readouterr().err
    with StatusWriter(tmp_path / status.FILE) as writer, ConsoleDatabase(tmp_path / FILE) as database:
        ConsoleFleet(2, 1).publish(writer)
        queue = OrderQueue(database)

        def serve(_seconds: float) -> None:
            for order in queue.take(1):
                assert (order.order, order.job) == (kind, "trial")
                queue.answer(Answer(order.number, True, said))
            queue.flush()

        monkeypatch.setattr("fedprune_server.cli.operators.time.sleep", serve)
        assert main([kind, "--state", str(tmp_path)]) == ExitCode.OK
        assert capsys.readouterr().out == f"{said}\n"
        (entry,) = Audit(database).page().items
        assert (entry["address"], entry["action"], entry["outcome"]) == ("terminal", kind, f"done: {said}")
        assert main([kind, "--job", "other", "--state", str(tmp_path)]) == ExitCode.CONFIG
    assert "no job other: there is trial" in capsys.readouterr().err
