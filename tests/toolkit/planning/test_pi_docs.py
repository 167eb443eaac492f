"""docs/pi.md: the server's commands make what the page says, and the board's command line takes the service."""

import re
import shlex
import stat
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.security.join_claim import JoinClaim
from fedprune_server.cli import main as server
from support.paths import ROOT

PAGE = (ROOT / "docs" / "pi.md").read_text()


def test_the_server_makes_the_broker_s_files_where_the_page_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = r"(?:^    |ExecStart=\S+/)(?:sudo )?(?:\.venv/bin/)?fedprune-server (.*)$"
    for line in re.findall(commands, PAGE, re.MULTILINE):
        assert server.main([w.replace("/etc/mosquitto", "etc") for w in shlex.split(line)]) == ExitCode.OK
    for link in re.findall(r"ln -s /etc/mosquitto/(\S+)", PAGE):
        assert (tmp_path / "etc" / link).is_file()
    assert JoinClaim.parse((tmp_path / "attic.claim").read_text())
    assert stat.S_IMODE((tmp_path / "attic.claim").stat().st_mode) == 0o600
