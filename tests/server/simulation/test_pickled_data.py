"""Pickles of data sets, CIFAR's among them: read as pickle reads them, and nothing else is."""

import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import DataError
from fedprune_server.simulation.datasets import plain_pickle
from fedprune_server.simulation.datasets.cifar import read_cifar
from fedprune_server.simulation.datasets.plain_pickle import read_plain
from fedprune_server.simulation.datasets.samples import Preparation
from support.fakes.data_set_files import batch, most_memory, python2_pickle, write_cifar10
from support.nets import drawn_models as strategies  # noqa: F401 - its settings of Hypothesis

# --- pickles


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, np.ndarray):
            assert ours[key].dtype == value.dtype
            assert np.array_equal(ours[key], value)
        else:
            assert ours[key] == value


def test_a_pickle_of_python_2_is_read_as_pickle_reads_it():
    raw = python2_pickle(batch(130))
    assert sum(1 for _ in pickletools.genops(raw)) > 300  # well-formed
    same(read_plain(raw), pickle.loads(raw, encoding="bytes"))  # noqa: S301 - the oracle, on our own bytes


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", ["u1", "i8", "f4", ">i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_pickle_of_python_3_is_read_as_pickle_reads_it(protocol, kind, order):
    value = {
        "data": np.asarray(np.arange(12).reshape(3, 4), kind, order=order),
        "labels": [0, 255, 256, 65536, -1, 2**40],
        b"key": b"\x00\xff" * 200,
        "names": ["ä", "b"],
        "none": None,
        "flags": (True, False),
        "long": "x" * 300,
    }
    same(read_plain(pickle.dumps(value, protocol)), value)


class Calls:
    def __init__(self, what, *given):
        self.what, self.given = what, given

    def __reduce__(self):
        return self.what, self.given


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        Calls(print, "never"),
        {"data": Calls(Path, "never")},
        {"data": Calls(np.dtype, "O")},
        {"data": Calls(np.load, "never.npy")},
        {"data": 1.5},
        {"data": [[1]]},
        {"data": {"data": 1}},
        {"data": {1, 2}},
        {1: 2},
        np.array([{}, []], object),
        {"data": np.zeros(2, [("a", "u1")])},
        {"data": np.array(["text"])},
    ],
)
def test_a_pickle_of_anything_else_is_refused(protocol, value, capsys):
    with pytest.raises(DataError):
        read_plain(pickle.dumps(value, protocol))
    assert capsys.readouterr().out == ""


@given(st.data())
def test_a_damaged_pickle_is_read_or_refused(data):
    raw = bytearray(python2_pickle(batch(2)))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, min(250, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    try:
        read = read_plain(bytes(raw))
    except DataError:
        return
    values = read.values() if isinstance(read, dict) else [read]
    assert all(isinstance(v, (int, str, bytes, list, tuple, np.ndarray, type(None))) for v in values)


@given(st.lists(st.sampled_from([bytes([i]) for i in range(256)]), max_size=40))
def test_random_opcodes_do_no_harm(codes):
    try:
        read = read_plain(b"\x80\x02" + b"".join(codes) + b".")
    except DataError:
        return
    values = read.values() if isinstance(read, dict) else [read]
    assert all(isinstance(v, (int, str, bytes, list, tuple, np.ndarray, type(None))) for v in values)


def test_a_text_is_not_encoded_again_and_again():
    text = b"a" * 2**16
    again = b"h\x01h\x00h\x02\x86R" * 1000
    raw = b"\x80\x02X" + struct.pack("<I", len(text)) + text + b"q\x00c_codecs\nencode\nq\x01X\x06\0\0\0latin1q\x02"

    def read():
        with pytest.raises(DataError, match="no more than the file is long"):
            read_plain(raw + again + b".")

    assert most_memory(read) < 10 * len(text)


def test_a_list_is_looked_through_once_however_many_keys_have_it(monkeypatch):
    looked = []
    entry = plain_pickle._entry
    monkeypatch.setattr(plain_pickle, "_entry", lambda value: looked.append(1) or entry(value))
    keys = b"".join(b"U\x04%04dh\x00" % i for i in range(1000))
    found = read_plain(b"\x80\x02}(U\x01a](" + b"N" * 1000 + b"eq\x00" + keys + b"u.")
    assert len(found) == 1001
    assert found[b"0999"] == [None] * 1000
    assert len(looked) == 1


# --- CIFAR


@pytest.mark.parametrize("python", [True, False])
def test_cifar10(tmp_path, python):
    whole = write_cifar10(tmp_path, python=python)
    read = read_cifar(tmp_path)
    pixels = np.concatenate([b[b"data"] for b in whole]).reshape(-1, 3, 32, 32)
    assert np.array_equal(read.take(np.arange(42)), pixels)
    assert read.labels.tolist() == [v for b in whole for v in b[b"labels"]]
    assert np.flatnonzero(read.testing).tolist() == list(range(35, 42))
    assert read.class_names[1] == ("automobile" if python else "1")
    assert np.array_equal(Preparation()(read.take([3])), pixels[3:4].astype(np.float32) / np.float32(255))


def test_cifar100_takes_fine_labels(tmp_path):
    for name, seed in (("train", 0), ("test", 1)):
        content = batch(5, b"fine_labels", seed=seed)
        (tmp_path / name).write_bytes(python2_pickle({**content, b"coarse_labels": [0] * 5}))
        rows = [np.full((5, 1), 9, np.uint8), np.array(content[b"fine_labels"], np.uint8)[:, None], content[b"data"]]
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / f"{name}.bin").write_bytes(np.concatenate(rows, 1).tobytes())
    python, binary = read_cifar(tmp_path), read_cifar(tmp_path / "bin")
    assert python.labels.tolist() == binary.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert np.array_equal(python.take(range(10)), binary.take(range(10)))


def test_a_damaged_cifar_file_is_named(tmp_path):
    write_cifar10(tmp_path, python=True)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(Calls(print, "never"), 2))
    with pytest.raises(DataError, match=r"data_batch_3.*names a function.*binary version"):
        read_cifar(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        read_cifar(tmp_path)


def test_a_class_is_not_called_by_a_book(tmp_path):
    write_cifar10(tmp_path, python=True)
    (tmp_path / "batches.meta").write_bytes(python2_pickle({b"label_names": [b"x" * 300] * 10}))
    with pytest.raises(DataError, match="label_names"):
        read_cifar(tmp_path)
