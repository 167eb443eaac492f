"""What a board keeps of its own: its moving average, its personal tensors, statistics of its own samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import StorageError
from fedprune.model.architecture import Axis, Segment
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.storage.state_store import FolderStateStore
from fedprune_device.training.carried_state import updated_average
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from support.fakes.agent_harness import same
from support.fakes.hidden_board import (
    CLASSES,
    DEVICE,
    HIDDEN,
    SEED,
    HiddenBoard,
    hidden_weights,
    logits,
    measured_statistics,
)
from support.faults.failing_disk import Crash, fault

pytestmark = pytest.mark.board

DECAY = 0.85
PLAIN = Recipe(epochs=1, batch_size=16)
AVERAGE = Recipe(epochs=1, batch_size=16, average=DECAY)


def train_plainly(board: HiddenBoard, number: int, weights: Tensors) -> Tensors:
    """What plain training makes of them in a round."""
    result = Trainer(board.graphs / "kept.onnx").train(
        weights, board.data, TrainingTask(PLAIN, seed=SEED, device=DEVICE, round=number, classes=CLASSES)
    )
    return {n: v.copy() for n, v in result.tensors.items()}


def mean(old: Tensors, new: Tensors) -> Tensors:
    return {n: np.float32(DECAY) * old[n] + np.float32(1 - DECAY) * new[n] for n in new}


# -- the moving average -----------------------------------------------------------------------------------------------


def test_the_average_of_all_rounds_serves_and_the_update_is_what_was_trained(board: HiddenBoard) -> None:
    expected: Tensors = {}
    for number in (1, 2, 4):
        weights = hidden_weights(seed=number)
        update, sent, serves = board.carry_out(board.offer(number, AVERAGE, weights, graph="kept"))
        new = train_plainly(board, number, weights)
        expected = mean(expected, new) if expected else new
        assert same(sent, new)
        assert same(serves, expected)
        x, y = board.data.x_test, board.data.y_test
        assert update.metrics["accuracy_average"] == np.mean(logits(serves, x).argmax(1) == y)
        assert update.metrics["accuracy_after"] == np.mean(logits(new, x).argmax(1) == y)
        assert update.metrics["accuracy_before"] == np.mean(logits(weights, x).argmax(1) == y)


@pytest.mark.parametrize("blend", [0.25, 1.0])
@pytest.mark.parametrize("calibrate", [False, True])
def test_received_weights_are_blended_into_what_serves_and_into_nothing_else(
    board: HiddenBoard, tmp_path: Path, blend: float, calibrate: bool
) -> None:
    recipe = replace(AVERAGE, blend=blend, calibrate=calibrate)
    without = HiddenBoard(tmp_path / "without", board.graphs, board.data)
    average: Tensors = {}
    for number in (1, 2):
        weights = hidden_weights(seed=number)
        update, sent, serves = board.carry_out(board.offer(number, recipe, weights, graph="kept"))
        plain, unblended, _ = without.carry_out(without.offer(number, replace(recipe, blend=0), weights, graph="kept"))
        record, record_without = board.newest_state(), without.newest_state()
        new = train_plainly(board, number, weights)
        average = mean(average, new) if average else new
        expected = {n: np.float32(1 - blend) * average[n] + np.float32(blend) * v for n, v in weights.items()}
        if calibrate:
            expected |= measured_statistics(expected, board.data.x_train, 16)
        assert same(sent, unblended)
        assert record.to_bytes() == record_without.to_bytes()
        assert same(record.average, average)
        for name, value in serves.items():
            np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-6)
        assert all(update.metrics[n] == plain.metrics[n] for n in ("loss_before", "loss_after"))
        assert update.metrics["loss_average"] != plain.metrics["loss_average"]


@pytest.mark.parametrize(
    "changes", [{"job": "another"}, {"seed": 8}, {"architecture": "e" * 64}, {"selection": "e" * 64}]
)
def test_the_average_of_something_else_is_none(board: HiddenBoard, changes: dict[str, Any]) -> None:
    board.carry_out(board.offer(1, AVERAGE, hidden_weights(seed=1), graph="kept"))
    _, sent, serves = board.carry_out(
        board.offer(2, AVERAGE, hidden_weights(seed=2), graph="kept", ranking=None, **changes)
    )
    assert same(serves, sent)


@pytest.mark.parametrize(("first", "second"), [(HIDDEN, HIDDEN // 2), (HIDDEN // 2, HIDDEN)])
def test_at_another_width_what_both_have_is_carried_over(board: HiddenBoard, first: int, second: int) -> None:
    old = board.carry_out(board.offer(1, AVERAGE, hidden_weights(first, 1), graph="kept"))[2]
    _, sent, serves = board.carry_out(board.offer(2, AVERAGE, hidden_weights(second, 2), graph="kept"))
    both, regions = HIDDEN // 2, {"w2": (slice(None), slice(None, HIDDEN // 2)), "b2": (slice(None),)}
    for name, value in serves.items():
        region = regions.get(name, (slice(None, both),))
        expected = sent[name].copy()
        expected[region] = np.float32(DECAY) * old[name][region] + np.float32(1 - DECAY) * sent[name][region]
        np.testing.assert_array_equal(value, expected)


def test_where_only_ranks_would_tell_which_channels_are_the_same_the_average_begins_anew() -> None:
    ref = {"sha256": "a" * 64, "size": 1, "leaves": "a" * 64}
    offer = Offer("j", 2, 0, 1, "a" * 64, "b" * 64, (2,), 3, ref, ref, ref, {}, None, "c" * 64)  # type: ignore[arg-type]
    base = LocalState("j", 1, "a" * 64, "e" * 64, "c" * 64, (4,), 1, average={"w": np.float32([4, 4, 4, 4])})
    new = {"w": np.float32([8, 8])}
    for ranges, expected in ((((0, 4),), [6, 6]), (((0, 2), (2, 2)), [8, 8])):
        axes = TensorAxes((4,), {"w": (Axis(tuple(Segment(0, *channel_range, 1) for channel_range in ranges)),)})
        np.testing.assert_array_equal(updated_average(base, offer, new, 0.5, axes=axes)["w"], expected)


def test_elements_that_were_masked_begin_anew_and_those_that_are_stay_zero() -> None:
    ref = {"sha256": "a" * 64, "size": 1, "leaves": "a" * 64}
    offer = Offer("j", 2, 0, 1, "a" * 64, "b" * 64, (3,), 3, ref, ref, ref, {})  # type: ignore[arg-type]
    before, now = ({"w": np.array(bits, np.bool_)} for bits in ([1, 1, 0, 0], [1, 0, 1, 0]))
    base = LocalState("j", 1, "a" * 64, "b" * 64, None, (3,), 1, {"w": np.float32([4, 4, 0, 0])}, {}, before)
    got = updated_average(base, offer, {"w": np.float32([8, 0, 8, 0])}, 0.75, mask=now)["w"]
    np.testing.assert_array_equal(got, [5, 0, 8, 0])


# -- where it is kept -------------------------------------------------------------------------------------------------


def record(number: int, fill: float = 1.0) -> LocalState:
    mask = {"w": np.arange(6).reshape(2, 3) % 2 == 0}
    tensors = {"w": np.full((2, 3), fill, np.float32)}
    return LocalState("job", 7, "a" * 64, "b" * 64, "c" * 64, (3,), number, tensors, {"head": np.float32([fill])}, mask)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_damage_is_noticed_or_changes_nothing(at: int, junk: bytes) -> None:
    """A header's padding and the order of its keys mean nothing."""
    state = record(3)
    raw = bytearray(state.to_bytes())
    at %= len(raw)
    raw[at : at + len(junk)] = junk
    try:
        read = LocalState.from_bytes(bytes(raw))
    except StorageError as error:
        assert "damaged" in error.what  # noqa: PT017 - either this or nothing
        return
    assert read.to_bytes() == state.to_bytes()


