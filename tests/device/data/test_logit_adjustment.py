"""Own predictions: the logits as training had them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import LogitAdjustment
from support.fakes.hidden_board import HiddenBoard, hidden_weights, logits

pytestmark = pytest.mark.board

Y = np.array([0, 2, 2, 2], np.int64)
LOGITS = np.array([[-1.0, 5.0, -2.0], [1.0, 2.0, 3.0]], np.float32)


def test_nothing_is_done_to_logits_that_training_left_alone() -> None:
    assert np.array_equal(LogitAdjustment.of(Y, Recipe(), 3)(LOGITS), LOGITS)


def test_adjusted_logits_have_the_log_of_the_labels_shares() -> None:
    shares = (np.array([1, 0, 3]) + 0.1) / (4 + 0.1 * 3)

    assert np.allclose(LogitAdjustment.of(Y, Recipe(logit_adjustment=True), 3)(LOGITS), LOGITS + np.log(shares))


def test_logits_of_absent_classes_are_0() -> None:
    masked = LogitAdjustment.of(Y, Recipe(mask_absent_classes=True), 3)(LOGITS)

    assert np.array_equal(masked, [[-1, 0, -2], [1, 0, 3]])


def test_a_board_judges_its_model_as_it_was_trained(tmp_path: Path, graphs: Path, data: LocalData) -> None:
    """On a board that lacks a class, whose logit masked training never pushed down."""
    kept, tested = data.y_train != 1, data.y_test != 1
    lacking = LocalData(data.x_train[kept], data.y_train[kept], data.x_test[tested], data.y_test[tested])
    board = HiddenBoard(tmp_path, graphs, lacking)
    recipe = Recipe(epochs=1, batch_size=16, mask_absent_classes=True)
    update, _, serves = board.carry_out(board.offer(1, recipe, hidden_weights(), graph="masked_classes"))
    outputs = logits(serves, lacking.x_test)
    outputs[:, 1] = 0

    assert update.metrics["accuracy_after"] == np.mean(outputs.argmax(1) == lacking.y_test)
