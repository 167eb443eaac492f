from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import DataError, ModelError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime.session import OnnxSession, RunsGraph
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import loss_terms
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.trainer import Trainer

pytestmark = pytest.mark.board


def test_predictions_are_those_of_the_weights_beside_the_graph(model: Path, weights: Tensors, data: LocalData) -> None:
    expected = data.x_train @ weights["w"].T + weights["b"]
    np.testing.assert_allclose(Predictor(model).predict(data.x_train, batch=9), expected, atol=1e-5)


class _RefusesEmptyBatches:
    """The session of a graph that can't run on no samples, as those of most nets that end with Flatten."""

    def __init__(self, session: RunsGraph) -> None:
        self._session = session
        self.inputs, self.outputs = session.inputs, session.outputs

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        if not len(feeds["x"]):
            raise ModelError("Flatten of an empty batch")
        return self._session.run(feeds, outputs)


def test_no_inputs_give_no_rows_of_logits_and_no_run_on_an_empty_batch(model: Path, data: LocalData) -> None:
    session = _RefusesEmptyBatches(OnnxSession(model / "inference.onnx"))
    assert Predictor(model, session=session).predict(data.x_train[:0]).shape == (0, 3)


def test_inputs_of_another_shape_are_refused(model: Path, data: LocalData) -> None:
    with pytest.raises(DataError, match="shape"):
        Predictor(model).predict(data.x_test[:, :3])


def test_a_model_whose_logits_are_not_finite_fails_the_check(model: Path, weights: Tensors) -> None:
    weights["b"][1] = np.nan
    (model / "weights.safetensors").write_bytes(tensorfile.encode(weights))
    with pytest.raises(ModelError, match="not finite"):
        Predictor(model).check(3)


def test_a_model_of_other_classes_fails_the_check(model: Path) -> None:
    with pytest.raises(ModelError, match="logits"):
        Predictor(model).check(4)


@pytest.mark.parametrize(
    ("graph", "recipe"),
    [
        ("plain", Recipe()),
        ("full", Recipe(proximal=1.0, logit_adjustment=True, balance_classes=True, mask_absent_classes=True)),
    ],
)
def test_a_model_is_checked_against_its_training_graph(
    model: Path, graphs: Path, weights: Tensors, data: LocalData, graph: str, recipe: Recipe
) -> None:
    loss = Trainer(graphs / f"{graph}.onnx").loss(weights, data, recipe, 3)
    objective, terms = Trainer(graphs / f"{graph}.onnx").objective(recipe, 3), loss_terms(data.y_train, recipe, 3)
    predictor = Predictor(model)
    predictor.check(3, data.x_train[:32], (loss, lambda z: objective(z, data.y_train[:32], terms).loss))
    with pytest.raises(ModelError, match="contradict"):
        predictor.check(3, data.x_train[:32], (loss + 0.1, lambda z: objective(z, data.y_train[:32], terms).loss))


def test_an_objective_is_loaded_once_for_a_recipe(graphs: Path) -> None:
    trainer, recipe = Trainer(graphs / "plain.onnx"), Recipe()
    objective = trainer.objective(recipe, 3)
    assert trainer.objective(Recipe(), 3) is objective
    assert trainer.objective(recipe, 4) is not objective
    assert trainer.objective(Recipe(loss="mse", metric="mae"), 4) is not trainer.objective(recipe, 4)
