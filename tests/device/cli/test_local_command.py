"""`run --local` and `collect` as processes and command lines, without any server."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune_device.client import Board
from support.fakes.local_board import NAMES, LocalBoard
from support.waiting import attempts

pytestmark = pytest.mark.board

X = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)


def start(root: Path, *options: str) -> subprocess.Popen[str]:
    """A board whose server is away: nobody listens at port 9."""
    command = [sys.executable, "-m", "fedprune_device.cli.main", "run", "--insecure", "--broker", "mqtt://127.0.0.1:9"]
    command += ["--patient", "--no-probe", "--device", "d", "--state", str(root / "state"), "--data", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--class-names", ",".join(NAMES), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_board_without_its_server_answers_and_keeps_samples_over_a_kill(tmp_path: Path, graphs: Path) -> None:
    LocalBoard(tmp_path, graphs).install(3)
    socket = tmp_path / "state" / "local.sock"
    board = Board(f"unix:{socket}", timeout=10, tries=1)
    for added, end in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = start(tmp_path, "--local")
        try:
            for _ in attempts("a healthy board", pause_s=0.05):
                if board.healthy():
                    break
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert board.predict(X).round == 3
            board.add(X[added], "bee")
            assert board.samples()["classes"]["1"]["kept"] == added + 1
            status = board.status()
            assert (status["device"], status["connected"], status["phase"]) == ("d", False, "idle")
        finally:
            process.send_signal(end)
            _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert not socket.exists()
