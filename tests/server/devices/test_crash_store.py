"""Crashes that boards report are kept once, bounded, and outlast the server."""

import sqlite3
from contextlib import closing
from pathlib import Path

from fedprune.wire.fleet_messages import CrashReport, CrashStored
from fedprune.wire.messages import MAX_WARNINGS
from fedprune_server.devices.crash_store import (
    CRASH_FILE,
    MAX_CRASHES,
    MAX_CRASHES_PER_BOARD,
    CrashStore,
    frames_of,
    read_crashes,
    read_warnings,
)


def crash(device: str, number: int, text: str = "ValueError: no", at: int = 9) -> CrashReport:
    frames = ({"module": "fedprune_device.agent.agent", "line": 7, "function": "run"},)
    return CrashReport(device, number, at, "exception", text, frames, "fedprune 0.1", "a", 3.0, 61.5, 10, 20)


def test_crashes_are_kept_once_and_answered(tmp_path: Path) -> None:
    with CrashStore(tmp_path) as store:
        store.add(crash("a", 2))
        store.add(crash("a", 2))
        store.add(crash("b", 4))
        assert store.save() == {"a": CrashStored(2), "b": CrashStored(4)}
        assert store.save() == {}
    with CrashStore(tmp_path) as restarted:
        restarted.add(crash("a", 2))
        assert restarted.save() == {"a": CrashStored(2)}
        restarted.add(crash("a", 5, "KeyError: yes"))
        restarted.save()
    crashes = read_crashes(tmp_path)
    assert [(r.device, r.text) for r in crashes] == [
        ("a", "ValueError: no"),
        ("b", "ValueError: no"),
        ("a", "KeyError: yes"),
    ]
    assert frames_of(crashes[-1]) == ["fedprune_device.agent.agent:7 in run"]
    assert [r.text for r in read_crashes(tmp_path, "a", limit=1)] == ["KeyError: yes"]
    assert (tmp_path / CRASH_FILE).stat().st_mode & 0o077 == 0


def test_no_board_fills_the_disk(tmp_path: Path) -> None:
    now = [0.0]
    with CrashStore(tmp_path, monotonic=lambda: now[0]) as store:
        for number in range(30):
            store.add(crash("loud", number))
        assert store.save() == {"loud": CrashStored(29)}  # so that it isn't sent again
        assert read_crashes(tmp_path)[-1].id == MAX_CRASHES_PER_BOARD  # no more of an hour was ever written
        now[0] += 3601
        store.add(crash("loud", 30))
        store.save()
        assert len(read_crashes(tmp_path)) == MAX_CRASHES_PER_BOARD
        for number in range(MAX_CRASHES):
            store.add(crash(f"b{number}", 1))
            if number % 1000 == 999:
                store.save()
        assert len(read_crashes(tmp_path, limit=2 * MAX_CRASHES)) == MAX_CRASHES


def test_nothing_that_steers_a_terminal_is_kept(tmp_path: Path) -> None:
    with CrashStore(tmp_path) as store:
        store.add(crash("a", 9, "no\n2026-01-01 00:00:00 b: forged\u202e"))
        store.save()
    (row,) = read_crashes(tmp_path)
    assert row.text.isprintable()
    assert "\n" not in str(row)


def test_warnings_of_earlier_runs_stay_until_newer_ones_fill_their_room(tmp_path: Path) -> None:
    for run in range(3):
        texts = [f"{run} {number}\x1b[2J" for number in range(MAX_WARNINGS // 2)]
        with CrashStore(tmp_path) as store:
            for _ in range(2):  # births repeat them
                store.note_warnings("a", [{"at": 2**60, "text": text} for text in ["always", *texts]])
                assert store.save() == {}
            store.note_warnings("a", [])  # of a new run
    kept = [w["text"] for w in read_warnings(tmp_path, "a")]
    numbers = range(MAX_WARNINGS // 2)
    assert kept == [*(f"1 {n} [2J" for n in numbers[1:]), "always", *(f"2 {n} [2J" for n in numbers)]
    assert read_warnings(tmp_path, "b") == []


def test_the_loop_goes_on_while_another_program_locks_the_file(tmp_path: Path) -> None:
    path = tmp_path / CRASH_FILE
    with CrashStore(tmp_path) as store, closing(sqlite3.connect(path, isolation_level=None)) as program:
        program.execute("BEGIN IMMEDIATE")
        for _ in range(MAX_CRASHES_PER_BOARD + 1):  # what comes again and again counts once
            store.add(crash("a", 1))
            assert store.save() == {}
        program.execute("ROLLBACK")
        store.add(crash("a", 1))  # the board tells it again
        assert store.save() == {"a": CrashStored(1)}
