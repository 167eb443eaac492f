"""docs/planner.md: its sample plan is what the command prints, and its example of widths is what the ladder makes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import latency_table
from fedprune.planning.plan import DENSITIES
from fedprune.planning.width_candidates import MULTIPLES, rungs, snapped
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import digits_model
from support.paths import ROOT

PAGE = (ROOT / "docs" / "planner.md").read_text()
BLOCKS = [[line[4:] for line in block.splitlines()] for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)]


def test_the_sample_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,), sample = BLOCKS[:2]
    monkeypatch.chdir(tmp_path)
    Path("digits.onnx").write_bytes(digits_model())
    assert main(shlex.split(command)[1:]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[: len(sample)] == sample


def test_the_example_is_what_the_ladder_makes() -> None:
    text = re.search(r"At 36/64 .*? rung is [^.]*", PAGE, re.DOTALL)
    said = [tuple(map(int, found.split(", "))) for found in re.findall(r"\(([\d, ]+)\)", text[0])]
    architecture, density = import_onnx(digits_model(), "digits").architecture, 36 / 64
    candidates = [widths_at(architecture, density), *(snapped(architecture, density, m) for m in MULTIPLES)]
    table = latency_table(profile_store.find("raspberry-pi-4b"), None)
    ladder = rungs(architecture, table, Recipe().batch_size, DENSITIES)
    assert said == [*candidates, next(rung.widths for rung in ladder if rung.density == density)]
