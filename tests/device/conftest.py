"""A linear classifier's graphs and data, for tests that need no compiler."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.architecture import Architecture, Axis, LayerRow, TensorKind, TensorSpec
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.runtime.bundle import FILES, MANIFEST, manifest_text
from fedprune_device.data.dataset import LocalData
from fedprune_device.training import training_thread
from support.fakes.agent_harness import Bench
from support.fakes.hidden_board import HiddenBoard
from support.fakes.local_board import LocalBoard
from support.paths import GRAPHS

FEATURES, CLASSES = 6, 3


@pytest.fixture(autouse=True)
def no_niceness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train at the tests' own priority: on a busy machine threads of a lower one train a hundred times slower."""
    monkeypatch.setattr(training_thread, "NICENESS", os.getpriority(os.PRIO_PROCESS, 0))


@pytest.fixture
def graphs() -> Path:
    return GRAPHS


@pytest.fixture
def local(tmp_path: Path, graphs: Path) -> LocalBoard:
    """A board's local interface that doesn't serve yet."""
    return LocalBoard(tmp_path, graphs)


@pytest.fixture
def serving_board(local: LocalBoard) -> Iterator[LocalBoard]:
    """One that serves a model."""
    local.install(1)
    with local.serving():
        yield local


@pytest.fixture(scope="module")
def open_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBoard]:
    """One board for all that changes nothing, or nothing that matters."""
    local = LocalBoard(tmp_path_factory.mktemp("board"), GRAPHS)
    local.install(1)
    with local.serving():
        yield local


@pytest.fixture
def data() -> LocalData:
    rng = np.random.default_rng(5)
    y = rng.integers(0, CLASSES, 90)
    x = ((rng.standard_normal((CLASSES, FEATURES)) * 2)[y] + rng.standard_normal((90, FEATURES))).astype(np.float32)
    return LocalData(x[:70], y[:70], x[70:], y[70:])


@pytest.fixture
def weights() -> Tensors:
    return {
        "w": (0.1 * np.random.default_rng(6).standard_normal((CLASSES, FEATURES))).astype(np.float32),
        "b": np.zeros(CLASSES, np.float32),
    }


@pytest.fixture
def model(tmp_path: Path, graphs: Path, weights: Tensors) -> Path:
    """A folder with the inference graph and its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "inference.onnx").write_bytes((graphs / "inference.onnx").read_bytes())
    (folder / "weights.safetensors").write_bytes(tensorfile.encode(weights))
    return folder


@pytest.fixture
def bundle(model: Path, graphs: Path) -> Path:
    """The model's folder as a bundle, whose classes have names."""
    fixed = Axis.fixed
    architecture = Architecture(
        "linear",
        (),
        (TensorSpec("w", TensorKind.WEIGHT, (fixed(3), fixed(6))), TensorSpec("b", TensorKind.BIAS, (fixed(3),))),
        (LayerRow("w", "Gemm", "w", 1),),
        (),
        (6,),
        (3,),
    )
    selection = Selection.full(architecture)
    (model / "training.onnx").write_bytes((graphs / "plain.onnx").read_bytes())
    (model / "architecture.json").write_text(architecture.to_json())
    (model / "submodel.json").write_text(selection.to_json())
    files = {name: (model / name).read_bytes() for name in FILES}
    (model / MANIFEST).write_text(manifest_text(files, selection, Recipe(), "raspberry-pi-5", ("ant", "bee", "cat")))
    return model


@pytest.fixture
def bench(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Bench:
    """An agent that can be started again and again, and its server."""
    return Bench(tmp_path, graphs, weights, data)


@pytest.fixture
def board(tmp_path: Path, graphs: Path, data: LocalData) -> HiddenBoard:
    """A board whose rounds a test carries out one by one."""
    return HiddenBoard(tmp_path / "state", graphs, data)
