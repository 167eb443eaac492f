"""Makes the files of a board's bundle as bytes; `fedprune.runtime.bundle_folder` writes them."""

from __future__ import annotations

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import ARCHITECTURE, BASE, INFERENCE, SUBMODEL, TRAINING, WEIGHTS
from fedprune_export.bundles.inference import inference_model
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_step


def bundle_files(
    model: Model, selection: Selection, recipe: Recipe, *, training: bytes | None = None, opset: int | None = None
) -> dict[str, bytes]:
    """The files of a bundle by name, without the manifest.

    Raises `ModelError` if an operator can't be trained, `BundleError` if the selection doesn't fit the model.

    Args:
        recipe: The local training that the training step is for.
        training: The training step, if it is not the model's own (`training_step`).
        opset: The opset of the inference graph; by default one that every supported onnxruntime loads.
    """
    model.check_selection(selection)
    frozen = model.base_file
    return ({} if frozen is None else {BASE: frozen}) | {
        INFERENCE: inference_model(model, selection.widths, opset=opset),
        WEIGHTS: tensorfile.encode(selection.gather(model.tensors)),
        TRAINING: training_step(model, recipe.features).to_bytes() if training is None else training,
        ARCHITECTURE: model.architecture.to_json().encode(),
        SUBMODEL: selection.to_json().encode(),
    }
