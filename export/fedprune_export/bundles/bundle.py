"""Makes the files of a board's bundle; `fedprune.runtime.bundle_folder` writes them."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.probe_report import FormTimes
from fedprune.runtime.bundle import ARCHITECTURE, INFERENCE, SUBMODEL, TRAINING, WEIGHTS, blocked_file
from fedprune_export.bundles.inference import inference_model
from fedprune_export.formulation import Forms
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph, training_step


def bundle_files(
    model: Model,
    selection: Selection,
    recipe: Recipe,
    *,
    training: bytes | None = None,
    opset: int | None = None,
    blocks: Sequence[int] = (),
) -> dict[str, bytes]:
    """The files of a bundle by name, without the manifest.

    Args:
        recipe: The local training that the training step is for.
        training: The training step, where it is not the model's own (`training_step`).
        opset: The opset of the inference graph; by default one that every supported onnxruntime loads.
        blocks: Lengths of blocks of channels for which a training step is written, too.

    Raises:
        ModelError: An operator can't be trained.
        BundleError: The selection doesn't fit the model.
        ConfigError: No processor has such blocks, or the recipe trains at several widths.
    """
    model.check(selection)
    if blocks and recipe.ordered_dropout:
        raise ConfigError(
            "a training step in blocks of channels",
            expected="a recipe that trains at one width",
            got="ordered dropout",
        )
    return {
        INFERENCE: inference_model(model, selection.widths, opset=opset),
        WEIGHTS: tensorfile.encode(selection.gather(model.tensors)),
        TRAINING: training_step(model, recipe.features).to_bytes() if training is None else training,
        ARCHITECTURE: model.architecture.to_json().encode(),
        SUBMODEL: selection.to_json().encode(),
        **{blocked_file(b): blocked_step(model, recipe, selection.widths, b) for b in blocks},
    }


def blocked_step(
    model: Model, recipe: Recipe, widths: Sequence[int], block: int, times: FormTimes | None = None
) -> bytes:
    """The training step of a model at these widths and for whole batches alone.

    Args:
        block: Channels that the processor computes at once.
        times: What forms of layers take there; None if that isn't known.

    Raises:
        ModelError: An operator can't be trained.
        ConfigError: No processor has such blocks.
    """
    forms = Forms(block, recipe.micro_batch, times=times)
    return training_graph(model, recipe.features, widths=widths, forms=forms).to_bytes()
