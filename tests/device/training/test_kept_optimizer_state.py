"""The optimiser's state that a board keeps between rounds: continued, moved with its channels, or left behind."""

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.updates.relocation import make_relocation
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.carried_state import carried_optimizer_state
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingResult, TrainingTask
from support.fakes.agent_harness import same
from support.fakes.hidden_board import ARCHITECTURE, CLASSES, DEVICE, SEED, HiddenBoard, hidden_weights

pytestmark = pytest.mark.board

KEEPS = Recipe(epochs=1, batch_size=16, keep_optimizer_state=True)


def train(board: HiddenBoard, number: int, weights: Tensors, before: TrainingResult | None) -> TrainingResult:
    task = TrainingTask(KEEPS, CLASSES, SEED, DEVICE, number)
    if before is not None:
        task = replace(task, moments=before.moments, optimizer_steps=before.optimizer_steps)
    result = Trainer(board.graphs / "kept.onnx").train(weights, board.data, task)
    return replace(result, tensors={n: v.copy() for n, v in result.tensors.items()})


def test_a_round_goes_on_with_the_state_of_the_one_before(board: HiddenBoard) -> None:
    before = None
    for number in (1, 2, 4):
        weights = hidden_weights(seed=number)
        _, sent, _ = board.carry_out(board.offer(number, KEEPS, weights, graph="kept"))
        alone = train(board, number, weights, None)
        before = train(board, number, weights, before)
        assert same(sent, before.tensors)
        assert same(sent, alone.tensors) == (number == 1)
        state = board.newest_state()
        assert same(state.moments, before.moments)
        assert (state.optimizer, state.steps) == ("sgd", before.optimizer_steps)


def test_a_round_that_is_done_twice_gives_the_same_update(board: HiddenBoard) -> None:
    board.carry_out(board.offer(1, KEEPS, hidden_weights(seed=1), graph="kept"))
    second_offer = board.offer(2, KEEPS, hidden_weights(seed=2), graph="kept")
    one = board.carry_out(second_offer)[1]
    board.carry_out(board.offer(2, KEEPS, hidden_weights(seed=3), graph="kept"))
    assert same(board.carry_out(structs.replace(second_offer, attempt=1))[1], one)


BEFORE = Selection.of(ARCHITECTURE, (6,), [[4, 1, 7, 0, 3, 2, 5, 6]])
NOW = Selection.of(ARCHITECTURE, (4,), [[7, 5, 4, 1, 0, 2, 3, 6]])
OLD_CHANNELS = [0, 2, 3]  # places now of channels 7, 4 and 1; channel 5 is new
ALL_CHANNELS = {n: np.abs(v) for n, v in hidden_weights(seed=3).items() if n in ARCHITECTURE.by_name}


def state_before(optimizer: str = "adam") -> LocalState:
    """The state of a round before, with the means of `ALL_CHANNELS` and mean squares of twice that."""
    means = BEFORE.gather(ALL_CHANNELS)
    moments = {step_contract.momentum_name(n): v for n, v in means.items()}
    moments |= {step_contract.second_moment_name(n): 2 * v for n, v in means.items()}
    place = (BEFORE.digest, "c" * 64, BEFORE.widths, 1)
    return LocalState("job", 7, "a" * 64, *place, moments=moments, optimizer=optimizer, steps=9)


def carried_state(board: HiddenBoard, base: LocalState | None, **fields: str | None) -> tuple[Tensors, int]:
    with DeviceStore(board.root) as store:
        relocation_ref = store.blobs.put(make_relocation(BEFORE, NOW))
    values = {"moved": relocation_ref, "moved_from": BEFORE.digest, "selection": NOW.digest, **fields}
    offer = board.offer(2, KEEPS, hidden_weights(), graph="kept", **values)
    with DeviceStore(board.root) as store:
        return carried_optimizer_state(
            base, "adam", offer, NOW.gather(ALL_CHANNELS), lambda ref: store.blobs.read(ref.sha256)
        )


def test_channels_that_have_moved_keep_their_state(board: HiddenBoard) -> None:
    state, steps = carried_state(board, state_before())
    expected = NOW.gather(ALL_CHANNELS)
    assert steps == 9
    assert set(state) == {
        f(n) for n in expected for f in (step_contract.momentum_name, step_contract.second_moment_name)
    }
    for name, axis in (("w1", 0), ("gamma", 0), ("w2", 1)):
        mean, square = (
            np.moveaxis(state[f(name)], axis, 0)
            for f in (step_contract.momentum_name, step_contract.second_moment_name)
        )
        old = np.moveaxis(expected[name], axis, 0)
        np.testing.assert_array_equal(mean[OLD_CHANNELS], old[OLD_CHANNELS])
        np.testing.assert_array_equal(square[OLD_CHANNELS], 2 * old[OLD_CHANNELS])
        assert not mean[1].any()
        # A new channel's mean square is that of the others, or its first steps would be several times too long.
        np.testing.assert_allclose(square[1], square[OLD_CHANNELS].mean(dtype=np.float64), rtol=1e-6)


def test_a_state_that_means_nothing_now_is_left_behind(board: HiddenBoard) -> None:
    assert carried_state(board, None) == ({}, 0)
    assert carried_state(board, state_before("adamw")) == ({}, 0)
    assert carried_state(board, state_before(), moved_from="d" * 64) == ({}, 0)
    assert carried_state(board, state_before(), moved=None, moved_from=None) == ({}, 0)
