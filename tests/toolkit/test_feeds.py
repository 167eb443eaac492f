"""What a training graph is fed besides samples: as the contract says."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune import step
from fedprune.feeds import anchors, first_step, numbers
from fedprune.recipe import Recipe

pytestmark = pytest.mark.board

SGD = {step.LR, step.WEIGHT_DECAY, step.MOMENTUM}
ADAM = {step.LR, step.WEIGHT_DECAY, step.BETA1, step.BETA2, step.EPSILON}


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (Recipe(), SGD),
        (Recipe(clip_norm=1, label_smoothing=0.1), SGD | {step.CLIP_NORM, step.LABEL_SMOOTHING}),
        (Recipe(optimizer="adam", loss="huber"), ADAM | {step.HUBER_DELTA}),
        (Recipe(optimizer="adamw", loss="mse"), ADAM),
    ],
)
def test_a_recipes_numbers_are_those_that_its_graph_reads(recipe: Recipe, names: set[str]) -> None:
    found = numbers(recipe)
    assert set(found) == names
    for name, value in found.items():
        assert value.shape == ()
        assert value.dtype == (np.float64 if name in (step.BETA1, step.BETA2) else np.float32), name
        assert value == value.dtype.type(getattr(recipe, name))


def test_samples_are_whole_until_a_step_mixes_them() -> None:
    assert set(numbers(Recipe(mixup=0.3))) == SGD | {step.Y_SHARE}
    assert numbers(Recipe(mixup=0.3))[step.Y_SHARE] == np.float32(1)
    assert set(numbers(Recipe(mixup=0.3, loss="mse"))) == SGD  # whose targets are mixed before they are fed
    found = first_step(Recipe(), {}, {step.Y_SHARE, step.Y_PARTNER}, 9, 4)
    assert found == {step.Y_SHARE: np.float32(1)}  # labels and their partners are the samples'


def test_only_trained_tensors_are_pulled() -> None:
    tensors = {"w": np.ones((2, 3), np.float32), "mean": np.ones(2, np.float32)}
    assert anchors(Recipe(), tensors, ["w"]) == {}
    found = anchors(Recipe(proximal=0.5), tensors, ["w"])
    assert set(found) == {step.anchor("w"), step.strength("w")}
    assert np.array_equal(found[step.anchor("w")], tensors["w"])


def test_a_first_step_feeds_what_the_graph_has_and_nothing_else() -> None:
    tensors = {"w": np.ones((2, 3), np.float32), "mean": np.ones(2, np.float32)}
    inputs = {"w", "mean", step.LR, step.STEP_NUMBER, step.DIVISOR, step.CLASS_MASK, step.mask("w")}
    inputs |= {step.buffer("w"), step.second("w"), step.total("w")}
    found = first_step(Recipe(optimizer="adam"), tensors, inputs, 9, 4)
    assert set(found) == inputs
    assert found[step.DIVISOR] == 9
    assert found[step.STEP_NUMBER] == 1
    assert found[step.CLASS_MASK].tolist() == [1, 1, 1, 1]
    assert not any(found[f("w")].any() for f in (step.buffer, step.second, step.total))
