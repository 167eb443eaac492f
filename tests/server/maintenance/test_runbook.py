"""docs/runbook.md: its commands are the programs', its alerts and messages what they say."""

import re
import shlex

import pytest

from fedprune_device.cli.main import build_parser as board_parser
from fedprune_server.cli.main import build_parser as server_parser
from support.paths import ROOT

TEXT = (ROOT / "docs" / "runbook.md").read_text()
COMMANDS = re.findall(r"(?:^    |`)(fedprune-(?:server|device) [^`\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_the_programs(line: str) -> None:
    program, *words = shlex.split(line)
    (server_parser() if program == "fedprune-server" else board_parser()).parse_args(words)
