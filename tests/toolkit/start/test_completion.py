"""Shells complete commands, options and names, and nothing of fedprune is imported for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes.completed import completed

PROGRAMS = {"export", "simulate", "server", "device", "flash"}


def test_the_umbrella_command_completes_its_commands(tmp_path: Path) -> None:
    assert set(completed("fedprune ", tmp_path).words) == PROGRAMS
    assert completed("fedprune ser", tmp_path).words == ["server"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fedprune server rollout st", {"start", "status", "stop"}),
        ("fedprune-server backup --sta", {"--state"}),
        ("fedprune-server run --strategy fedp", {"fedper", "fedprox", "fedprune"}),
        ("fedprune-device run --profile raspberry-pi-z", {"raspberry-pi-zero-2w"}),
        ("fedprune-export to-", {"to-onnx", "to-torch"}),
        ("fedprune-export model.onnx --target raspberry-pi-z", {"raspberry-pi-zero-2w"}),
    ],
)
def test_every_program_completes(line: str, words: set[str], tmp_path: Path) -> None:
    found = completed(line, tmp_path)
    assert set(found.words) == words
    modules = {name.partition(".")[0] for name in found.imported}
    assert "argcomplete" in modules
    assert not modules & {"torch", "onnx", "onnxruntime", "numpy", "rich", "sqlalchemy", "fedprune", "fedprune_server"}
