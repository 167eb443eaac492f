"""The server's unit: systemd knows every word of it, its sandbox is tight, and its command is one of the program."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import build_parser
from support.paths import ROOT

UNIT = ROOT / "deploy" / "systemd" / "fedprune-server.service"
ANALYZE = shutil.which("systemd-analyze")


def analyze(*arguments: str) -> str:
    done = subprocess.run([str(ANALYZE), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_knows_every_word_and_sees_a_low_exposure(tmp_path: Path) -> None:
    path = tmp_path / UNIT.name
    path.write_text(re.sub("^(ExecStart=)[^ ]+", r"\1/usr/bin/env", UNIT.read_text(), flags=re.MULTILINE))
    assert [line for line in analyze("verify", "--man=no", str(path)).splitlines() if path.name in line] == []
    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", analyze("security", "--offline=yes", str(path)))
    assert exposure is not None
    assert float(exposure[1]) <= 2.0


def test_its_command_is_one_of_the_program_and_errors_that_last_dont_restart_it() -> None:
    text = UNIT.read_text()
    arguments = build_parser().parse_args(re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)[0].split())
    assert (str(arguments.config), vars(arguments)["server.state"]) == ("/etc/fedprune/fleet.toml", "/var/lib/fedprune")
    final = {int(code) for code in re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)[0].split()}
    assert final <= set(ExitCode)
    assert {ExitCode.USAGE, ExitCode.CONFIG} <= final
