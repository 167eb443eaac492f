"""The probe's graphs are those that the compiler writes today: a board must measure what a round runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "device_runtime" / "fedprune_device" / "assets"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    subprocess.run([sys.executable, ROOT / "examples" / "make_probe_graphs.py", folder], check=True, timeout=60)
    return folder


@pytest.mark.parametrize("name", ["probe_training.onnx", "probe_inference.onnx"])
def test_shipped_probe_graphs_are_what_the_compiler_writes(written: Path, name: str) -> None:
    # The graph, not the file: another version of onnx may write its own name into it.
    new, shipped = (onnx.load(folder / name, load_external_data=False) for folder in (written, SHIPPED))
    assert new.graph == shipped.graph, "run examples/make_probe_graphs.py"
    assert new.opset_import == shipped.opset_import


def test_shipped_shapes_and_costs_of_the_probe_are_what_the_compiler_says(written: Path) -> None:
    new, shipped = (json.loads((folder / "probe.json").read_text()) for folder in (written, SHIPPED))
    assert new == shipped, "run examples/make_probe_graphs.py"
