"""What boards tell of their logs, through a daemon and through a host of several jobs, and boards that know nothing of
it; and that watching a job changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedprune.wire.fleet_messages import LOG, CrashReport, LogReport, LogRequest
from fedprune.wire.messages import Birth, parse
from fedprune_server.devices.board_logs import BoardLogs, read_logs
from fedprune_server.monitoring.metrics import Metrics
from support.fakes.fleet import Fleet, ToyDevice
from support.fakes.several_jobs import SeveralJobs, named
from support.fakes.tiny_job import JOB


def talkative(board: ToyDevice) -> None:
    """Let a toy tell a crash and a line, twice each, when it is asked."""
    birth, hear = board.birth, board.hear
    board.abilities = (LOG,)

    def born() -> None:
        birth()
        said = board.air.inbox.pop()
        message: Any = parse(said[1])  # type: ignore[index]
        body = {**vars(message), "abilities": (LOG,)}
        board.say(Birth(**body))

    def heard(topic: str, payload: bytes) -> None:
        hear(topic, payload)
        last = board.heard[-1] if board.heard else None
        if isinstance(last, LogRequest) and last.kept is None:
            line = {"number": 8, "at": 1, "level": "warning", "count": 2, "text": f"{board.name} is hot"}
            for _ in range(2):
                board.say(CrashReport(board.name, 7, 1, "killed", "no memory", (), "fedprune", ""))
                board.say(LogReport(board.name, (line,)))

    board.birth, board.hear = born, heard  # type: ignore[method-assign]


def wanted(board: ToyDevice) -> list[int | None]:
    return [m.kept for m in board.heard if isinstance(m, LogRequest)]


@pytest.mark.parametrize("several", [False, True])
def test_boards_tell_those_that_ask_and_older_ones_say_nothing(tmp_path: Path, several: bool) -> None:
    jobs = [named(JOB, "one", rounds=1), named(JOB, "two", rounds=1)]
    made: Any = SeveralJobs(tmp_path / "several", jobs, "abc") if several else Fleet(tmp_path / "alone", JOB)
    talkative(made.air.devices["a"])
    with BoardLogs(tmp_path) as logs:
        if several:
            made.run(made.host(logs=logs))
        else:
            made.run(logs=logs)
    told = read_logs(tmp_path)
    assert {(r.device, r.text, r.count) for r in told} == {
        ("a", "no memory", 1),
        ("a", "a is hot", 2),
    }
    assert len(told) == 2
    assert wanted(made.air.devices["a"])[0] is None
    assert wanted(made.air.devices["a"])[-1] == 8
    assert wanted(made.air.devices["b"]) == []


def test_a_server_that_keeps_no_logs_asks_for_none_and_is_told_in_vain(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    board = fleet.air.devices["a"]
    board.abilities = (LOG,)
    board.say(CrashReport("a", 7, 1, "killed", "no memory", (), "fedprune", ""))
    fleet.run()
    assert wanted(board) == []


def test_nobody_else_tells_for_a_board_and_strangers_are_not_kept(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    report = CrashReport("stranger", 7, 1, "killed", "no memory", (), "fedprune", "")
    fleet.air.to_server("fedprune/1/default/stranger/-/up", report.to_bytes())
    fleet.air.to_server("fedprune/1/default/a/-/up", report.to_bytes())
    with BoardLogs(tmp_path) as logs:
        fleet.run(logs=logs)
    assert read_logs(tmp_path) == []


def test_watching_changes_nothing_and_counts_what_happened(tmp_path: Path) -> None:
    plain = Fleet(tmp_path / "plain", JOB).run()
    metrics = Metrics()
    watched = Fleet(tmp_path / "watched", JOB).run(observers=[metrics.watch(JOB.name)])
    assert watched.model == plain.model
    text = metrics.text().decode()
    folded = sum(p["progress"] == "folded" for r in plain.history for p in r["devices"].values())
    assert f'fedprune_updates_counted_total{{job="{JOB.name}"}} {folded:.1f}' in text
    assert f'fedprune_rounds_finished_total{{job="{JOB.name}"}} {len(plain.history):.1f}' in text
    assert "fedprune_loop_turn_seconds_bucket" in text
