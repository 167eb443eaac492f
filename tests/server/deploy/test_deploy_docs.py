"""docs/deploy.md: its commands are the program's, its errors what it says, its files there."""

import re
import shlex

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import build_parser, main
from support.paths import ROOT

TEXT = (ROOT / "docs" / "deploy.md").read_text()


def commands(text: str) -> list[list[str]]:
    """The command lines of fedprune-server, in blocks and in sentences."""
    matches = re.findall(r"fedprune-server ((?:run|init|claim|config|backup|status|check|broker-config) [^`\n]*)", text)
    return [shlex.split(line.partition("#")[0]) for line in matches]


@pytest.mark.parametrize("words", commands(TEXT), ids=" ".join)
def test_the_commands_are_the_programs(words: list[str]) -> None:
    build_parser().parse_args(words)


def test_readmes_commands_run(monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Deploy it\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(ROOT)
    lines = commands(section)
    assert len(lines) == 1
    for words in lines:
        assert main(words) == ExitCode.OK
