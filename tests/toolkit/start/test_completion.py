"""Shells complete commands, options and names, and nothing of fedprune is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedprune_start
from fedprune_start.completion import GRAMMAR
from support.processes.completed import completed

PROGRAMS = {"export", "simulate", "server", "device", "flash"}


def test_the_umbrella_command_completes_its_commands(tmp_path: Path) -> None:
    assert set(completed("fedprune ", tmp_path).words) == PROGRAMS
    assert completed("fedprune ser", tmp_path).words == ["server"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fedprune server rollout st", {"start", "status", "stop"}),
        ("fedprune-server rollout st", {"start", "status", "stop"}),
        ("fedprune-server backup --sta", {"--state"}),
        ("fedprune-server run --strategy fedp", {"fedper", "fedprox", "fedprune"}),
        ("fedprune-server operators add ann --role a", {"admin"}),
        ("fedprune-device pr", {"predict", "probe"}),
        ("fedprune-device run --profile raspberry-pi-z", {"raspberry-pi-zero-2w"}),
        ("fedprune-flash kit --fin", {"--find-links"}),
        ("fedprune-flash jetson jetson-a", {"jetson-agx-orin"}),
        ("fedprune-simulate sw", {"sweep"}),
        ("fedprune-simulate sweep --wor", {"--workers"}),
        ("fedprune-export to-", {"to-onnx", "to-torch"}),
        ("fedprune-export profiles sh", {"show"}),
        ("fedprune-export profiles show raspberry-pi-z", {"raspberry-pi-zero-2w"}),
        ("fedprune-export model.onnx --target raspberry-pi-z", {"raspberry-pi-zero-2w"}),
        ("fedprune-export m --target raspberry-pi-5,jetson-ag", {"raspberry-pi-5,jetson-agx-orin"}),
        ("fedprune-export m --target=raspberry-pi-z", {"--target=raspberry-pi-zero-2w"}),
    ],
)
def test_every_program_completes(line: str, words: set[str], tmp_path: Path) -> None:
    found = completed(line, tmp_path)
    assert set(found.words) == words
    modules = {name.partition(".")[0] for name in found.imported}
    assert "argcomplete" in modules
    assert not modules & {"torch", "onnx", "onnxruntime", "numpy", "rich", "sqlalchemy", "fedprune", "fedprune_server"}


def test_a_model_is_a_file_or_the_first_word_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "groups.onnx").touch()
    assert set(completed("fedprune-export grou", tmp_path).words) == {"groups", "groups.onnx"}
    assert completed("fedprune-export verify --model gr", tmp_path).words == ["groups.onnx"]


def test_without_argcomplete_a_program_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert fedprune_start.main() == 1
    assert fedprune_start.server() == 1
    assert capsys.readouterr() == ("", "")


def test_a_run_costs_nothing_for_it() -> None:
    code = (
        "import sys, fedprune_start; fedprune_start.main(['--help'])\n"
        "print([name for name in ('fedprune_start.completion', 'argparse', 'json') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_the_grammar_has_all_programs() -> None:
    root: dict[str, Any] = json.loads(GRAMMAR.read_text(encoding="utf-8"))
    assert set(root["commands"]) == PROGRAMS == set(fedprune_start._COMMANDS)
