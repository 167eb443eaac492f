"""A board's real runtime, installed from its own wheel, updates itself on a real broker, and goes back by itself."""

import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from fedprune.releases.release import Release, write_release
from fedprune_device.launcher.state import COMMITTED, ROLLED_BACK, TRIAL, LauncherState, UpdateOutcome
from fedprune_device.releases.installer import LAUNCHER_FILE
from fedprune_device.releases.wheel import Wheel, contents_digest
from fedprune_server.messaging.broker.embedded import EmbeddedBroker
from support.fakes.runtime_releases import KEY, OUTSIDE, PYTHON, make_wheel, set_up, source
from support.processes.machine import free_port
from support.waiting import attempts

pytestmark = pytest.mark.system

ILLEGAL = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"

LATE_FILE = "late"

CLOCK = f"""\
import os, runpy, sys, time

clock = time.monotonic
time.monotonic = lambda: clock() + 86_400 * os.path.exists({LATE_FILE!r})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs the launcher with a clock that is a day ahead once there is a file: a trial ends when a test says so, however
slow the machine is. Releases have the machine's clock."""


class Board:
    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.wheel = folder, wheel
        self.updater = set_up(folder / "fedprune", self.release(1))
        x = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
        np.savez(folder / "data.npz", x=x, y=np.arange(20) % 3)
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(folder / "notify"))
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Take what the service manager is told at once: its socket holds few messages; what is too much is lost."""
        with suppress(OSError):
            while data := self.manager.recv(4096):
                for line in data.decode().splitlines():
                    self.lines.put(line)

    def release(self, number: int, *more: Path) -> Path:
        def made(files: tuple[object, ...]) -> Release:
            entry = "fedprune_start:device"
            system = tuple(set(OUTSIDE) - {wheel.name.partition("-")[0] for wheel in more})
            about = PYTHON, platform.machine(), entry, 10**8
            return Release(number, f"0.{number}", *about, files, contents, system=system)  # type: ignore[arg-type]

        wheels = [self.wheel, *more]
        contents = contents_digest(Wheel(path, path.name) for path in wheels)
        write_release(self.folder / str(number), made, wheels, KEY)
        return self.folder / str(number)

    def update(self, number: int, *more: Path, attempts: int = 2, seconds: float = 120) -> None:
        self.updater.stage(source(self.release(number, *more)))
        self.updater.arm(attempts, seconds)

    @contextmanager
    def running(self, url: str) -> Iterator[subprocess.Popen[bytes]]:
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "FEDPRUNE"))}
        environment = {**inherited, "NOTIFY_SOCKET": str(self.folder / "notify"), "WATCHDOG_USEC": "2000000"}
        command = [
            sys.executable,
            "-c",
            CLOCK,
            str(self.updater.home.root / LAUNCHER_FILE),
            "run",
            "--insecure",
            "--no-probe",
            "--patient",
        ]
        command += ["--broker", url, "--device", "d", "--threads", "1"]
        command += ["--data", str(self.folder / "data.npz"), "--state", str(self.folder / "state")]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stderr=log, cwd=self.folder)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, self.log()
        finally:
            process.kill()
            process.wait()

    def manager_lines_until(self, line: str) -> list[str]:
        """What the service manager was told until a line came."""
        lines: list[str] = []
        while line not in lines:
            lines.append(self.lines.get(timeout=120))
        return lines

    def until(self, seen: Callable[[LauncherState], bool]) -> LauncherState:
        for _ in attempts("such a state", explain=self.log):
            state = self.updater.home.load()
            if state is not None and seen(state):
                return state
        raise AssertionError

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]


@pytest.fixture
def board(tmp_path: Path, wheel: Path) -> Iterator[Board]:
    made = Board(tmp_path, wheel)
    yield made
    made.manager.shutdown(socket.SHUT_RDWR)
    made.manager.close()


def test_a_runtime_that_reaches_its_broker_stays_and_feeds_the_watchdog(board: Board) -> None:
    with EmbeddedBroker(port=0) as broker:
        with board.running(broker.url):
            assert {"READY=1", "WATCHDOG=1"} <= {*board.manager_lines_until("STATUS=connected to the broker")}
            board.manager_lines_until("WATCHDOG=1")
        board.manager_lines_until("STOPPING=1")
        board.update(2)
        with board.running(broker.url):
            state = board.until(lambda s: s.phase != TRIAL)
            assert (state.stable, state.outcome) == ("b", UpdateOutcome(2, COMMITTED)), board.log()
            assert "STATUS=trying version 2" in board.manager_lines_until("STATUS=connected to the broker")
        assert board.updater.home.checked_record("b").version == 2


def test_an_illegal_instruction_is_the_reason_that_the_operator_reads(board: Board) -> None:
    bad = make_wheel(board.folder / "onnxruntime-9-py3-none-any.whl", {"onnxruntime/__init__.py": ILLEGAL})
    board.update(2, bad)
    with EmbeddedBroker(port=0) as broker, board.running(broker.url):
        board.manager_lines_until("STATUS=connected to the broker")
    state = board.updater.home.load()
    assert state is not None
    assert state.stable == "a"
    assert state.outcome is not None
    assert (state.outcome.version, state.outcome.result) == (2, ROLLED_BACK)
    assert "onnxruntime kills the process that loads it (signal 4)" in state.outcome.reason


def test_a_runtime_that_never_reaches_its_broker_goes_back(board: Board) -> None:
    board.update(2, attempts=1, seconds=3600)
    with board.running(f"mqtt://127.0.0.1:{free_port()}"):
        board.manager_lines_until("READY=1")
        board.until(lambda s: bool(s.trouble))
        (board.folder / LATE_FILE).touch()
        state = board.until(lambda s: s.phase != TRIAL)
        board.manager_lines_until("READY=1")
    assert state.outcome is not None
    assert (state.stable, state.outcome.result) == ("a", ROLLED_BACK)
    assert state.outcome.reason == "not healthy within 3600 s (its checks passed, but it had not reached the broker)"
