"""Every place that builds a training graph builds it for the job's own loss; another may refuse the model's end."""

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fedprune_export as fx
from fedprune.blobs.blob_store import BlobStore
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.profile_store import find_profile
from fedprune.strategies.values import SelfDistillation
from fedprune_export.bundles.bundle import bundle_files
from fedprune_export.cli.main import main as export
from fedprune_export.importing import export_torch
from fedprune_export.pruning.model import Model
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.distillation import Distiller
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from fedprune_server.executor.offer_blobs import OfferBlobs
from fedprune_server.executor.server_samples import form_of
from support.paths import ROOT

pytestmark = pytest.mark.torch

X = np.random.default_rng(0).random((16, 8), dtype=np.float32)
RECIPE = Recipe(loss="mse", metric="mae")
PI = find_profile("raspberry-pi-5")


@pytest.fixture(scope="module")
def model() -> Model:
    """An autoencoder of numbers from 0 to 1: cross-entropy takes no such end."""
    return fx.load(net(), input_shape=(8,), loss="mse")


def net() -> torch.nn.Module:
    layers = torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 8), torch.nn.Sigmoid()
    return torch.nn.Sequential(*layers)


def calibration(model: Model, folder: Path) -> Calibration:
    return Calibration(model, X, RECIPE.features)


def export_file(model: Model, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(export_torch(net(), input_shape=(8,)))
    assert export([f"{folder}/model.onnx", "--target", PI.name, "--loss", "mse", "--out", f"{folder}/out"]) == 0


# By module, what builds the graph; `executor` is the server's.
BUILDERS: dict[str, Callable[[Model, Path], object]] = {
    "fedprune_export/api.py": lambda m, folder: fx.export(m, fx.plan(m, PI, recipe=RECIPE), folder / "out"),
    "fedprune_export/bundles/bundle.py": lambda m, _: bundle_files(m, Selection.full(m.architecture), RECIPE),
    "fedprune_export/cli/export.py": export_file,
    "fedprune_server/executor/calibration.py": calibration,
    "fedprune_server/executor/distillation.py": lambda m, _: Distiller(
        m, calibration(m, _), SelfDistillation(1, (), 1e-3), RECIPE, 0
    ),
    "fedprune_server/executor/evaluator.py": lambda m, _: Evaluator(ModelSessions(m, 1), RECIPE, (X, X)),
    "fedprune_server/executor/offer_blobs.py": lambda m, folder: OfferBlobs(m, BlobStore(folder)).training_ref(RECIPE),
    "fedprune_server/executor/server_samples.py": lambda m, _: form_of(m, RECIPE),
}


def building_modules() -> set[str]:
    """Modules of the product that call a function which builds a training graph."""
    modules = set()
    for path in (p for folder in ("export", "server", "device_runtime") for p in (ROOT / folder).rglob("*.py")):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
        if names & {"training_step", "training_graph"}:
            modules.add("/".join(path.relative_to(ROOT).parts[1:]))
    return modules - {"fedprune_export/training/step_graph.py"}


@pytest.mark.parametrize("module", sorted(building_modules()))
def test_a_training_graph_is_built_for_the_job_s_loss(model: Model, tmp_path: Path, module: str) -> None:
    BUILDERS[module](model, tmp_path)


def test_statistics_of_a_model_that_ends_in_probabilities_are_measured(model: Model, tmp_path: Path) -> None:
    """By numpy: mean and variance of the first layer's outputs."""
    measured = calibration(model, tmp_path)(model.tensors)
    hidden = X @ model.tensors["0.weight"].T + model.tensors["0.bias"]
    np.testing.assert_allclose(measured["1.running_mean"], hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(measured["1.running_var"], hidden.var(0, ddof=1), rtol=1e-4)
