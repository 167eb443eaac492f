"""A server's pulse: systemd and probes hear of it where the loop turns, and only there."""

import json
import os
import socket
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode, StorageError
from fedprune_server.cli.main import main
from fedprune_server.monitoring.health import RUNNING, STANDING_BY, Pulse, check_pulse
from fedprune_server.observation.observer import ServerEnding, TurnEnded
from support.fakes.fleet import Fleet, Watcher
from support.fakes.several_jobs import SeveralJobs, rename_job
from support.fakes.shown_jobs import show
from support.fakes.tiny_job import JOB
from support.waiting import until


class Ear:
    def __init__(self, **environment: str) -> None:
        self.heard: list[str] = []
        self.now = 100.0
        self.pulse = Pulse(environment, self.heard.append, lambda: self.now)

    def beat(self) -> None:
        """Have a turn of the loop end."""
        show(self.pulse, TurnEnded(0.0))


def test_the_first_turn_is_ready_and_later_ones_feed_the_watchdog() -> None:
    ear = Ear(WATCHDOG_USEC="8000000")
    ear.beat()
    assert ear.heard == ["READY=1\nSTATUS=running", "WATCHDOG=1"]
    ear.now += 1.9
    ear.beat()
    assert len(ear.heard) == 2  # a loop turns a hundred times a second
    ear.now += 0.1
    ear.beat()
    assert ear.heard[2:] == ["WATCHDOG=1"]
    show(ear.pulse, ServerEnding())
    assert ear.heard[3:] == ["STOPPING=1"]


def test_systemd_hears_it_through_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        show(Pulse(), TurnEnded(0.0))
        assert manager.recv(99).startswith(b"READY=1")
        assert manager.recv(99) == b"WATCHDOG=1"


def test_a_file_tells_a_probe(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    ear = Ear(FEDPRUNE_PULSE=str(path))
    with pytest.raises(StorageError, match=str(path)):
        check_pulse(path)
    ear.beat()
    assert check_pulse(path, running=True) == RUNNING
    os.utime(path, (1, 1))
    with pytest.raises(StorageError, match="at most 120 s"):
        check_pulse(path)
    ear.now += 1
    ear.beat()
    assert path.stat().st_mtime == 1  # not before its time
    ear.now += 5
    ear.beat()
    assert check_pulse(path) == RUNNING
    show(ear.pulse, ServerEnding())
    assert not path.exists()


def test_who_stands_by_is_well_but_doesnt_run(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    pulse = Pulse({"FEDPRUNE_PULSE": str(path)}, lambda text: None)
    with pulse.standing_by():
        until(lambda: path.exists() and path.read_text())
        assert check_pulse(path) == STANDING_BY
        with pytest.raises(StorageError, match="stands by"):
            check_pulse(path, running=True)
    assert "pulse" not in {t.name for t in threading.enumerate()}
    show(pulse, TurnEnded(0.0))
    assert check_pulse(path, running=True) == RUNNING


def test_a_pulse_that_cant_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Ear(FEDPRUNE_PULSE=str(tmp_path / "nowhere" / "pulse")).beat()
    assert "can't write" in caplog.text


def test_the_command_ends_as_a_probe_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDPRUNE_PULSE", raising=False)
    assert main(["health"]) == ExitCode.USAGE
    monkeypatch.setenv("FEDPRUNE_PULSE", str(tmp_path / "pulse"))
    assert main(["health"]) == ExitCode.STORAGE
    show(Pulse(), TurnEnded(0.0))
    capsys.readouterr()
    assert main(["health", "--ready"]) == ExitCode.OK
    assert capsys.readouterr().out == "running\n"
    assert main(["health", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"server": "running"}


def test_the_loops_beat_in_every_turn(tmp_path: Path) -> None:
    """However long a job waits, of one or of several: never longer than a turn of the loop."""
    fleet, several = (
        Fleet(tmp_path / "one"),
        SeveralJobs(tmp_path / "several", [rename_job(JOB, "one"), rename_job(JOB, "two")], "abc"),
    )
    for air, run in ((fleet.air, fleet.run_daemon), (several.air, several.run)):
        beats: list[float] = []
        watcher = Watcher(lambda seen, what, beats=beats, air=air: beats.append(air.now))  # type: ignore[misc]
        began = air.now
        run((fleet.daemon if air is fleet.air else several.host)(observers=[watcher]))
        assert len(beats) > 10
        assert all(b - a <= 0.5 for a, b in pairwise([began, *beats, air.now]))
