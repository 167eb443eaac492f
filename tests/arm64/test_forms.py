"""Training graphs for one board, on an Arm board: what it chooses trains to the numbers of this machine."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprune.model.architecture import widths_at
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import TRAINING
from fedprune.runtime.bundle_folder import write_bundle
from fedprune_export.bundles.bundle import bundle_files
from fedprune_export.formulation import Forms
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph
from fedprune_flash import Target
from fedprune_flash.kit import wheelhouse
from support.nets.smooth_nets import SmoothResNet
from support.paths import TESTS
from support.processes.arm_board import copied
from support.processes.arm_forms import RECIPE, trained
from support.processes.arm_userland import BOOKWORM, userland

FIXED = "fixed.onnx"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submodel's bundle with steps for all lengths of blocks, and the step of its widths in standard operators."""
    torch.manual_seed(2)
    model = import_onnx(export_torch(SmoothResNet()), "net")
    widths = widths_at(model.architecture, 0.6)
    selection = Selection.of(model.architecture, widths)
    folder = tmp_path_factory.mktemp("forms")
    files = bundle_files(model, selection, RECIPE, blocks=(4, 8, 16))
    write_bundle(folder / "bundle", files, selection, RECIPE, "raspberry-pi-4b")
    fixed = training_graph(model, RECIPE.features, widths=widths, forms=Forms())
    (folder / FIXED).write_bytes(fixed.to_bytes())
    return folder / "bundle"


def test_what_a_board_chooses_trains_to_the_numbers_of_this_machine(
    tmp_path: Path, own_wheel: Path, bundle: Path
) -> None:
    board = replace(copied(userland(BOOKWORM), tmp_path / "board"), environment={"PYTHONPATH": "/site"})
    wheelhouse.fetch(own_wheel, Target(BOOKWORM.python), tmp_path / "wheels")
    for wheel in (tmp_path / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(board.root / "site")
    (board.root / "bundle").mkdir()
    for file in bundle.iterdir():
        (board.root / "bundle" / file.name).write_bytes(file.read_bytes())
    (board.root / FIXED).write_bytes((bundle.parent / FIXED).read_bytes())
    (board.root / "forms.py").write_bytes((TESTS / "support/processes/arm_forms.py").read_bytes())

    done = board.run("/usr/bin/python3", "/forms.py", "/bundle", "/out.npz", f"/{FIXED}")

    assert done.returncode == 0, done.stderr
    # Wheels for Arm have no operators in blocks. Should they get them, the bundle has a step for their length.
    said = json.loads(done.stdout)
    assert said["blocked"] == bool(said["block"])
    wanted = trained(bundle, bundle / TRAINING)
    with np.load(board.root / "out.npz") as out:
        assert {n.partition("/")[0] for n in out.files} == {TRAINING, FIXED}
        for key in out.files:
            name = key.partition("/")[2]
            np.testing.assert_allclose(out[key], wanted[name], rtol=1e-3, atol=1e-5, err_msg=key)
