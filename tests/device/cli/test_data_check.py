"""`fedprune-device data check`: what a training would read, and what it can't learn from."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.model.lengths import PADDING
from fedprune.model.recipe import Recipe
from fedprune.runtime.bundle import FILES, MANIFEST, manifest_text, open_bundle
from fedprune_device.cli import main
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.labels import Targets
from fedprune_device.data.sample_drawings import draw_samples
from fedprune_device.data.summary import channel_ranges, find_notes, find_problems, summarise

pytestmark = pytest.mark.board

Capture = pytest.CaptureFixture[str]
RNG = np.random.default_rng(0)
CLASSES = Targets("cross_entropy", 3)


def check(bundle: Path, source: Path, *options: str) -> int:
    return main.main(["data", "check", "--bundle", str(bundle), "--data", str(source), *options])


def save(path: Path, data: LocalData, scale: float = 1.0) -> Path:
    np.savez(path, x_train=data.x_train * scale, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    return path


def test_samples_that_fit_are_counted_by_class_and_measured(
    tmp_path: Path, bundle: Path, data: LocalData, capsys: Capture
) -> None:
    source = save(tmp_path / "a.npz", data)
    assert check(bundle, source, "--json", "--out", str(tmp_path / "a.html")) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["samples"], body["problems"]) == ({"train": 70, "test": 20, "val": 0}, [])
    counts = np.bincount(data.y_train, minlength=3)
    assert [body["classes"][name]["train"] for name in ("ant", "bee", "cat")] == counts.tolist()
    x = np.asarray(data.x_train, np.float64)
    for channel, column in zip(body["channels"], x.T, strict=True):
        assert channel["lowest"] == column.min()
        assert channel["highest"] == column.max()
        assert channel["mean"] == pytest.approx(column.mean(), abs=1e-9)
        assert channel["deviation"] == pytest.approx(column.std(), rel=1e-9)
    page = (tmp_path / "a.html").read_text()
    assert page.count("<figure") == 3
    assert "ant" in page
    assert check(bundle, source) == ExitCode.OK
    assert "70 training samples" in capsys.readouterr().out


def test_the_samples_are_written_as_arrays(tmp_path: Path, bundle: Path, data: LocalData) -> None:
    names = np.array(["ant", "bee", "cat"])
    labels = {"y_train": names[data.y_train], "y_test": names[data.y_test]}
    np.savez(tmp_path / "a.npz", x_train=data.x_train, x_test=data.x_test, **labels)
    assert check(bundle, tmp_path / "a.npz", "--out", str(tmp_path / "b.npz")) == ExitCode.OK
    written = np.load(tmp_path / "b.npz")
    expected = {"x": data.x_train, "y": data.y_train, "x_test": data.x_test, "y_test": data.y_test}
    assert set(written) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)


def test_numbers_that_nobody_scaled_are_a_finding(
    tmp_path: Path, bundle: Path, data: LocalData, capsys: Capture
) -> None:
    assert check(bundle, save(tmp_path / "a.npz", data, 1000.0)) == ExitCode.FINDINGS
    assert "problem: channel 0" in capsys.readouterr().out


def test_samples_that_a_training_refuses_end_with_its_error(tmp_path: Path, bundle: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((9, 5), np.float32), y=np.zeros(9, int))
    assert check(bundle, tmp_path / "a.npz") == ExitCode.DATA
    np.savez(tmp_path / "b.npz", x=np.zeros((9, 6), np.float32), y=np.full(9, 3))
    assert check(bundle, tmp_path / "b.npz") == ExitCode.DATA
    assert "0 to 2" in capsys.readouterr().err


def problems_of(x: Any, y: Any, targets: Targets = CLASSES) -> list[str]:
    x = np.asarray(x, np.float32)
    return find_problems(summarise(LocalData(x, y, x[:0], y[:0]), targets, ()))


def test_each_kind_of_problem_is_found() -> None:
    y = np.arange(30) % 3
    images = RNG.integers(0, 256, (30, 3, 4, 4))
    assert problems_of(images / 255, y) == []
    (problem,) = problems_of(images, y)
    assert "255" in problem
    images[:, 1] = 7
    (problem,) = problems_of(images / 255, y)
    assert problem.startswith("channel 1 ")
    (problem,) = problems_of(RNG.random((30, 3, 4, 4)), np.ones(30, int))
    assert "one class" in problem


def test_absent_classes_are_a_note_because_boards_differ() -> None:
    x, y = RNG.random((30, 4)).astype(np.float32), np.arange(30) % 2
    summary = summarise(LocalData(x, y, x[:3], y[:3]), CLASSES, ("ant", "bee", "cat"))
    assert find_problems(summary) == []
    (note,) = find_notes(summary)
    assert "cat" in note
    assert "ant" not in note


def test_padding_is_no_number() -> None:
    x = RNG.random((4, 2, 9)).astype(np.float32)
    x[:, :, 5:] = PADDING
    low, high = x[:, :, :5].min((0, 2)), x[:, :, :5].max((0, 2))
    assert [(c.lowest, c.highest) for c in channel_ranges(x)] == list(zip(low, high, strict=True))


def test_deviations_of_large_numbers_are_exact() -> None:
    (channel,) = channel_ranges((1e6 + np.arange(1000) % 2)[:, None].astype(np.float32))
    assert (channel.mean, channel.deviation) == (pytest.approx(1e6 + 0.5), pytest.approx(0.5))


def test_boxes_are_counted_and_drawn() -> None:
    pytest.importorskip("PIL")
    targets = Targets("mse", 2, (2, 5))
    x = RNG.random((4, 3, 8, 16)).astype(np.float32)
    y = np.tile(np.array([[1, 0.5, 0.5, 0.25, 0.5], [-1, 0, 0, 0, 0]], np.float32), (4, 1, 1))
    data = LocalData(x, y, x[:0], y[:0])
    assert summarise(data, targets, ("ant", "bee")).classes == {"ant": {"train": 0}, "bee": {"train": 4}}
    drawings = draw_samples(data, targets, ("ant", "bee"), Pixels())
    assert len(drawings) == 3
    assert all(">bee</text>" in drawing for drawing in drawings)
    assert all('<rect x="6.00" y="2.00" width="4.00" height="4.00"' in drawing for drawing in drawings)


def test_a_peak_of_a_long_signal_is_drawn() -> None:
    x = np.zeros((1, 1, 16000), np.float32)
    x[0, 0, 777] = 42
    (drawing,) = draw_samples(LocalData(x, np.zeros(1, int), x[:0], np.zeros(0, int)), CLASSES, (), Pixels())
    assert "42" in drawing


def test_columns_are_called_by_their_names_where_nothing_leaves_the_board(
    tmp_path: Path, bundle: Path, capsys: Capture
) -> None:
    files = {name: (bundle / name).read_bytes() for name in FILES}
    selection, names = open_bundle(bundle).selection, ("ant", "bee", "cat")
    recipe = Recipe(scaling=("board",))
    (bundle / MANIFEST).write_text(manifest_text(files, selection, recipe, "raspberry-pi-5", names))
    rows = [f"{300 + n},{RNG.random():.3f},{n % 3}" for n in range(200)]
    source = tmp_path / "a.csv"
    source.write_text("\n".join(["entry_id,Heat,class", *rows]))
    assert check(bundle, source) == ExitCode.DATA  # the model takes one column, or six
    error = capsys.readouterr().err
    assert all(text in error for text in ("2 columns", "--columns", "entry_id, heat"))
    assert check(bundle, source, "--columns", "wind") == ExitCode.DATA
    assert "entry_id, Heat, class" in capsys.readouterr().err
    page = tmp_path / "a.html"
    assert check(bundle, source, "--columns", "entry_id", "--out", str(page)) == ExitCode.FINDINGS
    (problem,) = re.findall("problem: .*", capsys.readouterr().out)
    assert "column 1 counts" in problem  # and nothing of the range of a column that the recipe scales
    assert "entry_id" in page.read_text()
    assert "channel 0" not in page.read_text()
    assert check(bundle, source, "--columns", "heat", "--out", str(tmp_path / "b.npz")) == ExitCode.OK
    assert np.load(tmp_path / "b.npz")["columns"].tolist() == ["heat"]
