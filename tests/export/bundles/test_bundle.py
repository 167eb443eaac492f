"""Writing bundles: whole or not at all, never among other things, and read back as written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.bundle_folder import write_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.bundle import bundle_files
from fedprune_export.pruning.model import Model
from support.oracles.cutting import random_selection

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]


@pytest.fixture(scope="module")
def lenet(imported: Imported) -> Model:
    return imported("lenet")


@pytest.fixture(scope="module")
def half(lenet: Model) -> Selection:
    return random_selection(lenet, 0.5, seed=1)


@pytest.fixture(scope="module")
def files(lenet: Model, half: Selection) -> dict[str, bytes]:
    return bundle_files(lenet, half, Recipe())


def test_what_is_written_is_read_back(half: Selection, files: dict[str, bytes], tmp_path: Path) -> None:
    names = tuple(f"digit {i}" for i in range(10))
    write_bundle(tmp_path / "b", files, half, Recipe(lr=0.25), "raspberry-pi-5", names)
    bundle = open_bundle(tmp_path / "b")
    assert bundle.selection.digest == half.digest
    assert bundle.recipe == Recipe(lr=0.25)
    assert (bundle.target, bundle.class_names) == ("raspberry-pi-5", names)


def test_the_training_step_takes_the_weights_file(half: Selection, files: dict[str, bytes]) -> None:
    session = OnnxSession(files["training.onnx"], training=True)
    tensors = tensorfile.decode(files["weights.safetensors"])
    feeds = {n: np.zeros(tensors[n.partition("::")[0]].shape, np.float32) for n in session.inputs if "::" in n}
    scalars = {n: np.array(0.1, np.float32) for n in ("lr", "momentum", "weight_decay")}
    x, y = np.zeros((3, 1, 28, 28), np.float32), np.zeros(3, np.int64)
    out = session.run({**tensors, **feeds, **scalars, "x": x, "y": y})
    assert np.isfinite(out["loss"])
    assert {n: out[f"{n}::next"].shape for n in tensors} == half.shapes()
