"""A real board whose network comes and goes: taught and asked over its socket, it hands in later what it has made."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedprune.wire.messages import RoundProgress, UpdateAnnouncement
from fedprune_device.client import Board
from support.fakes.agent_fleet import MemoryServer
from support.paths import GRAPHS
from support.processes.device_process import running
from support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.system

NOBODY = "mqtt://127.0.0.1:9"


def start(root: Path, url: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "fedprune_device.cli.main",
        "run",
        "--no-probe",
        "--insecure",
        "--patient",
        "--local",
    ]
    command += ["--broker", url, "--site", "site", "--device", "d", "--threads", "1"]
    command += ["--data", "local", "--state", str(root / "state")]
    with (root / "log").open("a") as log:
        return subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition: Callable[[], object], root: Path) -> None:
    until(condition, explain=lambda: (root / "log").read_text()[-3000:])


def test_a_board_goes_on_without_its_network_and_hands_in_its_update_later(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    weights = {"w": (0.1 * rng.standard_normal((3, 6))).astype(np.float32), "b": np.zeros(3, np.float32)}
    server = MemoryServer(tmp_path / "server", GRAPHS, weights, time.monotonic)
    server.ends = False
    board = Board(f"unix:{tmp_path}/state/local.sock", tries=50)
    x = rng.standard_normal((60, 6)).astype(np.float32)
    process = start(tmp_path, NOBODY)
    try:
        # Taught before there is a network or a model.
        for n, row in enumerate(x):
            board.add(row, n % 3)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0

        with running(tmp_path, server) as field:
            process = start(tmp_path, field.url)
            server.plan = [server.offer(1)]
            wait_for(lambda: 1 in server.updates, tmp_path)
            server.accepts = False
            server.plan.append(server.offer(2))
            wait_for(lambda: any(u.round == 2 for u in server.of(UpdateAnnouncement)), tmp_path)
            assert 30 < server.updates[1].samples < 60
            process.send_signal(signal.SIGKILL)
            process.wait()

        process = start(tmp_path, NOBODY)
        wait_for(board.healthy, tmp_path)
        assert board.predict(x[:5]).round == 2
        assert sum(board.samples()["parts"].values()) == 60
        assert not board.status()["connected"]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0

        made = next(u for u in server.of(UpdateAnnouncement) if u.round == 2)
        server.seen.clear()
        server.accepts = True
        with running(tmp_path, server) as field:
            process = start(tmp_path, field.url)
            wait_for(lambda: 2 in server.updates, tmp_path)
        assert server.updates[2] == made
        assert not [p for p in server.of(RoundProgress) if p.phase == "train"]
    finally:
        process.kill()
        process.wait()
