"""The demo's data: complete, true to its source, dealt out without overlap."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedprune_export as fx
from fedprune_device.data.array_source import load_data
from fedprune_server.simulation.digits import deal_digits, digits_model, load_digits, write_device_data
from support.paths import ROOT

NAMES = [f"board-{i}" for i in range(6)]


def rows(x):
    return [r.tobytes() for r in np.asarray(x)]


def test_digits_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = load_digits()
    theirs = sklearn.load_digits()
    np.testing.assert_array_equal(x[:, 0] * 16, theirs.images)
    np.testing.assert_array_equal(y, theirs.target)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 8), alpha=st.floats(0.3, 10))
def test_every_image_goes_to_exactly_one_place(seed, devices, alpha):
    names = NAMES[:devices] + [f"more-{i}" for i in range(devices - 6)]
    out = deal_digits(names, seed=seed, alpha=alpha, min_samples=8)
    image_groups = [out.x, out.calibration, *(x for d in out.devices.values() for x in (d.x_train, d.x_test))]
    assert sorted(rows(np.concatenate(image_groups))) == sorted(rows(load_digits()[0]))


def test_labels_stay_with_their_images():
    x, y = load_digits()
    labels_of = {r: set() for r in rows(x)}
    for r, label in zip(rows(x), y, strict=True):
        labels_of[r].add(int(label))
    for data in deal_digits(NAMES, seed=5).devices.values():
        assert all(int(label) in labels_of[r] for r, label in zip(rows(data.x_train), data.y_train, strict=True))


def test_same_seed_gives_the_same_hands_and_another_seed_others():
    first, same_seed, other_seed = (deal_digits(NAMES, seed=s).devices["board-3"] for s in (1, 1, 2))
    np.testing.assert_array_equal(first.x_train, same_seed.x_train)
    assert not np.array_equal(first.y_train, other_seed.y_train)


def test_written_hand_is_read_back_by_a_device(tmp_path):
    hand = deal_digits(NAMES).devices["board-0"]
    write_device_data(tmp_path / "own.npz", hand)
    back = load_data(str(tmp_path / "own.npz"))
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(back, name), getattr(hand, name))


def test_shipped_model_is_what_the_example_writes(tmp_path):
    script = ROOT / "examples" / "make_digits_model.py"
    subprocess.run([sys.executable, script, tmp_path / "net.onnx"], check=True, timeout=60)
    assert (tmp_path / "net.onnx").read_bytes() == digits_model()
    subprocess.run([sys.executable, script, tmp_path / "large.onnx", "--shape", "3,28,28"], check=True, timeout=60)
    assert fx.load(tmp_path / "large.onnx").architecture.input_shape == (3, 28, 28)
