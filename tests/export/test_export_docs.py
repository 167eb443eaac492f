"""docs/export.md: its commands are commands, and its sample is what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedprune.errors import ExitCode
from fedprune_export.cli import main
from fedprune_server.digits import digits_model

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()


def test_the_sample_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits.onnx").write_bytes(digits_model())
    monkeypatch.chdir(tmp_path)
    command = re.search(r"^    fedprune-export (digits\.onnx .*)$", PAGE, re.MULTILINE)
    sample = re.search(r"^    density .*\n(?:    .*\n)+", PAGE, re.MULTILINE)
    assert command is not None
    assert sample is not None

    assert main(shlex.split(command.group(1))) == ExitCode.OK

    # The last digits of the parity are the machine's own.
    said, printed = (
        [line.strip() for line in text.splitlines() if "parity" not in line]
        for text in (sample.group(), capsys.readouterr().out)
    )
    assert said == printed


def test_the_commands_about_profiles_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-boards").mkdir()
    shipped = Path(__file__).parents[2] / "hardware_profiles" / "raspberry-pi-5.toml"
    (tmp_path / "my-board.toml").write_text(shipped.read_text())
    commands = re.findall(r"^    fedprune-export (profiles .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)) == ExitCode.OK
