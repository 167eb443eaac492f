"""Inputs of a training step on trial: random labels, and all other numbers that its graph reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.features import CUSTOM_LOSS, MULTI_LABELS, labels_of
from fedprune.model.random_inputs import RandomInputs
from fedprune.model.recipe import Recipe
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.session import OnnxSession

Array = npt.NDArray[Any]
Shape = tuple[int | str | None, ...]

# λ of mixup on trial: neither 0 nor 1 nor one half, so that a step that ignores it or the partners has another loss.
_TRIAL_MIX_SHARE = 0.7


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
    session: OnnxSession,
    recipe: Recipe,
    tensors: Mapping[str, Array],
    x: Array,
    y: Array,
    classes: int,
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
