"""Training with weights and optimiser state that stay on a GPU, which may fail."""

import sys
from types import ModuleType
from typing import cast

import numpy as np
import pytest

from fedprune.model.recipe import Recipe
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingTask
from support.fakes.cuda_runtime import CudaRuntime
from support.fakes.hidden_board import CLASSES, DEVICE, SEED, HiddenBoard, hidden_weights

pytestmark = pytest.mark.board

RECIPE = Recipe(epochs=2, batch_size=16, keep_optimizer_state=True)
VALIDATED = Recipe(epochs=4, batch_size=16, keep_optimizer_state=True, patience=2, best_epoch=True)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> CudaRuntime:
    fake = CudaRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", cast("ModuleType", fake))
    return fake


def train(board: HiddenBoard, recipe: Recipe, control: TrainingControl, *, cuda: bool) -> TrainingResult:
    task = TrainingTask(recipe, CLASSES, SEED, DEVICE, 1)
    return Trainer(board.graphs / "kept.onnx", cuda=cuda).train(hidden_weights(seed=1), board.data, task, control)


def check_equal(actual: TrainingResult, expected: TrainingResult) -> None:
    for got, reference in ((actual.tensors, expected.tensors), (actual.moments, expected.moments)):
        assert set(got) == set(reference)
        for name, value in reference.items():
            assert type(got[name]) is np.ndarray
            assert got[name].tobytes() == value.tobytes()
    assert (actual.steps, actual.optimizer_steps, actual.loss_last) == (
        expected.steps,
        expected.optimizer_steps,
        expected.loss_last,
    )


@pytest.mark.parametrize("recipe", [RECIPE, VALIDATED], ids=["plain", "validated"])
def test_training_on_a_gpu(board: HiddenBoard, runtime: CudaRuntime, recipe: Recipe) -> None:
    expected = train(board, recipe, TrainingControl(), cuda=False)
    runtime.runs.clear()
    check_equal(train(board, recipe, TrainingControl(), cuda=True), expected)
    assert set(runtime.runs) == {"cuda"}


@pytest.mark.parametrize("loses", [False, True], ids=["full", "broken"])
def test_a_gpu_that_fails_in_the_middle_costs_no_step(board: HiddenBoard, runtime: CudaRuntime, loses: bool) -> None:
    """The processor goes on with what the GPU still has, or begins the round again."""
    expected = train(board, RECIPE, TrainingControl(), cuda=False)

    def progress(done: int, total: int) -> None:
        runtime.fails = done >= 3
        runtime.loses = loses and done == 3

    runtime.runs.clear()
    check_equal(train(board, RECIPE, TrainingControl(progress), cuda=True), expected)
    assert runtime.runs[:3] == ["cuda"] * 3
    assert runtime.runs.count("cpu") == expected.steps - (0 if loses else 3)


def test_a_gpu_that_fails_after_the_last_step_costs_no_round(board: HiddenBoard, runtime: CudaRuntime) -> None:
    expected = train(board, RECIPE, TrainingControl(), cuda=False)

    def progress(done: int, total: int) -> None:
        runtime.loses = runtime.loses or done == total

    check_equal(train(board, RECIPE, TrainingControl(progress), cuda=True), expected)


def test_a_gpu_without_room_for_the_weights_leaves_training_to_the_processor(
    board: HiddenBoard, runtime: CudaRuntime
) -> None:
    expected = train(board, RECIPE, TrainingControl(), cuda=False)
    runtime.runs.clear()
    runtime.places = 2
    check_equal(train(board, RECIPE, TrainingControl(), cuda=True), expected)
    assert set(runtime.runs) == {"cpu"}
