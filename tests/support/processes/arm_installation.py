"""How a kit gets onto a board in an emulator, and how the service starts there: as its unit says, without systemd."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from fedprune_flash.kit.kit import INSTALLER_FILE
from support.processes.arm_board import Board

STICK = "/media/stick/kit"
UNIT = "/etc/systemd/system/fedprune.service"


def install(board: Board, kit: Path) -> str:
    """Put a kit on a stick and let its installer work, without a network; returns what it said."""
    shutil.copytree(kit, board.root / STICK[1:])
    done = board.run("/usr/bin/python3", f"{STICK}/{INSTALLER_FILE}", "--no-start", offline=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def service(board: Board) -> tuple[Board, list[str]]:
    """What the installed unit starts: the board with the unit's environment, and the command."""
    command: list[str] = []
    environment = dict(board.environment)
    for line in (board.root / UNIT[1:]).read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "ExecStart":
            command = shlex.split(value)
        elif key == "EnvironmentFile":
            file = board.root / value.lstrip("-/")
            rows = file.read_text().splitlines() if file.exists() else []
            environment |= dict(row.split("=", 1) for row in rows if "=" in row)
    return replace(board, environment=environment), command


def program(board: Board) -> tuple[Board, list[str]]:
    """The same without the subcommand and its arguments."""
    started, command = service(board)
    return started, command[: command.index("run")]
