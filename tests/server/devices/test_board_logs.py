"""What boards tell of their logs is kept once, bounded, and outlasts the server."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedprune.core.errors import StorageError
from fedprune.wire.fleet_messages import CrashReport, LogReport
from fedprune_server.devices import board_logs
from fedprune_server.devices.board_logs import CRASHES, FILE, BoardLogs, frames_of, read_logs


def lines(device: str, *texts: str, first: int = 1) -> LogReport:
    rows = [
        {"number": first + i, "at": 5, "level": "warning", "count": 1 + i, "text": text} for i, text in enumerate(texts)
    ]
    return LogReport(device, tuple(rows))


def crash(device: str, number: int, text: str = "ValueError: no") -> CrashReport:
    frames = ({"module": "fedprune_device.agent.agent", "line": 7, "function": "run"},)
    return CrashReport(device, number, 9, "exception", text, frames, "fedprune 0.1", "a", 3.0, 61.5, 10, 20)


def test_lines_and_crashes_are_kept_once_and_answered(tmp_path: Path) -> None:
    with BoardLogs(tmp_path) as logs:
        assert logs.wanted("a").kept is None
        logs.lines(lines("a", "one", "two"))
        logs.lines(lines("a", "one", "two"))
        logs.crashed(crash("b", 4))
        assert {n: w.kept for n, w in logs.save().items()} == {"a": 2, "b": 4}
        assert logs.save() == {}
        logs.lines(lines("a", "one"))
        assert logs.save()["a"].kept == 2
    with BoardLogs(tmp_path) as again:
        assert again.wanted("a").kept == 2
    found = read_logs(tmp_path)
    assert [(r.device, r.kind, r.text, r.count) for r in found] == [
        ("a", "line", "one", 1),
        ("a", "line", "two", 2),
        ("b", "crash", "ValueError: no", 1),
    ]
    assert frames_of(found[-1]) == ["fedprune_device.agent.agent:7 in run"]
    assert [r.text for r in read_logs(tmp_path, "a", after=1)] == ["two"]
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_a_line_that_was_handed_in_late_is_logged_with_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with BoardLogs(tmp_path) as logs, caplog.at_level("DEBUG", "fedprune.server"):
        logs.lines(lines("a", "no connection"))
        logs.save()
    (row,) = read_logs(tmp_path)
    assert caplog.messages == [f"device a, at {row.stamp} by its clock: no connection"]
    assert row.stamp.startswith(("1969-12-31 ", "1970-01-01 "))


def test_no_board_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_logs, "PER_BOARD", 20)
    monkeypatch.setattr(board_logs, "IN_ALL", 50)
    hour = [0.0]
    with BoardLogs(tmp_path, lines=30, monotonic=lambda: hour[0]) as logs:
        for number in range(0, 400, 8):
            logs.lines(lines("loud", *["x" * 400] * 8, first=number))
        logs.save()
        assert len(read_logs(tmp_path)) == 20
        assert read_logs(tmp_path)[-1].id == 2 * 30 + CRASHES  # no more of an hour was ever written
        for n in range(30):
            logs.crashed(crash("crashes", n))
        for board in range(30):
            hour[0] += 1
            logs.lines(lines(f"b{board}", "y", "z"))
        logs.save()
        assert len(read_logs(tmp_path)) == 50
        assert len(read_logs(tmp_path, "crashes")) <= CRASHES


def test_nothing_that_steers_a_terminal_is_kept(tmp_path: Path) -> None:
    with BoardLogs(tmp_path) as logs:
        logs.lines(lines("a", "one\ntwo\tthree‮four"))
        logs.crashed(crash("a", 9, "no\n2026-01-01 00:00:00 b error: forged"))
        logs.save()
    for row in read_logs(tmp_path):
        assert row.text.isprintable()
        assert "\n" not in str(row)


def test_a_disk_that_fails_costs_lines_and_no_answer_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise StorageError("no room")

    with BoardLogs(tmp_path) as logs:
        monkeypatch.setattr(logs, "_write", fails)
        logs.lines(lines("a", "one"))
        assert logs.save() == {}
        monkeypatch.undo()
        logs.lines(lines("a", "one"))  # the board tells it again
        assert logs.save()["a"].kept == 1
    assert len(read_logs(tmp_path)) == 1


def test_the_loop_goes_on_while_another_program_locks_the_file(tmp_path: Path) -> None:
    with BoardLogs(tmp_path) as logs, closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as program:
        program.execute("BEGIN IMMEDIATE")
        logs.lines(lines("a", "one"))
        assert logs.save() == {}
        program.execute("ROLLBACK")
        logs.lines(lines("a", "one"))  # the board tells it again
        assert logs.save()["a"].kept == 1


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all, but long enough to be one" * 100)
    with pytest.raises(StorageError, match="may be deleted"):
        read_logs(tmp_path)
    with pytest.raises(StorageError, match="may be deleted"):
        BoardLogs(tmp_path)


def test_a_board_whose_clock_is_beyond_all_calendars_can_be_shown(tmp_path: Path) -> None:
    late = LogReport("a", ({"number": 1, "at": 2**63 - 1, "level": "error", "count": 1, "text": "no"},))
    with BoardLogs(tmp_path) as logs:
        logs.lines(late)
        logs.save()
    (found,) = read_logs(tmp_path)
    assert str(found).startswith("9999-12-3")