def test_it_is_forgotten_when_an_offer_of_another_run_of_the_job_is_taken(board: HiddenBoard) -> None:
    """The board was away when its run ended; until then it counts as room that can be had."""
    first = board.offer(1, AVERAGE, hidden_weights(seed=1), graph="kept")
    with DeviceStore(board.root) as store:
        store.accept(first)
    board.carry_out(first)
    same_run, other_run = (
        board.offer(2, AVERAGE, hidden_weights(seed=1), graph="kept", **c) for c in ({}, {"seed": 99})
    )
    with DeviceStore(board.root) as store:
        assert store.reclaimable_bytes(other_run) > store.reclaimable_bytes(same_run)
        store.accept(same_run)
        assert store.local_states.read()
    with DeviceStore(board.root) as store:
        store.accept(other_run)
        assert not store.local_states.read()


def test_a_death_at_any_write_of_turning_to_another_job_loses_nothing(tmp_path: Path) -> None:
    def begin_job(name: str) -> Path:
        states = FolderStateStore(tmp_path / name)
        states.prepare()
        states.switch_to_job("one")
        for record, beside in ((b"first", None), (b"second", "a")):
            states.stage(record)
            states.commit(beside)
        return tmp_path / name

    def turn(root: Path) -> None:
        states = FolderStateStore(root)
        states.switch_to_job("two", "one")
        states.stage(b"third")
        states.commit(None)
        states.switch_to_job("one")

    root = begin_job("dry")
    with fault(0, None) as writes:
        turn(root)
    states = FolderStateStore(root)
    states.switch_to_job("two")
    assert states.read() == {"a": b"third"}
    for at in range(1, writes[0] + 1):
        root = begin_job(str(at))
        with fault(at, Crash()), pytest.raises(Crash):
            turn(root)
        states = FolderStateStore(root)
        states.switch_to_job("one")
        assert states.read() == {"a": b"first", "b": b"second"}


