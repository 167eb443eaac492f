"""Recipes: limits, features, JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.errors import ConfigError
from fedprune.recipe import Features, Recipe

pytestmark = pytest.mark.board

recipes = st.builds(
    Recipe,
    epochs=st.integers(1, 100),
    batch_size=st.integers(1, 512),
    lr=st.floats(0, 10),
    momentum=st.floats(0, 1, exclude_max=True),
    weight_decay=st.floats(0, 1),
    proximal=st.floats(0, 10),
    logit_adjustment=st.booleans(),
    mask_absent_classes=st.booleans(),
    balance_classes=st.booleans(),
    max_steps=st.integers(0, 1000),
)


@given(recipes)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe


@given(recipes, st.integers(1, 10_000))
def test_steps_are_the_batches_of_all_epochs_up_to_the_limit(recipe: Recipe, samples: int) -> None:
    batches = recipe.epochs * len(range(0, samples, recipe.batch_size))
    assert recipe.steps(samples) == (min(batches, recipe.max_steps) if recipe.max_steps else batches)


@given(recipes, st.floats(0, 1), st.integers(1, 9))
def test_numbers_do_not_name_another_graph(recipe: Recipe, lr: float, epochs: int) -> None:
    other = Recipe.from_dict({**recipe.to_dict(), "lr": lr, "epochs": epochs})
    assert other.features == recipe.features


def test_every_feature_has_a_key_of_its_own() -> None:
    names = ["logit_offset", "class_weight", "class_mask", "proximal", "element_mask", "gradients"]
    keys = {Features(**dict.fromkeys(chosen, True)).key for chosen in ([], *([n] for n in names), names)}
    assert len(keys) == len(names) + 2


@pytest.mark.parametrize(
    ("setting", "feature"),
    [
        ({"logit_adjustment": True}, "logit_offset"),
        ({"mask_absent_classes": True}, "class_mask"),
        ({"balance_classes": True}, "class_weight"),
        ({"proximal": 0.1}, "proximal"),
    ],
)
def test_a_setting_asks_for_its_input(setting: dict[str, Any], feature: str) -> None:
    assert Recipe.from_dict(setting).features == Features(**{feature: True})


@pytest.mark.parametrize("value", [None, "1", True, float("nan"), float("inf"), -1, 1e12, [1]])
@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr", "momentum", "weight_decay", "proximal", "max_steps"])
def test_numbers_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"recipe: {name}"):
        Recipe.from_dict({name: value})


def test_momentum_is_below_one() -> None:
    with pytest.raises(ConfigError, match="recipe: momentum: expected a number from 0 to below 1, got 1"):
        Recipe(momentum=1)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "max_steps"])
def test_counts_are_whole(name: str) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        Recipe.from_dict({name: 1.5})


@pytest.mark.parametrize("name", ["logit_adjustment", "mask_absent_classes", "balance_classes"])
def test_switches_are_true_or_false(name: str) -> None:
    with pytest.raises(ConfigError, match="true or false"):
        Recipe.from_dict({name: 1})


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'learning_rate'"):
        Recipe.from_dict({"learning_rate": 0.1})
