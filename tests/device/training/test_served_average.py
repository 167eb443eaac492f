"""Whether a board serves its average, a blend with the received weights, or these: its validation samples decide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.metrics import BLEND
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.state_directory import DeviceStore
from support.fakes.agent_harness import same
from support.fakes.hidden_board import FEATURES, HiddenBoard, hidden_weights, logits

pytestmark = pytest.mark.board

BLENDS = Recipe(epochs=1, batch_size=16, average=0.85, blend=0.5)
CHOOSES = replace(BLENDS, validate_blend=True)
X = np.random.default_rng(5).standard_normal((4000, FEATURES)).astype(np.float32)


def candidates(board: HiddenBoard, root: Path, rounds: int) -> list[dict[float, Tensors]]:
    """What serves after each round by the share of the received weights, whatever validation samples say."""
    by_round: list[dict[float, Tensors]] = []
    for blend in (0.5, 0.0, 1.0):
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
    received weights gets right, or none of them where it is None."""
    guesses = {share: logits(w, X).argmax(1) for share, w in served.items()}
    rows, labels = list[int](), list[int]()
    for share in right:
        for row in range(rows[-1] + 1 if rows else 0, len(X)):
            guessed = {s: int(guesses[s][row]) for s in guesses}
            others = {0, 1, 2} - set(guessed.values()) if share is None else {guessed.pop(share)}
            if others and not others & set(guessed.values()):
                rows.append(row)
                labels.append(others.pop())
                break
    assert len(rows) == len(right)
    d = board.data
    return LocalData(d.x_train, d.y_train, d.x_test, d.y_test, X[rows], np.array(labels, np.int64))


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
        ([1.0] * 2, 1.0),
        ([1.0] * 2 + [0.0] * 2, 0.0),  # both before the blend, and level
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
    assert same(serves, either[served])
    assert not same(either[0.0], either[0.5])
    assert update.metrics[BLEND] == served
    x, y = board.data.x_test, board.data.y_test
    assert update.metrics["accuracy_average"] == np.mean(logits(serves, x).argmax(1) == y)


def test_a_choice_stays_until_the_other_is_clearly_better(board: HiddenBoard, tmp_path: Path) -> None:
    """Also over restarts, as every round opens the state directory again, and where nothing is measured."""
    rounds = candidates(board, tmp_path, 7)

    def served_blend(number: int, *right: float | None, recipe: Recipe = CHOOSES) -> float:
        either = rounds[number - 1]
        data = with_validation_samples(board, either, *right)
        update, serves = play(board, data, number, recipe)
        assert same(serves, either[update.metrics[BLEND]])
        repeated, again = play(board, data, number, recipe)
        assert same(serves, again)
        assert repeated.metrics[BLEND] == update.metrics[BLEND]
        return update.metrics[BLEND]

    seldom = replace(CHOOSES, evaluate_every=10)
    assert served_blend(1, 0.0, 0.0) == 0.0
    assert served_blend(2, 0.5) == 0.0
    assert served_blend(3, 0.5, 0.5, 0.5, recipe=seldom) == 0.0
    assert served_blend(4, 0.0, 0.5, 0.5, 0.5) == 0.0
    assert served_blend(5, 0.5, 0.5) == 0.5
    assert served_blend(6, 1.0, 1.0) == 1.0
    assert served_blend(7, 0.0) == 1.0


def test_a_choice_of_the_blend_is_that_of_the_present_recipe(board: HiddenBoard) -> None:
    data = board.data
    for number, blend in ((1, 0.5), (2, 0.25)):
        update, _ = play(board, data, number, replace(CHOOSES, blend=blend, evaluate_every=10))
    assert update.metrics[BLEND] == 0.25


def test_the_received_model_serves_without_the_labels_as_prior_where_they_are_new(board: HiddenBoard) -> None:
    """A board that has trained on one class alone, and meets the others."""
    d, w = board.data, hidden_weights(seed=1)
    y = logits(w, X[:50]).argmax(1)
    board.data = LocalData(d.x_train, np.zeros_like(d.y_train), X[:50], y, X[:50], y)
    recipe = replace(CHOOSES, logit_adjustment=True)
    update, _, serves = board.carry_out(board.offer(1, recipe, w, graph="prior"))
    assert same(serves, w)
    assert (update.metrics[BLEND], update.metrics["accuracy_average"]) == (1.0, 1.0)
    assert update.metrics["accuracy_before"] < 1, "with the labels as prior"
    with DeviceStore(board.root) as store:
        record = store.slots.current()
    assert record is not None
    assert record.offset is None, "predictions are made as they were measured"
