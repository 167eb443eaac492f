from __future__ import annotations

import subprocess

import pytest

from fedprune.core.errors import ExitCode
from fedprune_flash.cli import main as cli
from fedprune_flash.cli.jetson import BOARDS, commands


@pytest.mark.parametrize(
    ("board", "release", "storage", "flash"),
    [
        ("jetson-orin-nano-super", "36.4.3", "nvme", "flash_t234_qspi.xml"),
        ("jetson-orin-nano", "36.4.3", "sd", "./flash.sh jetson-orin-nano-devkit mmcblk0p1"),
        ("jetson-orin-nano", "39.2.1", None, "./l4t_initrd_flash.sh --erase-all jetson-orin-nano-devkit internal"),
        ("jetson-agx-orin", "36.3", None, "./flash.sh jetson-agx-orin-devkit internal"),
        ("jetson-thor", "38.4", None, "./l4t_initrd_flash.sh jetson-agx-thor-devkit internal"),
    ],
)
def test_the_command_is_that_of_board_and_release(board: str, release: str, storage: str | None, flash: str) -> None:
    lines = commands(board, release, storage)
    assert flash in lines[-1]
    assert f"Jetson_Linux_R{release}_aarch64.tbz2" in lines[0]
    assert ("--openrm" in lines[4]) == (board == "jetson-thor")


@pytest.mark.parametrize("board", sorted(BOARDS))
def test_what_is_printed_is_a_script(board: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in BOARDS[board].flash:
        release = ".".join(map(str, max(BOARDS[board].first, (line, 4) if line != 39 else (39, 2))))
        assert cli.main(["jetson", board, "--release", release]) == ExitCode.OK
        done = subprocess.run(["sh", "-n"], input=capsys.readouterr().out, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["jetson-nano", "--release", "32.7.1"], ExitCode.CONFIG),
        (["jetson-orin-nano", "--release", "38.4"], ExitCode.CONFIG),
        (["jetson-thor", "--release", "36.4"], ExitCode.CONFIG),
        (["jetson-thor", "--release", "38.4", "--storage", "sd"], ExitCode.CONFIG),
        (["jetson-orin-nano", "--release", "36.4;reboot"], ExitCode.PROFILE),
        (["jetson-orin-nano", "--release", "36.4", "--user", "a b"], ExitCode.CONFIG),
    ],
)
def test_what_no_source_shows_is_refused(
    arguments: list[str], code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["jetson", *arguments]) == code
    assert capsys.readouterr().err.count("\n") == 1
