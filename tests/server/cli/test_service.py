"""The server's unit: systemd knows every word of it, and the sandbox is one in which the server's libraries run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError, ExitCode
from fedprune_server.cli import service
from fedprune_server.cli.main import build_parser, main
from fedprune_server.cli.service import ServerUnit

ANALYZE = shutil.which("systemd-analyze")
analyzed = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
SECRET = (("server.database", "/etc/fedprune/database"), ("server.broker", "/etc/fedprune/broker"))


def analyze(*arguments: str) -> str:
    done = subprocess.run([str(ANALYZE), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@analyzed
def test_systemd_knows_every_word_and_sees_a_low_exposure(tmp_path: Path) -> None:
    path = tmp_path / "fedprune-server.service"
    path.write_text(ServerUnit("/usr/bin/env", user="root", credentials=SECRET, arguments=("--name", "a b%$")).text())
    said = [line for line in analyze("verify", "--man=no", str(path)).splitlines() if path.name in line]
    assert said == []
    found = re.search(r"exposure level for \S+: ([0-9.]+)", analyze("security", "--offline=yes", str(path)))
    assert found is not None
    assert float(found[1]) <= 2.0


def test_the_command_in_it_is_one_of_the_program() -> None:
    text = ServerUnit("/opt/fedprune/bin/fedprune-server", arguments=("--standby",)).text()
    words = re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)[0].split()
    arguments = build_parser().parse_args(words)
    assert (str(arguments.config), vars(arguments)["server.state"]) == ("/etc/fedprune/fleet.toml", "/var/lib/fedprune")
    assert arguments.standby


def test_secrets_are_handed_over_as_files() -> None:
    lines = ServerUnit("/usr/bin/fedprune-server", credentials=SECRET).text().splitlines()
    assert "LoadCredential=server.database:/etc/fedprune/database" in lines
    assert "Environment=FEDPRUNE_SERVER_DATABASE_FILE=%d/server.database" in lines
    assert "Environment=FEDPRUNE_SERVER_BROKER_FILE=%d/server.broker" in lines


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "root\nExecStartPre=/bin/sh"},
        {"config": "/etc/../root/x"},
        {"environment": "/etc/a\nb"},
        {"credentials": (("server.keep", "/etc/x"),)},
        {"credentials": (("server.database", "/etc/x\nUser=root"),)},
        {"arguments": ("run\nUser=root",)},
    ],
    ids=str,
)
def test_what_would_break_out_of_its_line_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServerUnit(**{"program": "/usr/bin/fedprune-server", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"program": "/home/ann/venv/bin/fedprune-server"}, "--program"),
        ({"config": "/tmp/fleet.toml"}, "--config"),
        ({"arguments": ("--model", "/root/model.onnx")}, "arguments of a service"),
    ],
    ids=str,
)
def test_what_the_sandbox_hides_is_named(changes: dict[str, object], said: str) -> None:
    unit = ServerUnit(**{"program": "/usr/bin/fedprune-server", **changes})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{said}: expected a path that the service sees, not in /home/"):
        unit.check_seen()


@pytest.mark.parametrize("way", ["script", "long", "link", "copy", "config"])
def test_a_program_whose_interpreter_is_hidden_is_named(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, hidden = tmp_path / "opt" / "venv", tmp_path / "root"
    (seen / "bin").mkdir(parents=True)
    hidden.mkdir()
    monkeypatch.setattr(service, "_HIDDEN", (f"{hidden}/",))
    program, python, config = seen / "bin" / "fedprune-server", seen / "bin" / "python", seen / "fleet.toml"
    (hidden / "python").touch()
    (hidden / "fleet.toml").touch()
    program.write_text(f"#!{python}\n")
    if way == "script":
        program.write_text(f"#!{hidden}/python\n")
    elif way == "long":
        program.write_text(f"#!/bin/sh\n'''exec' {hidden}/python \"$0\" \"$@\"\n")
    elif way == "link":
        python.symlink_to(hidden / "python")
    elif way == "copy":
        (seen / "pyvenv.cfg").write_text(f"home = {hidden}/bin\nversion = 3.11\n")
    else:
        config.symlink_to(hidden / "fleet.toml")
    option = "--config" if way == "config" else "--program"
    with pytest.raises(ConfigError, match=f"^{option}: .*{hidden}"):
        ServerUnit(str(program), config=str(config)).check_seen()


def test_a_program_that_the_service_sees_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_HIDDEN", (f"{tmp_path}/root/",))
    (tmp_path / "python").touch()
    (tmp_path / "fedprune-server").write_text(f"#!{tmp_path}/python\n")
    ServerUnit(str(tmp_path / "fedprune-server")).check_seen()


@pytest.fixture
def unhidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a unit name a test's files, which are in /tmp."""
    monkeypatch.setattr(service, "_HIDDEN", ())


@pytest.mark.usefixtures("unhidden")
def test_it_is_printed_and_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, config = tmp_path / "fedprune-server", tmp_path / "fleet.toml"
    for path in (program, config):
        path.write_text("")
    named = ["--program", str(program), "--config", str(config), "--user", "root"]
    assert main(["service", "print", *named, "--", "--rounds", "9"]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert f"ExecStart={program} run --config {config} --state /var/lib/fedprune --rounds 9\n" in printed
    assert main(["service", "install", *named, "--units", str(tmp_path), "--", "--rounds", "9"]) == ExitCode.OK
    assert (tmp_path / "fedprune-server.service").read_text() == printed
    assert (tmp_path / "fedprune-server.service").stat().st_mode & 0o777 == 0o644
    assert "systemctl enable --now fedprune-server" in capsys.readouterr().out


def test_it_is_not_installed_where_it_couldnt_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install = ["service", "install", "--program", "/nowhere/fedprune-server", "--units", str(tmp_path)]
    assert main([*install, "--user", "nobody-of-that-name"]) == ExitCode.CONFIG
    assert "useradd --system" in capsys.readouterr().err
    assert main([*install, "--user", "root"]) == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []
