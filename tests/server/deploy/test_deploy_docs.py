"""docs/deploy.md: its commands are the program's, its errors what it says, its files there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import build_parser, main
from support.paths import ROOT

TEXT = (ROOT / "docs" / "deploy.md").read_text()


def commands(text: str) -> list[list[str]]:
    """The command lines of fedprune-server, in blocks and in sentences."""
    found = re.findall(
        r"fedprune-server ((?:run|init|claim|config|service|backup|status|check|broker-config) [^`\n]*)", text
    )
    return [shlex.split(line.partition("#")[0]) for line in found]


@pytest.mark.parametrize("words", commands(TEXT), ids=" ".join)
def test_the_commands_are_the_programs(words: list[str]) -> None:
    build_parser().parse_args(words)


def test_readmes_commands_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Deploy it\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(ROOT)
    program = tmp_path / "bin" / "fedprune-server"
    program.parent.mkdir()
    program.write_text("")
    monkeypatch.setattr("sys.argv", [str(program)])
    lines = commands(section)
    assert len(lines) == 2
    for words in lines:
        assert main(words) == ExitCode.OK
    assert re.search(r"^ExecStart=/\S+/fedprune-server run --config", capsys.readouterr().out, re.MULTILINE)
