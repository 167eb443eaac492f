"""Check that a bundle computes what the whole model computes with the cut channels masked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune.model.features import CUSTOM_LOSS, MULTI_LABELS, labels_of
from fedprune.model.loss import Y
from fedprune.model.random_inputs import RandomInputs
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.step_contract import LOGITS, LOSS, LR, X, next_name
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.bundle import BASE, INFERENCE, TRAINING, WEIGHTS
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.rounding import Distance, check_outputs, round_array, round_weights
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.pruning.masked_reference import masked_graph
from fedprune_export.pruning.model import Model

# Number of random inputs. The trace has other batch sizes, so that a graph with one of those fixed in it fails here.
PARITY_SAMPLES = 7

# More than one, so that batch norms have something to normalise by, and losses pairs to compare.
STEP_SAMPLES = 6

# In place of a recipe's learning rate of 0, with which nothing would move.
TRIAL_LEARNING_RATE = 0.1

Array = npt.NDArray[Any]
Shape = tuple[int | str | None, ...]

# λ of mixup on trial: neither 0 nor 1 nor one half, so that a step that ignores it or the partners has another loss.
_TRIAL_MIX_SHARE = 0.7


def check_parity(model: Model, selection: Selection, files: Mapping[str, bytes]) -> Distance:
    """The distance of a bundle's outputs from those of the masked whole model, on random inputs.

    Raises `ModelError` if they are too far from it, or onnxruntime doesn't load or run the inference graph.
    """
    x = sample_feeds(model.graph, PARITY_SAMPLES)[X]
    with tempfile.TemporaryDirectory(prefix="fedprune-") as name:
        for file in files.keys() & {INFERENCE, WEIGHTS, BASE}:
            (Path(name) / file).write_bytes(files[file])
        outputs = OnnxSession(Path(name) / INFERENCE).run({X: x})[LOGITS]
    return compare_with_graph(outputs, masked_graph(model, selection), x, "the cut model", "the masked one")


def compare_with_graph(
    outputs: Array, reference: Graph, x: Array, subject: str, origin: str, hint: str = ""
) -> Distance:
    """The distance of outputs from a graph's for these samples. Raises `ModelError` if they are too far from it."""
    raw = reference.to_bytes()
    subject = f"{subject} computes something else than {origin}"
    return check_outputs(outputs, run_model(raw, x), rerun(run_model, raw, x), subject, hint)


def rerun(run: Callable[[bytes, Array], Array], raw: bytes, x: Array) -> Callable[[np.random.Generator], Array]:
    """What `check_outputs` calls for a model whose outputs `run` computes from its file and samples."""
    return lambda random: run(round_weights(raw, random), round_array(x, random))


def run_model(model: bytes, x: Array) -> Array:
    """Outputs of a model's file for samples."""
    return OnnxSession(model).run({X: x})[LOGITS]


def try_step(model: Model, recipe: Recipe, files: Mapping[str, bytes]) -> None:
    """Take a training step of a bundle with random samples, at the bundle's own widths.

    Raises `ModelError` if onnxruntime doesn't load or run the step, and `TrainingError` as `count_moved_tensors`.
    """
    session = OnnxSession(files[TRAINING], training=True)
    tensors, classes = tensorfile.decode(files[WEIGHTS]), model.architecture.classes
    batch = session.inputs[X][1][0]
    samples = batch if isinstance(batch, int) else STEP_SAMPLES
    x, y = sample_feeds(model.graph, samples)[X], random_labels(recipe, samples, classes, session.inputs[Y])
    frozen = tensorfile.decode(files[BASE]) if BASE in files else {}
    feeds = step_feeds(session, recipe, {**tensors, **frozen}, x, y, classes)
    count_moved_tensors(
        session.run(feeds if recipe.lr else {**feeds, LR: np.array(TRIAL_LEARNING_RATE, np.float32)}),
        model.architecture,
        tensors,
    )


def count_moved_tensors(step: Mapping[str, npt.NDArray[Any]], architecture: Architecture, tensors: Tensors) -> int:
    """Count the trainable tensors that a training step has moved.

    Raises `TrainingError` if its loss or a next value isn't finite, a tensor has another shape, or none has moved.

    `step`: the step's outputs; `tensors`: the weights before the step.
    """
    if not np.isfinite(step[LOSS]):
        raise TrainingError(
            f"{TRAINING}: the loss of random samples", expected="a finite number", got=float(step[LOSS])
        )
    moved_count = 0
    for name, value in tensors.items():
        next_value = step.get(next_name(name), value)
        if next_value.shape != value.shape:
            raise TrainingError(f"{TRAINING}: next value of {name}", expected=value.shape, got=next_value.shape)
        if not np.isfinite(next_value).all():
            raise TrainingError(f"{TRAINING}: next value of {name} is not finite")
        moved_count += architecture.by_name[name].kind.is_trainable and not np.array_equal(next_value, value)
    if not moved_count:
        single_output = architecture.output_shape[:1] == (1,)
        raise TrainingError(
            f"{TRAINING}: a step moves no weight",
            hint="A softmax of one output is always 1: choose the loss bce, mse or another one for a single output."
            if single_output
            else "The loss of random samples has no gradient: choose another loss, or train other tensors.",
        )
    return moved_count


def random_labels(recipe: Recipe, samples: int, classes: int, form: tuple[str, Shape], seed: int = 0) -> Array:
    """Labels that a training graph takes. `form`: type and shape of its input `y`, as a session gives them."""
    type_name, (_, *sizes) = form
    random, shape = np.random.default_rng(seed), (samples, *(d if isinstance(d, int) else 1 for d in sizes))
    # Which classes a loss of the model's own takes isn't known; two are likely.
    if type_name == "tensor(int64)":
        return random.integers(0, min(classes, 2) if recipe.loss == CUSTOM_LOSS else classes, shape)
    if labels_of(recipe.loss) == MULTI_LABELS:
        return random.integers(0, 2, shape).astype(np.float32)
    return random.standard_normal(shape, np.float32)


def step_feeds(
    session: OnnxSession, recipe: Recipe, tensors: Mapping[str, Array], x: Array, y: Array, classes: int
) -> dict[str, Array]:
    """All inputs of a first training step of a graph on one batch. Nothing is drawn.

    Where labels can be mixed, each sample's is mixed with its neighbour's. Raises `ModelError` if the
    graph has an input that is not in the contract, or lacks x, y or a tensor.

    Args:
        tensors: Weights and statistics; the proximal term's anchors get the same values.
    """
    inputs = session.inputs
    feeds: dict[str, Array] = {step_contract.X: x, step_contract.Y: y}
    feeds |= first_step_feeds(recipe, tensors, inputs, y, classes)
    if step_contract.Y_PARTNER in inputs:
        feeds |= {step_contract.Y_PARTNER: np.roll(y, 1), step_contract.Y_SHARE: np.array(_TRIAL_MIX_SHARE, np.float32)}
    feeds |= RandomInputs.of(inputs, session.metadata).means(feeds, len(x))
    missing = [n for n in (step_contract.X, step_contract.Y, *tensors) if n not in inputs]
    if missing:
        raise ModelError("the training step lacks inputs", got=", ".join(missing[:5]))
    unexpected = sorted(set(inputs) - set(feeds))
    if unexpected:
        raise ModelError(
            "the training step has inputs that fedprune or the bundle's recipe doesn't know",
            got=", ".join(unexpected[:5]),
            hint="Export the bundle again with this version.",
        )
    return feeds
