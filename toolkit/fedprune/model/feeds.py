"""What a training graph is fed besides samples and labels, by the names of `fedprune.model.step_contract`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model import step_contract
from fedprune.model.recipe import Recipe

Array = npt.NDArray[Any]


def numbers(recipe: Recipe) -> dict[str, Array]:
    """The scalars that a recipe sets, the same in every step but for the share of labels where samples are mixed."""
    out = {
        step_contract.LR: np.array(recipe.lr, np.float32),
        step_contract.WEIGHT_DECAY: np.array(recipe.weight_decay, np.float32),
    }
    if recipe.optimizer == "sgd":
        out[step_contract.MOMENTUM] = np.array(recipe.momentum, np.float32)
    else:
        out[step_contract.BETA1] = np.array(recipe.beta1, np.float64)
        out[step_contract.BETA2] = np.array(recipe.beta2, np.float64)
        out[step_contract.EPSILON] = np.array(recipe.epsilon, np.float32)
    if recipe.features.clip:
        out[step_contract.CLIP_NORM] = np.array(recipe.clip_norm, np.float32)
    if recipe.features.scale:
        out[step_contract.OUTPUT_SCALE] = np.array(recipe.scale, np.float32)
    if recipe.features.mixup:
        out[step_contract.Y_SHARE] = np.array(1, np.float32)
    return out | loss_numbers(recipe)


def loss_numbers(recipe: Recipe) -> dict[str, Array]:
    """Those of `numbers` that the loss depends on."""
    out: dict[str, Array] = {}
    if recipe.label_smoothing:
        out[step_contract.LABEL_SMOOTHING] = np.array(recipe.label_smoothing, np.float32)
    if recipe.loss == "huber":
        out[step_contract.HUBER_DELTA] = np.array(recipe.huber_delta, np.float32)
    return out


def anchors(recipe: Recipe, tensors: Mapping[str, Array], trained: Collection[str]) -> dict[str, Array]:
    """What the proximal term pulls towards, if the recipe has one: the trained tensors as they are now."""
    if not recipe.features.proximal:
        return {}
    out: dict[str, Array] = {step_contract.anchor(n): np.asarray(tensors[n], order="C") for n in trained}
    return out | {step_contract.strength(n): np.array(recipe.proximal, np.float32) for n in trained}


def first_step(
    recipe: Recipe, tensors: Mapping[str, Array], inputs: Collection[str], samples: int, classes: int
) -> dict[str, Array]:
    """Everything but samples and labels that the first step of a round is fed, where classes count alike; only what
    `inputs` name."""
    trained = [n for n in tensors if step_contract.buffer(n) in inputs]
    out: dict[str, Array] = {n: np.asarray(v, order="C") for n, v in tensors.items()}
    out |= numbers(recipe) | anchors(recipe, tensors, trained)
    out[step_contract.STEP_NUMBER] = np.array(1, np.int64)
    out[step_contract.OUTPUT_SCALE] = out[step_contract.Y_SHARE] = np.array(1, np.float32)
    out[step_contract.DIVISOR] = np.array(samples, np.float32)
    out[step_contract.LOGIT_OFFSET] = np.zeros(classes, np.float32)
    out[step_contract.CLASS_WEIGHT] = out[step_contract.CLASS_MASK] = np.ones(classes, np.float32)
    for name in trained:
        out[step_contract.mask(name)] = np.ones_like(out[name])
        out[step_contract.threshold(name)] = np.array(0, np.float32)
        for array in (*step_contract.states(recipe.optimizer), step_contract.total, step_contract.squares):
            out[array(name)] = np.zeros_like(out[name])
    return {n: v for n, v in out.items() if n in inputs}
