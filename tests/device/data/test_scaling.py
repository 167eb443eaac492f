"""Scaled samples, against numpy's mean and deviation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, DataError, ExitCode
from fedprune.model.input_type import FLOATS
from fedprune.model.lengths import PADDING
from fedprune.model.recipe import Recipe
from fedprune_device.cli.main import main
from fedprune_device.data.array_assembly import name_arrays
from fedprune_device.data.array_source import load_data
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.data.scaling import ChannelScale, Scaling, scale_entries, scale_samples
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.table_windows import TableFile
from fedprune_device.serving.model_slots import ModelSlots
from support.fakes.hidden_board import HiddenBoard, hidden_weights
from support.fakes.local_board import LocalBoard

pytestmark = pytest.mark.board

MSE = Recipe(loss="mse")
BOARD = replace(MSE, scaling=("board",))
ROWS = np.random.default_rng(0).standard_normal((200, 3)) * [4, 90, 0.1] + [20, 1013, -7]


def table(path: Path, names: str = "Heat,hPa,target_load") -> TableFile:
    path.write_text(f"{names}\n" + "".join(",".join(f"{v:.6f}" for v in row) + "\n" for row in ROWS))
    return TableFile(path, SplitShares(0.3), 10**6)


def splits(data: LocalData) -> Any:
    return [np.asarray(getattr(data, f"{name}_{split}")) for split in ("train", "test") for name in "xy"]


@pytest.mark.parametrize("first", [True, False])
def test_a_board_scales_by_its_own_training_samples(tmp_path: Path, first: bool) -> None:
    def layout(*sizes: int) -> tuple[int, ...]:
        return sizes[::-1] if first else sizes

    targets = Targets("mse", 1, layout(2, 1))
    raw = table(tmp_path / "a.csv").snapshot(layout(5, 2), targets)
    data, scaling = scale_samples(raw, BOARD)
    rows = (0, 2) if first else (0, 1)  # without the axis of columns
    x, y = np.asarray(raw.x_train, float), np.asarray(raw.y_train, float)
    mean, deviation = x.mean(axis=rows, keepdims=True), x.std(axis=rows, keepdims=True)
    for scaled, measured in zip(splits(data)[::2], splits(raw)[::2], strict=True):
        np.testing.assert_allclose(scaled, (measured - mean) / deviation, rtol=1e-3, atol=1e-5)
    for scaled, measured in zip(splits(data)[1::2], splits(raw)[1::2], strict=True):
        np.testing.assert_allclose(scaled, (measured - y.mean()) / y.std(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(scaling.invert(scaled), measured, rtol=1e-5)
    data.check(targets, layout(5, 2), input_type=FLOATS)


def test_a_job_gives_the_scale_by_the_names_of_columns_in_any_order_and_case(tmp_path: Path) -> None:
    source, targets = table(tmp_path / "a.csv"), Targets("mse", 1, (1,))
    raw = source.snapshot((2, 5), targets)
    data, scaling = scale_samples(raw, replace(MSE, scaling=("TARGET_load:-7:0.5", "hpa:1000:10", "heat:20:2")))
    expected = (np.asarray(raw.x_train) - np.array([[20], [1000]])) / np.array([[2], [10]])
    np.testing.assert_allclose(np.asarray(data.x_train), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(data.y_train), (np.asarray(raw.y_train) + 7) / 0.5, rtol=1e-5, atol=1e-6)
    assert scale_samples(raw, replace(MSE, scaling=scale_entries(scaling, raw)))[1] == scaling
    with pytest.raises(DataError, match="number 2"):
        scale_samples(raw, replace(MSE, scaling=("heat:20:2",)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scaling", [("board",), ("target_load:-7:0.5", "hpa:1000:10", "heat:20:2")])
def test_arrays_of_a_table_are_scaled_as_the_table(tmp_path: Path, first: bool, scaling: tuple[str, ...]) -> None:
    shape, labels = ((2, 2), (1, 3)) if first else ((5, 2), (3, 1))
    raw = table(tmp_path / "a.csv").snapshot(shape, Targets("mse", 1, labels))
    parts = dict(zip(("x_train", "y_train", "x_test", "y_test"), splits(raw), strict=True))
    np.savez(tmp_path / "a.npz", **parts, **name_arrays(raw))
    read, recipe = load_data(str(tmp_path / "a.npz")), replace(MSE, scaling=scaling)
    for found, expected in zip(*(splits(scale_samples(data, recipe)[0]) for data in (read, raw)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert load_data(str(tmp_path / "a.npz"), validation_share=0.2, spool=tmp_path).channels == read.channels
    np.savez(tmp_path / "b.npz", **parts, columns=np.array(["heat", "hpa"]))
    with pytest.raises(DataError, match="columns"):
        load_data(str(tmp_path / "b.npz"))


def test_what_follows_a_window_is_scaled_as_the_window_and_classes_are_not(tmp_path: Path) -> None:
    raw = table(tmp_path / "a.csv", "a,b,c").snapshot((3, 5), Targets("l1", 3, (3,)))
    data, scaling = scale_samples(raw, replace(BOARD, loss="l1"))
    assert scaling.inputs is not None
    assert scaling.outputs is not None
    assert scaling.inputs.mean == scaling.outputs.mean
    np.testing.assert_allclose(scaling.invert(np.asarray(data.y_train)), np.asarray(raw.y_train), rtol=1e-5)
    path = tmp_path / "b.csv"
    path.write_text("a,class\n" + "".join(f"{n * 100},{n % 2}\n" for n in range(50)))
    raw = TableFile(path, SplitShares(0), 99).snapshot((1, 4), Targets("cross_entropy", 2))
    data, scaling = scale_samples(raw, Recipe(scaling=("board",)))
    assert scaling.outputs is None
    np.testing.assert_array_equal(data.y_train, raw.y_train)
    assert abs(np.asarray(data.x_train).mean()) < 1e-5


@pytest.mark.parametrize("scaling", [("board",), ("left:5:2", "right:1:4")])
def test_arrays_are_scaled_by_channel_and_padding_stays(scaling: tuple[str, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((50, 2, 9)).astype("f4") * np.float32(3) + np.float32(5)
    padded = x.copy()
    padded[:, :, 6:] = PADDING
    for raw, end in ((x, 9), (padded, 6)):
        data, _ = scale_samples(LocalData(raw, np.arange(50) % 2, raw[:0], np.arange(0)), Recipe(scaling=scaling))
        known = raw[:, :, :end].astype(float)
        mean, deviation = known.mean((0, 2)), known.std((0, 2))
        if len(scaling) > 1:
            mean, deviation = np.array([5, 1]), np.array([2, 4])
        expected = (known - mean[:, None]) / deviation[:, None]
        np.testing.assert_allclose(data.x_train[:, :, :end], expected, rtol=1e-4, atol=1e-5)
        assert (data.x_train[:, :, end:] == np.float32(PADDING)).all()


def test_an_autoencoder_gets_its_scaled_inputs_and_a_constant_stays_finite() -> None:
    x = np.repeat(np.array([[7, 1], [7, 3]], "f4"), 5, axis=0)
    data, scaling = scale_samples(LocalData(x, x, x[:0], x[:0]), BOARD)
    assert data.is_unlabelled
    np.testing.assert_allclose(data.x_train[::5], [[0, -1], [0, 1]])
    np.testing.assert_allclose(scaling.invert(data.x_train), x)


def test_what_cannot_be_scaled_is_refused() -> None:
    tokens = LocalData(np.ones((3, 4), np.int64), np.zeros(3, int), np.ones((0, 4), np.int64), np.zeros(0, int))
    with pytest.raises(DataError, match="token ids"):
        scale_samples(tokens, BOARD)
    x = np.ones((3, 4), "f4")
    with pytest.raises(DataError, match="3 channels"):
        scale_samples(
            LocalData(x, np.zeros(3, int), x[:0], np.zeros(0, int)), Recipe(scaling=("a:0:1", "b:0:1", "c:0:1"))
        )
    for bad in (["heat"], ["heat:1:0"], ["heat:nan:1"], [":1:1"], ["board", "a:0:1"], ["a:0:1", "A:1:1"], "board"):
        with pytest.raises(ConfigError, match="scaling"):
            Recipe(scaling=bad)  # type: ignore[arg-type]
    assert Recipe.from_dict(Recipe(scaling=("a:b:0:1",)).to_dict()).scaling == ("a:b:0:1",)


def test_a_board_keeps_its_scale_and_serves_with_it(board: HiddenBoard) -> None:
    x = board.data.x_train * np.float32(50) + np.float32(300)
    board.data = LocalData(x, board.data.y_train, x[:0], board.data.y_train[:0])
    recipe = Recipe(epochs=1, batch_size=16, average=0.85, scaling=("board",))

    def round_of(number: int, **changes: Any) -> Scaling:
        board.carry_out(board.offer(number, recipe, hidden_weights(), graph="kept", **changes))
        record = ModelSlots(board.root / "serving").current()
        assert record is not None
        return record.scaling

    scaling = round_of(1)
    assert scaling.inputs is not None
    np.testing.assert_allclose(scaling.inputs.mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(scaling.inputs.deviation, x.std(0), rtol=1e-4)
    board.data = LocalData(x + 1, board.data.y_train, x[:0], board.data.y_train[:0])
    assert round_of(2) == scaling
    assert round_of(3, job="another") != scaling


def test_predictions_of_a_board_are_in_the_numbers_of_its_samples(local: LocalBoard) -> None:
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("f4") * 9 + 100
    scaling = Scaling(ChannelScale((100.0,) * 6, (9.0,) * 6), ChannelScale((5.0, 6.0, 7.0), (2.0, 3.0, 4.0)))
    w = local.install(1, loss="mse", scaling=scaling)
    np.save(local.root / "x.npy", x)
    command = ["predict", "--state", str(local.root / "state"), "--input", str(local.root / "x.npy")]
    assert main([*command, "--output", str(local.root / "y.npy")]) == ExitCode.OK
    with local.serving():
        values = [row["values"] for row in local.board.predict(x).predictions]
    expected = ((x - 100) / 9 @ w["w"].T + w["b"]) * [2, 3, 4] + [5, 6, 7]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.load(local.root / "y.npy"), expected, rtol=1e-4, atol=1e-4)