@pytest.mark.parametrize("first", [False, True])
def test_a_death_at_any_write_of_a_round_changes_none_of_its_bits(
    tmp_path: Path, graphs: Path, data: LocalData, first: bool
) -> None:
    recipe = Recipe(epochs=1, batch_size=16, average=DECAY, blend=0.3, personal=("w2", "b2"), calibrate=True)

    def begin(name: str) -> tuple[HiddenBoard, Offer]:
        board = HiddenBoard(tmp_path / name, graphs, data)
        if not first:
            board.carry_out(board.offer(1, recipe, hidden_weights(seed=1), graph="kept"))
        return board, board.offer(2, recipe, hidden_weights(seed=2), graph="kept")

    board, offer = begin("whole")
    with fault(0, None) as writes:
        update, sent, serves = board.carry_out(offer)
    assert writes[0] > 15
    for at in range(2, writes[0] + 1, 2):
        board, offer = begin(str(at))
        with fault(at, Crash()), pytest.raises(Crash):
            board.carry_out(offer)
        repeated = board.carry_out(offer)
        assert same(repeated[1], sent)
        assert same(repeated[2], serves)
        assert repeated[0].metrics["accuracy_average"] == update.metrics["accuracy_average"]


# -- personal tensors -------------------------------------------------------------------------------------------------


def test_personal_tensors_stay_and_the_rest_is_the_servers(board: HiddenBoard) -> None:
    recipe = Recipe(epochs=1, batch_size=16, personal=("w2", "b2", "mean", "var"))
    personal: Tensors = {}
    for number in (1, 2):
        weights = hidden_weights(seed=number)
        began = weights | personal
        update, sent, serves = board.carry_out(board.offer(number, recipe, weights, graph="kept"))
        new = train_plainly(board, number, began)
        assert list(sent) == ["w1", "gamma", "beta"]
        assert same(sent, {n: new[n] for n in sent})
        assert same(serves, new)
        personal = {n: new[n] for n in ("w2", "b2", "mean", "var")}
        x, y = board.data.x_test, board.data.y_test
        assert update.metrics["accuracy_before"] == np.mean(logits(began, x).argmax(1) == y)


def test_a_board_that_shares_nothing_sends_an_empty_file(board: HiddenBoard) -> None:
    recipe = Recipe(epochs=1, batch_size=16, personal=("*",))
    update, sent, first = board.carry_out(board.offer(1, recipe, hidden_weights(seed=1), graph="kept"))
    _, _, second = board.carry_out(board.offer(2, recipe, hidden_weights(seed=2), graph="kept"))
    assert sent == {}
    assert update.weights.size == 64
    assert same(second, train_plainly(board, 2, first))


# -- statistics of the board's own samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("average", [0.0, DECAY])
def test_what_is_evaluated_served_and_sent_is_calibrated(board: HiddenBoard, average: float) -> None:
    recipe = Recipe(epochs=1, batch_size=16, average=average, calibrate=True)
    weights, expected = hidden_weights(seed=1), Tensors()
    for number in (1, 2):
        update, sent, serves = board.carry_out(board.offer(number, recipe, weights, graph="kept"))
        new = train_plainly(board, number, weights)
        expected = mean(expected, new) if expected and average else new
        for got, source in ((serves, expected), (sent, new)):
            statistics = measured_statistics(source, board.data.x_train, 16)
            for name, value in got.items():
                np.testing.assert_allclose(value, statistics.get(name, source[name]), rtol=2e-6, atol=2e-6)
                assert name in statistics or np.array_equal(value, source[name])
        x, y = board.data.x_test, board.data.y_test
        for when, tensors in (("before", weights), ("after", new), ("average", expected)):
            if when == "average" and not average:
                continue
            fresh = {n: v.astype(np.float32) for n, v in measured_statistics(tensors, board.data.x_train, 16).items()}
            assert update.metrics[f"accuracy_{when}"] == np.mean(logits(tensors | fresh, x).argmax(1) == y)


def test_a_damaged_record_costs_the_average_alone(board: HiddenBoard) -> None:
    board.carry_out(board.offer(1, AVERAGE, hidden_weights(seed=1), graph="kept"))
    (board.root / "own" / "a").write_bytes(b"junk")
    _, sent, serves = board.carry_out(board.offer(2, AVERAGE, hidden_weights(seed=2), graph="kept"))
    assert same(serves, sent)
