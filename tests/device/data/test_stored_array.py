"""Samples that stay on the disk: the same batches as from memory, and hardly any memory."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedprune.core.errors import DataError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.planning.costs import MAX_SAMPLES_IN_MEMORY
from fedprune_device.data.array_source import load_data
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.data.stored_array import StoredArray
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from support.paths import GRAPHS

pytestmark = pytest.mark.board

MANY = MAX_SAMPLES_IN_MEMORY // 4 // 8  # numbers of one sample, of which nine are more than is held in memory


def test_a_file_that_is_replaced_while_it_is_opened_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one file's offset and checksum would be taken for another's."""
    path, replacement = tmp_path / "d.npz", tmp_path / "other.npz"
    np.savez(path, x=np.ones((9, MANY), np.float32), y=np.arange(9) % 3)
    np.savez(replacement, before=np.zeros(7, np.float32), x=np.zeros((9, MANY), np.float32), y=np.arange(9) % 3)
    read = zipfile.ZipExtFile.read

    def replace_and_read(stream: zipfile.ZipExtFile, n: int = -1) -> bytes:
        if stream.name == "x.npy" and replacement.exists():
            replacement.replace(path)
        return read(stream, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", replace_and_read)
    with pytest.raises(DataError, match="has changed"):
        load_data(str(path))


CLASSES = np.arange(MAX_SAMPLES_IN_MEMORY // 8) % 3
SETS = np.arange(3 * len(CLASSES), dtype=np.uint8).reshape(-1, 3) % 2


@pytest.mark.parametrize(
    ("graph", "y", "settings"),
    [
        ("plain", CLASSES, {}),
        ("bce", SETS, {"loss": "bce", "balance_classes": True}),
        ("huber", SETS, {"loss": "huber"}),
    ],
)
def test_training_on_samples_on_the_disk_gives_the_same_bits(
    graph: str, y: npt.NDArray[Any], settings: dict[str, Any], tmp_path: Path, weights: Tensors
) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((len(y), 6)).astype(np.float32), y=y)
    recipe = Recipe(max_steps=5, batch_size=16, lr=0.1, **settings)
    stored = load_data(str(tmp_path / "d.npz"))
    assert isinstance(stored.x_train, StoredArray)
    assert isinstance(stored.y_train, StoredArray) == (y.ndim > 1)
    in_memory = LocalData(*(np.asarray(getattr(stored, f"{n}_{split}")) for split in ("train", "test") for n in "xy"))
    task = TrainingTask(recipe, seed=0, device="d", round=1, classes=3)
    from_disk, from_memory = (
        Trainer(GRAPHS / f"{graph}.onnx").train(weights, data, task) for data in (stored, in_memory)
    )
    assert all(np.array_equal(v, from_memory.tensors[n]) for n, v in from_disk.tensors.items())


@pytest.mark.parametrize("compressed", [False, True])
def test_several_inputs_are_joined_on_the_disk_as_in_memory(tmp_path: Path, compressed: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "sound": rng.random((31, 7)),
        "sight": rng.integers(0, 256, (31, 3, 128, 128), np.uint8),
        "y": np.arange(31),
    }
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", **arrays)
    spooled: Any = load_data(str(tmp_path / "d.npz"), spool=tmp_path).x_train
    expected = load_data(str(tmp_path / "d.npz")).x_train
    assert isinstance(spooled, StoredArray)
    assert np.array_equal(spooled[:], np.asarray(expected))
    assert spooled.shape == (25, 3 * 128 * 128 + 7)


@pytest.mark.parametrize("bad", [-1, 3])
def test_classes_of_places_are_checked_on_the_disk(tmp_path: Path, bad: int) -> None:
    y = np.zeros((9, MANY), np.int16)
    y[7, 5] = bad
    np.savez(tmp_path / "d.npz", x=np.ones((9, MANY), np.float32), y=y, x_test=np.ones((2, MANY)), y_test=y[:2])
    data = load_data(str(tmp_path / "d.npz"))
    assert isinstance(data.y_train, StoredArray)
    with pytest.raises(DataError, match="out of range"):
        data.check(Targets("cross_entropy", 3, (MANY,)))
    data.check(Targets("cross_entropy", 4, (MANY,), ignored=bad))


@pytest.mark.parametrize("change", ["overwritten", "cut short", "replaced"])
def test_a_file_that_changes_while_it_is_used_is_an_error(tmp_path: Path, change: str) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.ones((20, MANY), np.float32), y=np.arange(20) % 3)
    data = load_data(str(path))
    if change == "overwritten":
        np.savez(path, x=np.zeros((30, 2), np.float32), y=np.arange(30) % 3)
    elif change == "cut short":
        path.write_bytes(path.read_bytes()[:100])
    else:
        (tmp_path / "other.npz").write_bytes(path.read_bytes())
        (tmp_path / "other.npz").rename(path)
    with pytest.raises(DataError, match="has changed"):
        data.x_train[:3]


def test_samples_that_are_damaged_on_the_disk_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.full((20, MANY), 0.75, np.float32), y=np.arange(20) % 3)
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.float32(0.75).tobytes() * 8) + 40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"not an \.npz file"):
        load_data(str(path))


def test_only_chosen_samples_cost_memory(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    many = StoredArray(tmp_path / "x", None, 0, np.dtype(np.float32), (10**12, 0))  # row numbers alone would be 8 TB
    assert many[:3].shape == many[[0, 5, -1]].shape == (3, 0)
    with pytest.raises(IndexError):
        many[[10**12]]
