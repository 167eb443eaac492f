"""Training with weights and optimiser state that stay on a GPU, which may fail."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

import numpy as np
import pytest

from fedprune.model.recipe import Recipe
from fedprune_device.training.trainer import Trainer, TrainingControl, TrainingResult, TrainingTask
from support.fakes.cuda_runtime import CudaRuntime
from support.fakes.hidden_board import CLASSES, DEVICE, SEED, HiddenBoard, hidden_weights

pytestmark = pytest.mark.board

RECIPE = Recipe(epochs=2, batch_size=16, keep_optimizer_state=True)
VALIDATED = Recipe(epochs=4, batch_size=16, keep_optimizer_state=True, patience=2, best_epoch=True)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> CudaRuntime:
    made = CudaRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", cast("ModuleType", made))
    return made


def trained(board: HiddenBoard, recipe: Recipe, control: TrainingControl, *, cuda: bool) -> TrainingResult:
    task = TrainingTask(recipe, CLASSES, SEED, DEVICE, 1)
    return Trainer(board.graphs / "kept.onnx", cuda=cuda).train(hidden_weights(seed=1), board.data, task, control)


def check_equal(one: TrainingResult, other: TrainingResult) -> None:
    for got, wanted in ((one.tensors, other.tensors), (one.moments, other.moments)):
        assert set(got) == set(wanted)
        for name, value in wanted.items():
            assert type(got[name]) is np.ndarray
            assert got[name].tobytes() == value.tobytes()
    assert (one.steps, one.optimizer_steps, one.loss_last) == (other.steps, other.optimizer_steps, other.loss_last)


@pytest.mark.parametrize("recipe", [RECIPE, VALIDATED], ids=["plain", "validated"])
def test_training_on_a_gpu(board: HiddenBoard, runtime: CudaRuntime, recipe: Recipe) -> None:
    wanted = trained(board, recipe, TrainingControl(), cuda=False)
    runtime.runs.clear()
    check_equal(trained(board, recipe, TrainingControl(), cuda=True), wanted)
    assert set(runtime.runs) == {"cuda"}


@pytest.mark.parametrize("loses", [False, True], ids=["full", "broken"])
def test_a_gpu_that_fails_in_the_middle_costs_no_step(board: HiddenBoard, runtime: CudaRuntime, loses: bool) -> None:
    """The processor goes on with what the GPU still has, or begins the round again."""
    wanted = trained(board, RECIPE, TrainingControl(), cuda=False)

    def progress(done: int, total: int) -> None:
        runtime.fails = done >= 3
        runtime.loses = loses and done == 3

    runtime.runs.clear()
    check_equal(trained(board, RECIPE, TrainingControl(progress), cuda=True), wanted)
    assert runtime.runs[:3] == ["cuda"] * 3
    assert runtime.runs.count("cpu") == wanted.steps - (0 if loses else 3)


def test_a_gpu_that_fails_after_the_last_step_costs_no_round(board: HiddenBoard, runtime: CudaRuntime) -> None:
    wanted = trained(board, RECIPE, TrainingControl(), cuda=False)

    def progress(done: int, total: int) -> None:
        runtime.loses = runtime.loses or done == total

    check_equal(trained(board, RECIPE, TrainingControl(progress), cuda=True), wanted)


def test_a_gpu_without_room_for_the_weights_leaves_training_to_the_processor(
    board: HiddenBoard, runtime: CudaRuntime
) -> None:
    wanted = trained(board, RECIPE, TrainingControl(), cuda=False)
    runtime.runs.clear()
    runtime.places = 2
    check_equal(trained(board, RECIPE, TrainingControl(), cuda=True), wanted)
    assert set(runtime.runs) == {"cpu"}
