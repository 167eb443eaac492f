"""docs/pi.md: the server's commands make what the page says, and the board's command line takes the service."""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.security.joining import Claim
from fedprune_device.cli.main import build_parser
from fedprune_server.cli import main as server
from support.paths import ROOT

PAGE = (ROOT / "docs" / "pi.md").read_text()


def commands(prog: str) -> list[list[str]]:
    found = re.findall(rf"(?:^    |ExecStart=\S+/)(?:sudo )?(?:\.venv/bin/)?{prog} (.*)$", PAGE, re.MULTILINE)
    return [shlex.split(line) for line in found]


def test_the_server_makes_the_broker_s_files_where_the_page_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands("fedprune-server"):
        assert server.main([w.replace("/etc/mosquitto", "etc") for w in words]) == ExitCode.OK
    for link in re.findall(r"ln -s /etc/mosquitto/(\S+)", PAGE):
        assert (tmp_path / "etc" / link).is_file()
    assert Claim.parse((tmp_path / "attic.claim").read_text())
    assert stat.S_IMODE((tmp_path / "attic.claim").stat().st_mode) == 0o600


@pytest.mark.board
def test_the_command_line_takes_the_service() -> None:
    line = re.search(r"ExecStart=\S+/fedprune-device (.*)", PAGE)
    assert line is not None
    arguments = build_parser().parse_args(shlex.split(line.group(1)))
    assert (arguments.patient, arguments.site, arguments.device) == (True, "lab", "attic")
    state_folder = re.search(r"^ *StateDirectory=(.*)$", PAGE, re.MULTILINE)
    assert state_folder is not None
    assert arguments.state == Path("/var/lib") / state_folder.group(1)
