"""Recipes: limits, features, JSON."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune.model.features import OPTIMIZERS, Features
from fedprune.model.mixup import MIN_MIXUP
from fedprune.model.recipe import SCHEDULES, Recipe

pytestmark = pytest.mark.board

settings = st.builds(
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
    label_smoothing=st.floats(0, 1),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    beta2=st.floats(0, 1, exclude_max=True),
    clip_norm=st.floats(0, 10),
    frozen=st.lists(st.text("abc.*[", min_size=1, max_size=5), max_size=3).map(tuple),
    ordered_dropout=st.lists(st.floats(0.1, 1), max_size=3).map(tuple),
    average=st.floats(0, 1, exclude_max=True),
    calibrate=st.booleans(),
    personal=st.lists(st.text("abc.*[", min_size=1, max_size=5), max_size=3).map(tuple),
    scale=st.floats(1, 16),
    patience=st.integers(0, 9),
    report_squares=st.booleans(),
    drift=st.booleans(),
    best_epoch=st.booleans(),
    keep_optimizer_state=st.booleans(),
    lr_warmup=st.floats(0, 9),
    lr_schedule=st.sampled_from(SCHEDULES),
)
recipes = st.builds(
    lambda recipe, blend, mixup: replace(recipe, blend=blend if recipe.average else 0.0, mixup=mixup),
    settings,
    st.floats(0, 1),
    st.just(0.0) | st.floats(MIN_MIXUP, 10),
)

FLAGS = [f.name for f in fields(Features) if f.default is False]
NON_FLAGS = {
    "loss": "bce",
    "metric": "miou",
    "ignore_label": 7,
    "optimizer": "adamw",
    "frozen": ("a*",),
    "trainable": ("a*",),
    "augment": ("flip",),
    "decay": False,
}


@given(recipes)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe


@given(recipes, st.integers(1, 10_000))
def test_steps_are_the_batches_of_all_epochs_up_to_the_limit(recipe: Recipe, samples: int) -> None:
    batches = recipe.epochs * len(range(0, samples, recipe.batch_size))
    assert recipe.steps(samples) == (min(batches, recipe.max_steps) if recipe.max_steps else batches)


@given(recipes, st.floats(0, 1), st.integers(1, 9))
def test_numbers_do_not_name_another_graph(recipe: Recipe, lr: float, epochs: int) -> None:
    assert Recipe.from_dict({**recipe.to_dict(), "lr": lr, "epochs": epochs}).features == recipe.features


def test_every_feature_has_a_key_of_its_own() -> None:
    asked: list[dict[str, Any]] = [{}, *({n: True} for n in FLAGS), dict.fromkeys(FLAGS, True)]
    asked += [{k: v} for k, v in NON_FLAGS.items()]
    keys = {Features(**chosen).key for chosen in asked}
    assert set(FLAGS) | set(NON_FLAGS) == {f.name for f in fields(Features)}
    assert len(keys) == len(asked)


@pytest.mark.parametrize(
    "entry", ["flip", "crop:4", "shift:0.1", "shift:0.5:0", "specaugment:8:16@sound", "noise:1e-3"]
)
def test_augmentations_are_written_and_read_as_a_list(entry: str) -> None:
    recipe = Recipe.from_dict({"augment": [entry, "flip"]})
    assert recipe.to_dict()["augment"] == recipe.to_offer()["augment"] == [entry, "flip"]
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    assert recipe.features == Features(augment=(entry, "flip"))


@pytest.mark.parametrize(
    "entry",
    [*("", "turn", "flip:1", "flip@", "crop", "crop:1.5", "crop:0", "crop:-1", "crop:1:2", "crop:5000", "noise:nan")],
)
def test_a_wrong_augmentation_is_refused(entry: object) -> None:
    with pytest.raises(ConfigError, match="augment"):
        Recipe.from_dict({"augment": [entry]})
    for wrong in ("flip", {"flip": 1}, 3, ["flip"] * 17):
        with pytest.raises(ConfigError, match=r"recipe\.augment"):
            Recipe.from_dict({"augment": wrong})


@pytest.mark.parametrize("loss", ["bce", "mse"])
@pytest.mark.parametrize("name", ["logit_adjustment", "mask_absent_classes", "balance_classes", "label_smoothing"])
def test_settings_that_the_loss_has_no_meaning_for_are_refused(name: str, loss: str) -> None:
    setting = {"loss": loss, name: 0.1 if name == "label_smoothing" else True}
    if (name, loss) == ("balance_classes", "bce"):
        assert Recipe.from_dict(setting).features.class_weight
        return
    with pytest.raises(ConfigError, match=f"recipe.{name}: with loss '{loss}'"):
        Recipe.from_dict(setting)


def test_plain_training_has_nothing_of_a_strategys() -> None:
    assert Recipe(
        lr=0.2, average=0.5, blend=0.1, validate_blend=True, mixup=0.3, mask="threshold", mask_threshold=0.1
    ).plain_training == Recipe(lr=0.2)


def test_what_a_board_holds_beside_training_is_counted() -> None:
    settings = [Recipe(), Recipe(average=0.5), Recipe(patience=1), Recipe(average=0.5, patience=1)]
    assert [r.extra_copies for r in settings] == [0, 2, 1, 3]
    assert Recipe(patience=1, best_epoch=False).extra_copies == 0
    assert Recipe(average=0.5, blend=0.2).extra_copies == 3
    assert [Recipe(optimizer=o, keep_optimizer_state=True).extra_copies for o in OPTIMIZERS] == [1, 2, 2, 1]


@given(recipes)
def test_an_offer_says_the_same_as_the_recipe(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_offer()))) == recipe


@given(
    st.floats(0, 5), st.integers(6, 40), st.integers(1, 40), st.integers(1, 30), st.sampled_from(SCHEDULES), st.data()
)
def test_the_learning_rate_goes_up_and_then_down_without_a_jump(
    warmup: float, rounds: int, round_: int, steps: int, schedule: str, data: st.DataObject
) -> None:
    recipe = Recipe(lr=0.5, lr_warmup=warmup, lr_schedule=schedule, lr_rounds=rounds if schedule == "cosine" else 0)
    shares = [(s - 0.5) / steps for s in range(1, steps + 1)]
    rates = [recipe.learning_rate(round_, d) for d in shares]
    points = [round_ - 1 + d for d in shares]
    assert all(0 <= r <= 0.5 for r in rates)
    assert all(r > 0 for r, p in zip(rates, points, strict=True) if p < rounds - 1e-6)
    rising = [r for r, p in zip(rates, points, strict=True) if p <= warmup]
    falling = [r for r, p in zip(rates, points, strict=True) if p >= warmup]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert recipe.learning_rate(round_, 1.0) == pytest.approx(recipe.learning_rate(round_ + 1, 0.0))
    if schedule == "constant":
        assert set(falling) <= {0.5}
    elif round_ > rounds:
        assert not any(rates)


def test_without_a_schedule_every_step_has_the_same_bits() -> None:
    assert {Recipe(lr=0.1).learning_rate(r, d) for r in (1, 7) for d in (0.0, 0.3, 1.0)} == {0.1}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"ignore_label": 3, "mixup": 0.2}, "mixup"),
        ({"loss": "distill", "mixup": 0.2}, "mixup"),
        ({"loss": "bce", "metric": "rmse"}, "metric"),
        ({"lr_rounds": 5}, "lr_rounds"),
        ({"lr_schedule": "cosine", "lr_rounds": 5, "lr_warmup": 5}, "lr_warmup"),
        ({"batch_size": 4, "accumulate": 5}, "accumulate"),
        ({"mask_threshold": 0.1, "mask": "hard"}, "mask_threshold"),
        ({"blend": 0.5}, "blend"),
        ({"validate_blend": True, "average": 0.5}, "validate_blend"),
        ({"ordered_dropout": [0.5], "mask": "hard"}, "ordered_dropout"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_together_are_refused(setting: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(setting)
    assert caught.value.path[-1] == name
