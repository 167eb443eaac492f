"""What the other tests believe of the boards that they use."""

import socket
from pathlib import Path

import pytest

from support.processes.arm_board import copy_userland
from support.processes.arm_userland import BOOKWORM, userland

ASK = (
    "import platform, socket, sys; print(platform.machine()); socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
)


@pytest.mark.parametrize("offline", [False, True])
def test_offline_is_offline(offline: bool, tmp_path: Path) -> None:
    board = copy_userland(userland(BOOKWORM), tmp_path / "board")
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = board.run("/usr/bin/python3", "-c", ASK, str(server.getsockname()[1]), offline=offline)
    assert done.stdout == "aarch64\n"
    assert (done.returncode != 0) is offline
    assert ("Network is unreachable" in done.stderr) is offline
