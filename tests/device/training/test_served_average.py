"""Whether a board's average serves with the received weights or without: its validation samples decide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.metrics import BLEND
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune_device.data.dataset import LocalData
from support.fakes.hidden_board import FEATURES, HiddenBoard, hidden_weights, logits

pytestmark = pytest.mark.board

BLENDS = Recipe(epochs=1, batch_size=16, average=0.85, blend=0.5)
CHOOSES = replace(BLENDS, validate_blend=True)
X = np.random.default_rng(5).standard_normal((4000, FEATURES)).astype(np.float32)


def equal(tensors: Tensors, expected: Tensors) -> bool:
    return list(tensors) == list(expected) and all(tensors[n].tobytes() == expected[n].tobytes() for n in tensors)


def candidates(board: HiddenBoard, root: Path, rounds: int) -> list[dict[float, Tensors]]:
    """What serves after each round with a blend and without one, whatever validation samples say."""
    by_round: list[dict[float, Tensors]] = []
    for blend in (0.5, 0.0):
        board_of_blend = HiddenBoard(root / str(blend), board.graphs, board.data)
        for number in range(1, rounds + 1):
            offer = board_of_blend.offer(
                number, replace(BLENDS, blend=blend), hidden_weights(seed=number), graph="kept"
            )
            by_round = by_round if len(by_round) >= number else [*by_round, {}]
            by_round[number - 1][blend] = board_of_blend.carry_out(offer)[2]
    return by_round


def with_validation_samples(board: HiddenBoard, served: dict[float, Tensors], *right: float | None) -> LocalData:
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
    update, serves = play(board, with_validation_samples(board, either, *right), 1)
    assert equal(serves, either[served])
    assert not equal(either[0.0], either[0.5])
    assert update.metrics[BLEND] == served
    x, y = board.data.x_test, board.data.y_test
    assert update.metrics["accuracy_average"] == np.mean(logits(serves, x).argmax(1) == y)


def test_a_choice_stays_until_the_other_is_clearly_better(board: HiddenBoard, tmp_path: Path) -> None:
    """Also over restarts, as every round opens the state directory again, and where nothing is measured."""
    rounds = candidates(board, tmp_path, 6)

    def served_blend(number: int, *right: float | None, recipe: Recipe = CHOOSES) -> float:
        either = rounds[number - 1]
        data = with_validation_samples(board, either, *right)
        update, serves = play(board, data, number, recipe)
        assert equal(serves, either[update.metrics[BLEND]])
        repeated, same = play(board, data, number, recipe)
        assert equal(serves, same)
        assert repeated.metrics[BLEND] == update.metrics[BLEND]
        return update.metrics[BLEND]

    seldom = replace(CHOOSES, evaluate_every=10)
    assert served_blend(1, 0.0, 0.0) == 0.0
    assert served_blend(2, 0.5) == 0.0
    assert served_blend(3, 0.5, 0.5, 0.5, recipe=seldom) == 0.0
    assert served_blend(4, 0.0, 0.5, 0.5, 0.5) == 0.0
    assert served_blend(5, 0.5, 0.5) == 0.5
    assert served_blend(6) == 0.5
