"""Makes the arrays that a training step is fed, by the contract of training graphs (`fedprune.model.step_contract`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model import step_contract
from fedprune.model.loss import CLASS_WEIGHT as CLASS_WEIGHT
from fedprune.model.loss import HITS as HITS
from fedprune.model.loss import LABEL_SMOOTHING as LABEL_SMOOTHING
from fedprune.model.loss import Y_PARTNER as Y_PARTNER
from fedprune.model.loss import Y_SHARE as Y_SHARE
from fedprune.model.loss import Y as Y
from fedprune.model.recipe import Recipe

Array = npt.NDArray[Any]


def number_feeds(recipe: Recipe) -> dict[str, Array]:
    """The numbers that a recipe sets. They are the same in every step, except for λ where samples are mixed."""
    read_numbers = {name: n for name, n in step_contract.NUMBERS.items() if n.setting and n.is_read(recipe.features)}
    out: dict[str, Array] = {name: np.array(getattr(recipe, n.setting), n.dtype) for name, n in read_numbers.items()}
    return out | ({Y_SHARE: np.array(1, np.float32)} if recipe.features.label_pairs else {})


def term_feeds(recipe: Recipe, tensors: Mapping[str, Array], trained: Collection[str]) -> dict[str, Array]:
    """The terms that a recipe adds to gradients: of a proximal one the anchors, the trained tensors as they are now;
    and a drift of 0."""
    out: dict[str, Array] = {}
    if recipe.features.proximal:
        out = {step_contract.anchor_name(n): np.asarray(tensors[n], order="C") for n in trained}
        out |= {step_contract.strength_name(n): np.array(recipe.proximal, np.float32) for n in trained}
    if recipe.drift:  # unlike `zeros_like`, `zeros` takes no memory until it is written to
        out |= {step_contract.drift_name(n): np.zeros(tensors[n].shape, np.float32) for n in trained}
    return out


def divisor_share(y: Array, ignored: int | None = None, class_weight: Array | None = None) -> float:
    """The contribution of labels to the divisor of their batch's loss: class labels by their weights, others 1 each."""
    if y.dtype.kind != "i":
        return float(len(y))
    counted_labels = y if ignored is None else y[y != ignored]
    return float(counted_labels.size if class_weight is None else class_weight[counted_labels].sum(dtype=np.float64))


def first_step_feeds(
    recipe: Recipe, tensors: Mapping[str, Array], inputs: Collection[str], y: Array, classes: int
) -> dict[str, Array]:
    """The feeds of a round's first step on labels `y`, except samples and labels, with equal class weights; only those
    that `inputs` names."""
    trained = [n for n in tensors if step_contract.momentum_name(n) in inputs]
    inputs_by_name: dict[str, Array] = {n: np.asarray(v, order="C") for n, v in tensors.items()}
    inputs_by_name |= number_feeds(recipe) | term_feeds(recipe, tensors, trained)
    inputs_by_name[step_contract.STEP_NUMBER] = np.array(1, np.int64)
    inputs_by_name[step_contract.OUTPUT_SCALE] = inputs_by_name[Y_SHARE] = np.array(1, np.float32)
    inputs_by_name[Y_PARTNER] = y
    weight = divisor_share(y, recipe.ignore_label) if recipe.features.counts_hits else len(y)
    inputs_by_name[step_contract.DIVISOR] = np.array(weight, np.float32)
    inputs_by_name[step_contract.LOGIT_OFFSET] = np.zeros(classes, np.float32)
    inputs_by_name[CLASS_WEIGHT] = inputs_by_name[step_contract.CLASS_MASK] = np.ones(classes, np.float32)
    for name in trained:
        inputs_by_name[step_contract.mask_name(name)] = np.ones_like(inputs_by_name[name])
        inputs_by_name[step_contract.threshold_name(name)] = np.array(0, np.float32)
        for array in (*step_contract.state_names(recipe.optimizer), step_contract.gradient_sum_name):
            inputs_by_name[array(name)] = np.zeros_like(inputs_by_name[name])
    return {n: v for n, v in inputs_by_name.items() if n in inputs}
