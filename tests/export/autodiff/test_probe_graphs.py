"""The probe's graphs are those that the compiler writes today: a board must measure what a round runs."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import onnx
import pytest

from support.paths import ROOT

SHIPPED = ROOT / "device_runtime" / "fedprune_device" / "assets"


@pytest.fixture(scope="module")
def new_probe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    subprocess.run([sys.executable, ROOT / "examples" / "make_probe_graphs.py", folder], check=True, timeout=60)
    return folder


@pytest.mark.parametrize("name", ["probe_training-cpu.onnx", "probe_training-cuda.onnx", "probe_inference.onnx"])
def test_shipped_probe_graphs_are_what_the_compiler_writes(new_probe_folder: Path, name: str) -> None:
    # The graph, not the file: another version of onnx may write its own name into it.
    new, shipped = (onnx.load(folder / name, load_external_data=False) for folder in (new_probe_folder, SHIPPED))
    assert new.graph == shipped.graph, "run examples/make_probe_graphs.py"
    assert new.opset_import == shipped.opset_import


def test_shipped_shapes_and_costs_of_the_probe_are_what_the_compiler_says(new_probe_folder: Path) -> None:
    new, shipped = (json.loads((folder / "probe.json").read_text()) for folder in (new_probe_folder, SHIPPED))
    assert new == shipped, "run examples/make_probe_graphs.py"


def files(folder: Path, name: str) -> dict[str, bytes]:
    with tarfile.open(folder / name) as archive:
        return {m.name: member.read() for m in archive if (member := archive.extractfile(m)) is not None}


def test_the_shipped_archive_is_what_the_compiler_writes(new_probe_folder: Path) -> None:
    new, shipped = files(new_probe_folder, "probe_layers.tar.gz"), files(SHIPPED, "probe_layers.tar.gz")
    assert list(new) == list(shipped), "run examples/make_probe_graphs.py"
    for name, body in new.items():
        if name.endswith(".json"):
            assert json.loads(body) == json.loads(shipped[name]), f"{name}: run examples/make_probe_graphs.py"
        else:
            graphs = [onnx.load_model_from_string(raw).graph for raw in (body, shipped[name])]
            assert graphs[0] == graphs[1], f"{name}: run examples/make_probe_graphs.py"
