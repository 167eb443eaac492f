"""docs/planner.md: its sample plan is what the command prints, and its example of widths is what the ladder makes."""

import re
import shlex
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_export.cli.main import main
from fedprune_server.simulation.digits import digits_model
from support.paths import ROOT

PAGE = (ROOT / "docs" / "planner.md").read_text()
BLOCKS = [[line[4:] for line in block.splitlines()] for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)]


def test_the_sample_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,), sample = BLOCKS[:2]
    monkeypatch.chdir(tmp_path)
    Path("digits.onnx").write_bytes(digits_model())
    assert main(shlex.split(command)[1:]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[: len(sample)] == sample
