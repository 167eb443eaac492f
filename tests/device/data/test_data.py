import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import DataError
from fedprune.planning.costs import MAX_SAMPLES_IN_MEMORY
from fedprune_device.data.array_source import load_data, load_inputs
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets, class_presence, class_weights, log_prior

pytestmark = pytest.mark.board

X = np.arange(40, dtype=np.float32).reshape(20, 2)
Y = np.arange(20) % 4


def save(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def test_the_split_keeps_every_sample_with_its_label(tmp_path: Path) -> None:
    data = load_data(save(tmp_path / "d.npz", x=X, y=Y), 0, "a")
    assert (len(data.y_train), len(data.y_test)) == (16, 4)
    rows = {tuple(r): int(v) for r, v in zip(X, Y, strict=True)}
    got = np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    assert {tuple(r): int(v) for r, v in zip(*got, strict=True)} == rows


def test_validation_samples_are_taken_from_those_that_would_be_trained_on(tmp_path: Path) -> None:
    source = save(tmp_path / "d.npz", x=X, y=Y)
    undivided, data, repeated, other_device = (
        load_data(source, 3, d, s) for d, s in (("a", 0), ("a", 0.25), ("a", 0.25), ("b", 0.25))
    )
    assert (data.samples, len(data.y_val), len(data.y_test)) == (12, 4, 4)
    assert np.array_equal(data.x_test, undivided.x_test)
    assert sorted(map(tuple, np.concatenate([data.x_train, data.x_val]))) == sorted(map(tuple, undivided.x_train))
    assert all(
        int(y) == int(Y[np.flatnonzero((x == X).all(1))[0]]) for x, y in zip(data.x_val, data.y_val, strict=True)
    )
    assert np.array_equal(data.x_val, repeated.x_val)
    assert not np.array_equal(data.x_val, other_device.x_val)


@pytest.mark.parametrize("arrays", [{"x": X}, {"x_train": X}, {"x": X, "y": Y[:3]}, {"x": X[:4], "x_test": X}])
def test_inputs_need_no_labels(tmp_path: Path, arrays: dict[str, object]) -> None:
    assert np.array_equal(load_inputs(save(tmp_path / "d.npz", **arrays), (2,))[0], X)


def test_a_function_of_the_user_is_called_with_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_samples.py").write_text(
        "import numpy as np\n"
        "def load(device):\n    return np.full((9, 2), len(device), 'float32'), np.zeros(9, int)\n"
        "def broken():\n    raise KeyError('camera')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_data("my_samples:load", device="abc").x_train[0, 0] == 3
    with pytest.raises(DataError, match="camera"):
        load_data("my_samples:broken")
    with pytest.raises(DataError, match="'my_samples'"):
        load_data("my_samples")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x_train": X, "y": Y}, "'y_train' is missing"),
        ({"x": X, "y": Y[:-1]}, "number of labels"),
        ({"x": X.astype(str), "y": Y}, "float32"),
        ({"x": X, "y": Y.astype(str)}, "whole numbers"),
        ({"x": X, "y": Y * np.nan}, "sample 0"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y * 1.0}, "type of test labels"),
        ({"x": X, "y": Y - 1}, "negative"),
        ({"x": X[:, 0], "y": Y}, r"\[n, ...\]"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
        ({"x": X, "y": Y, "x_test": X}, "both x_test and y_test"),
        ({"x": X, "y": Y, "x_test": X[:, :1], "y_test": Y}, "one test sample"),
        ({"x": np.array([{"a": 1}], dtype=object), "y": Y[:1]}, "plain arrays"),  # never unpickled
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, arrays: dict[str, object], text: str) -> None:
    source = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=text) as caught:
        load_data(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("bad", ["x", "y"])
def test_a_bad_sample_is_named_by_its_place_in_the_file(tmp_path: Path, bad: str) -> None:
    arrays = {name: np.ones((9, MAX_SAMPLES_IN_MEMORY // 4 // 8), np.float32) for name in "xy"}  # they stay on the disk
    arrays[bad][7, 1] = np.inf
    source = save(tmp_path / "d.npz", **arrays)
    for device in "abc":  # whichever split it falls into
        with pytest.raises(DataError, match="sample 7, which has an infinity"):
            load_data(source, device=device)


def test_files_of_other_kinds_are_called_by_their_kind(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "book.xlsx", "w") as book:
        book.writestr("xl/workbook.xml", "<?xml version='1.0'?>")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"x": [1]}))
    (tmp_path / "none.npz").touch()
    kinds = {"book.xlsx": "is a workbook: expected arrays", "x.pkl": "is a pickle", "none.npz": "it is empty"}
    for name, kind in kinds.items():
        with pytest.raises(DataError, match=kind) as caught:
            load_data(str(tmp_path / name))
        assert "magic" not in str(caught.value)


@pytest.mark.parametrize("arrays", [{}, {"x_test": X[:4]}, {"x_test": X[:4], "x_val": X[4:6]}])
def test_samples_without_labels_are_their_own(tmp_path: Path, arrays: dict[str, object]) -> None:
    data = load_data(save(tmp_path / "d.npz", x=X, **arrays), validation_share=0.25)
    assert data.is_unlabelled
    assert len(data.y_test) == 4
    for split in ("train", "test", "val"):
        x, y = (np.asarray(getattr(data, f"{n}_{split}")) for n in "xy")
        assert len(x)
        np.testing.assert_array_equal(x, y)
    data.check(Targets("mse", 2, (2,)), (2,))
    spooled = data.with_spooled_arrays(tmp_path)
    assert spooled.is_unlabelled
    assert spooled.memory_bytes <= sum(np.asarray(getattr(data, f"x_{p}")).nbytes for p in ("train", "test", "val"))
    integer_targets = Targets("custom", 2, (2,), whole_numbers=True)
    for targets in (
        Targets("cross_entropy", 2),
        Targets("cross_entropy", 2, (2,)),
        Targets("mse", 3, (3,)),
        integer_targets,
    ):
        with pytest.raises(DataError, match=r"\[n, 2\]"):
            data.check(targets, (2,))


def test_samples_for_another_model_are_refused_for_their_shape_before_their_labels() -> None:
    data = LocalData(X, np.full(len(X), 9), X[:0], Y[:0])
    with pytest.raises(DataError, match="label"):
        data.check(Targets("cross_entropy", 2), (2,))
    with pytest.raises(DataError, match="shape"):
        data.check(Targets("cross_entropy", 2), (3,))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_the_log_prior_is_that_of_the_smoothed_shares(labels: list[int]) -> None:
    prior = log_prior(np.array(labels), 5)
    for c in range(5):
        assert np.isclose(prior[c], np.log((labels.count(c) + 0.1) / (len(labels) + 0.5)), atol=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_class_weights_give_every_present_class_the_same_say(labels: list[int]) -> None:
    y = np.array(labels)
    says = np.bincount(y, weights=class_weights(y, 5)[y], minlength=5)
    present = class_presence(y, 5) > 0
    assert np.allclose(says[present], len(labels) / present.sum(), rtol=1e-5)
    assert not says[~present].any()


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_a_file_with_a_flipped_bit_is_called_damaged(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "d.npz"
    pack(path, x=np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32), y=np.zeros(500, np.int64))
    sound = path.read_bytes()
    for place in range(300, 3000, 300):
        body = bytearray(sound)
        body[place] ^= 16
        path.write_bytes(body)
        with pytest.raises(DataError, match="damaged"):
            load_data(str(path))
    path.write_bytes(sound[:3000])
    with pytest.raises(DataError, match="cut short"):
        load_data(str(path))
