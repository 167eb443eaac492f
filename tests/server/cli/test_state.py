"""`--state` of all commands: the command line wins over the environment, and that over the default."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_server.cli.main import build_parser, main
from fedprune_server.cli.state_option import STATE_VARIABLE

OTHER_COMMANDS = {"alerts", "run", "config", "restore"}
"""Commands that read settings in layers or make a new folder."""


def defaults() -> dict[str, object]:
    def default_states(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, object]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, choice in action.choices.items():
                    yield from default_states(f"{name} {inner}".strip(), choice)
            elif "--state" in action.option_strings and name.split()[0] not in OTHER_COMMANDS:
                yield name, action.default

    return dict(default_states("", build_parser()))


def test_every_command_that_looks_at_a_folder_takes_it_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STATE_VARIABLE, raising=False)
    plain = defaults()
    assert {"status", "check", "backup", "doctor", "init", "release", "rollout start", "operators add"} <= set(plain)
    assert set(plain.values()) == {Path("fedprune-state")}

    monkeypatch.setenv(STATE_VARIABLE, "there")
    assert defaults() == dict.fromkeys(plain, Path("there"))

    monkeypatch.delenv(STATE_VARIABLE)
    (tmp_path / "name").write_text("/srv/there\n")
    monkeypatch.setenv(f"{STATE_VARIABLE}_FILE", "name")
    assert defaults() == dict.fromkeys(plain, Path("/srv/there"))


def test_a_boards_unfinished_folder_is_no_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "identity").mkdir()
    assert main(["status", "--state", str(tmp_path)]) == ExitCode.STORAGE
    assert "is no server's state folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["status", "backup --to x", "init"])
def test_a_boards_folder_is_called_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "identity").mkdir()
    DirectoryOwner("attic", "default").claim(tmp_path)
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    assert main(command.split()) == ExitCode.STORAGE
    assert f"{tmp_path} is the state directory of a device" in " ".join(capsys.readouterr().err.split())
    assert {p.name for p in tmp_path.iterdir()} == {"identity", "device.json"}


def test_a_folder_is_its_owner_s_alone_and_knows_its_boards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    before = os.umask(0o022)
    try:
        assert main(["init", "--state", str(state)]) == ExitCode.OK
    finally:
        os.umask(before)
    assert state.stat().st_mode & 0o777 == 0o700
    assert main(["claim", "--state", str(state)]) == ExitCode.OK
    assert main(["crashes", "--state", str(state), "--device", "nope"]) == ExitCode.JOIN
    assert "no board is called nope" in " ".join(capsys.readouterr().err.split())
