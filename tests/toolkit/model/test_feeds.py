"""What a training graph is fed besides samples: as the contract says."""

import numpy as np
import pytest

from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.step_feeds import first_step_feeds, number_feeds

pytestmark = pytest.mark.board

SGD = {step_contract.LR, step_contract.WEIGHT_DECAY, step_contract.MOMENTUM}
ADAM = {step_contract.LR, step_contract.WEIGHT_DECAY, step_contract.BETA1, step_contract.BETA2, step_contract.EPSILON}


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (Recipe(), SGD),
        (Recipe(clip_norm=1, label_smoothing=0.1), SGD | {step_contract.CLIP_NORM, step_contract.LABEL_SMOOTHING}),
        (Recipe(optimizer="adam", loss="huber"), ADAM | {"huber_delta"}),
        (Recipe(optimizer="adamw", loss="mse"), ADAM),
    ],
)
def test_a_recipes_numbers_are_those_that_its_graph_reads(recipe: Recipe, names: set[str]) -> None:
    feed_values = number_feeds(recipe)
    assert set(feed_values) == names
    for name, value in feed_values.items():
        assert value.shape == ()
        assert value.dtype == (np.float64 if name in (step_contract.BETA1, step_contract.BETA2) else np.float32), name
        assert value == value.dtype.type(getattr(recipe, name))


def test_samples_are_whole_until_a_step_mixes_them() -> None:
    assert set(number_feeds(Recipe(mixup=0.3))) == SGD | {step_contract.Y_SHARE}
    assert number_feeds(Recipe(mixup=0.3))[step_contract.Y_SHARE] == np.float32(1)
    assert set(number_feeds(Recipe(mixup=0.3, loss="mse"))) == SGD  # whose targets are mixed before they are fed
    y = np.arange(9)
    feed_values = first_step_feeds(Recipe(), {}, {step_contract.Y_SHARE, step_contract.Y_PARTNER}, y, 4)
    assert feed_values.keys() == {step_contract.Y_SHARE, step_contract.Y_PARTNER}
    assert feed_values[step_contract.Y_SHARE] == 1
    assert feed_values[step_contract.Y_PARTNER] is y  # each is its own partner
