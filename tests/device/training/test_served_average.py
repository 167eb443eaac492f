"""Whether a board's average serves with the received weights or without: its validation samples decide."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune.core.metrics import BLEND, METRICS
from fedprune.model.recipe import METRICS_OF, Recipe
from fedprune.model.selection import Tensors
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import LogitAdjustment
from fedprune_device.serving.predictor import Predictor
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.evaluation import Evaluation, clearly_better
from fedprune_device.training.objective import Objective
from support.fakes.hidden_board import FEATURES, HiddenBoard, hidden_weights, logits

pytestmark = pytest.mark.board

BLENDS = Recipe(epochs=1, batch_size=16, average=0.85, blend=0.5)
CHOOSES = replace(BLENDS, validate_blend=True)
X = np.random.default_rng(5).standard_normal((4000, FEATURES)).astype(np.float32)


def equal(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(one[n].tobytes() == other[n].tobytes() for n in one)


def candidates(board: HiddenBoard, root: Path, rounds: int) -> list[dict[float, Tensors]]:
    """What serves after each round with a blend and without one, whatever validation samples say."""
    found: list[dict[float, Tensors]] = []
    for blend in (0.5, 0.0):
        other = HiddenBoard(root / str(blend), board.graphs, board.data)
        for number in range(1, rounds + 1):
            offer = other.offer(number, replace(BLENDS, blend=blend), hidden_weights(seed=number), graph="kept")
            found = found if len(found) >= number else [*found, {}]
            found[number - 1][blend] = other.carry_out(offer)[2]
    return found


def validated(board: HiddenBoard, served: dict[float, Tensors], *right: float | None) -> LocalData:
    """The board's data with a validation sample for each of `right`: one that only the model with this share of the
    received weights gets right, or neither where it is None."""
    guesses = {blend: logits(w, X).argmax(1) for blend, w in served.items()}
    rows = np.flatnonzero(guesses[0.5] != guesses[0.0])[: len(right)]
    assert len(rows) == len(right)
    y = np.array([
        3 - guesses[0.5][row] - guesses[0.0][row] if blend is None else guesses[blend][row]
        for row, blend in zip(rows, right, strict=True)
    ], np.int64)  # fmt: skip
    d = board.data
    return LocalData(d.x_train, d.y_train, d.x_test, d.y_test, X[rows], y)


def play(board: HiddenBoard, data: LocalData, number: int, recipe: Recipe = CHOOSES) -> tuple[Any, Tensors]:
    board.data = data
    update, _, serves = board.carry_out(board.offer(number, recipe, hidden_weights(seed=number), graph="kept"))
    return update, serves


@pytest.mark.parametrize(
    ("right", "served"),
    [
        ([0.0] * 2, 0.0),
        ([0.0] * 4 + [0.5], 0.0),
        ([0.0] * 3 + [0.5], 0.5),  # not more than one standard error
        ([0.0], 0.5),
        ([0.0, 0.5], 0.5),
        ([None] * 5, 0.5),
        ([0.5] * 5, 0.5),
        ([], 0.5),
    ],
    ids=str,
)
def test_the_average_serves_alone_where_validation_samples_clearly_prefer_it(
    board: HiddenBoard, tmp_path: Path, right: list[float | None], served: float
) -> None:
    (either,) = candidates(board, tmp_path, 1)
    update, serves = play(board, validated(board, either, *right), 1)
    assert equal(serves, either[served])
    assert not equal(either[0.0], either[0.5])
    assert update.metrics[BLEND] == served
    x, y = board.data.x_test, board.data.y_test
    assert update.metrics["accuracy_average"] == np.mean(logits(serves, x).argmax(1) == y)


def test_a_choice_stays_until_the_other_is_clearly_better(board: HiddenBoard, tmp_path: Path) -> None:
    """Also over restarts, as every round opens the state directory again, and where nothing is measured."""
    rounds = candidates(board, tmp_path, 6)

    def served(number: int, *right: float | None, recipe: Recipe = CHOOSES) -> float:
        either = rounds[number - 1]
        data = validated(board, either, *right)
        update, serves = play(board, data, number, recipe)
        assert equal(serves, either[update.metrics[BLEND]])
        again, same = play(board, data, number, recipe)
        assert equal(serves, same)
        assert again.metrics[BLEND] == update.metrics[BLEND]
        return update.metrics[BLEND]

    seldom = replace(CHOOSES, evaluate_every=10)
    assert served(1, 0.0, 0.0) == 0.0
    assert served(2, 0.5) == 0.0
    assert served(3, 0.5, 0.5, 0.5, recipe=seldom) == 0.0
    assert served(4, 0.0, 0.5, 0.5, 0.5) == 0.0
    assert served(5, 0.5, 0.5) == 0.5
    assert served(6) == 0.5


def test_without_validation_samples_a_board_blends_again(board: HiddenBoard, tmp_path: Path) -> None:
    one, two = candidates(board, tmp_path, 2)
    plain = board.data
    assert play(board, validated(board, one, 0.0, 0.0), 1)[0].metrics[BLEND] == 0.0
    assert equal(play(board, plain, 2)[1], two[0.5])


def test_a_record_has_the_choice_between_blend_and_average(board: HiddenBoard, tmp_path: Path) -> None:
    either = candidates(board, tmp_path, 2)
    play(board, validated(board, either[0], 0.0, 0.0), 1)
    play(board, validated(board, either[1], 0.5, 0.5), 2)
    with DeviceStore(board.root) as store:
        records = list(store.own.read().values())
    assert {state.round: state.alone for state in map(LocalState.from_bytes, records)} == {1: True, 2: False}


def test_a_validated_blend_needs_a_blend() -> None:
    with pytest.raises(ConfigError, match="validate_blend"):
        Recipe(average=0.5, validate_blend=True)


def evaluation(recipe: Recipe, values: list[dict[str, float]]) -> Evaluation:
    """With an objective that gives these metrics of the samples, in turn."""
    left = iter(values)

    class Fake:
        targets = staticmethod(lambda y: y)

        def __call__(self, outputs: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> int:
            return len(y)

        def metrics(self, samples: int) -> dict[str, float]:
            assert samples == 1
            return next(left)

    x, y = np.zeros((len(values), 2), np.float32), np.zeros((len(values), 2), np.float32)
    own = cast(LogitAdjustment, lambda outputs: outputs)
    return Evaluation(LocalData(x, y, x, y, x, y), recipe, 2, own, cast(Objective, Fake()))


@pytest.mark.parametrize(
    ("loss", "metric"),
    [(loss, m) for loss in ("cross_entropy", "bce", "mse") for m in ("", *METRICS_OF[{"cross_entropy": "classes",
     "bce": "multi", "mse": "values"}[loss]])],
)  # fmt: skip
def test_more_is_better_by_every_metric(loss: str, metric: str) -> None:
    recipe = Recipe(loss=loss, metric=metric, batch_size=2)
    judge = METRICS[recipe.judged_by]
    values = [{"loss": 4.0 - i, "accuracy": 0.1 * i, judge.name: float(i if judge.higher else 4 - i)} for i in range(3)]
    values[1] = {}
    predicts = cast(Predictor, SimpleNamespace(predict=lambda x, batch: x))
    found = evaluation(recipe, values).of_each(predicts)
    assert found[2] > found[0]
    assert math.isnan(found[1])


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=30), st.integers(0, 2**32 - 1))
def test_one_of_two_is_clearly_better_at_most(values: list[float], seed: int) -> None:
    mine = np.array(values, np.float64)
    others = np.random.default_rng(seed).permutation(mine)
    assert not (clearly_better(mine, others) and clearly_better(others, mine))
    assert not clearly_better(mine, mine)
    assert clearly_better(mine[:1], others[:1]) is False


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_right_and_wrong_samples_are_counted(wins: int, losses: int, ties: int) -> None:
    mine = np.repeat([1.0, 0.0, 1.0], [wins, losses, ties])
    others = np.repeat([0.0, 1.0, 1.0], [wins, losses, ties])
    assert clearly_better(mine, others) == (wins > losses and (wins - losses) ** 2 > wins + losses)
