"""docs/runbook.md: its commands are the programs', its alerts and messages what they say."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex

import pytest

from fedprune_device.cli.main import build_parser as board_parser
from fedprune_server.cli.main import build_parser as server_parser
from fedprune_server.monitoring.alerts import ALERT_SEVERITIES
from support.paths import ROOT

TEXT = (ROOT / "docs" / "runbook.md").read_text()
CASES = dict(case.split("\n", 1) for case in TEXT.split("\n## ")[1:])
COMMANDS = re.findall(r"(?:^    |`)(fedprune-(?:server|device) [^`\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_the_programs(line: str) -> None:
    program, *words = shlex.split(line)
    (server_parser() if program == "fedprune-server" else board_parser()).parse_args(words)


def test_what_is_seen_is_what_the_programs_say() -> None:
    shown = " ".join(re.findall(r"\*\*You see\*\*.*?\n\n", TEXT, re.DOTALL))
    for kind in re.findall(r"alert `([^`]*)`", shown):
        assert kind in ALERT_SEVERITIES
    modules = ("fedprune_server.cli.status", "fedprune.wire.link", "fedprune_server.storage.database")
    code = " ".join(inspect.getsource(importlib.import_module(name)) for name in modules)
    for text in ("no server is running", "connection not known", "offline, last heard from at", "no room left for",
                 "no connection to the MQTT broker"):  # fmt: skip
        assert text in shown
        assert text in code
