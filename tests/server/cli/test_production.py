"""The page about production: its file is a configuration, and its commands are ones."""

import re
import shlex
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.cli import main as server
from support.paths import ROOT

PAGE = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    lines = re.findall(r"^    (?:.*\| )?(fedprune-server .*)$", PAGE, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_its_file_is_one_configuration_with_everything_that_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "fleet.toml").write_text(text)
    (tmp_path / "webhook.key").write_text("0" * 64)
    (tmp_path / "webhook.key").chmod(0o600)
    for name in ("model.onnx", "server.npz", "calibration.npz"):
        (tmp_path / name).touch()
    assert server.main(["config", "check", str(tmp_path / "fleet.toml")]) == ExitCode.OK
    output = capsys.readouterr().out
    for key in ("console", "metrics", "webhook", "webhook_secret", "heartbeat"):
        assert re.search(rf'^{key} = ".*fleet.toml:|^{key} = ".+"', output, re.MULTILINE), key


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_its_commands_parse(words: list[str]) -> None:
    assert server.build_parser().parse_args(words).command == words[0]
