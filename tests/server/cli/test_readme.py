"""README's commands and the fleet of `examples` run on what `make demo` leaves."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_device.cli import main as device
from fedprune_export.cli import main as export
from fedprune_flash.cli import main as flash
from fedprune_server.cli import main as server
from fedprune_server.cli import simulate
from fedprune_server.cli.demo import DemoFolder
from support.paths import ROOT

MAIN = {
    "fedprune-device": device.main,
    "fedprune-export": export.main,
    "fedprune-flash": flash.main,
    "fedprune-server": server.main,
    "fedprune-simulate": simulate.main,
}


def commands() -> list[list[str]]:
    """The command lines of the section "The commands", word by word."""
    section = (ROOT / "README.md").read_text().partition("\n## The commands\n")[2].partition("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"^    (fedprune-.*)$", section, re.MULTILINE)]


@pytest.fixture
def _demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder in which `make demo` ran."""
    monkeypatch.chdir(tmp_path)
    DemoFolder.prepare(tmp_path / "demo-run", 0)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.usefixtures("_demo")
def test_readmes_commands_that_need_no_board_run() -> None:
    ran = set()
    for prog, *words in commands():
        if prog == "fedprune-export":
            assert MAIN[prog](words) == ExitCode.OK
        elif prog == "fedprune-simulate":
            assert MAIN[prog]([*words, "--rounds", "1"]) == ExitCode.OK
        ran.add(prog)
    assert ran == set(MAIN)
    assert Path("bundle/report.html").is_file()
    assert Path("sim/report.html").is_file()


@pytest.mark.usefixtures("_demo")
def test_readmes_commands_for_a_fleet_make_sense_and_name_files_that_are_there() -> None:
    for prog, *words in commands():
        if prog == "fedprune-server":
            server.build_parser().parse_args(words)
        elif prog == "fedprune-flash":
            flash.build_parser().parse_args(words)
        elif prog == "fedprune-device":
            device.build_parser().parse_args(words)
        named = [w for w in words if w.startswith(("demo-run/", "examples/"))]
        assert all(Path(name).is_file() for name in named), named
