"""The binary version of CIFAR-10 and CIFAR-100 (cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune_server.simulation.datasets.samples import Samples, assembled

_PIXELS = 3 * 32 * 32
_PICKLED = ("data_batch_1", "train")
"""First files of the Python version, which is pickled."""


@dataclass(frozen=True)
class _Layout:
    """Files of one data set in its folder, and the labels that precede each image."""

    train: tuple[str, ...]
    test: str
    names: str
    labels: int = 1


_LAYOUTS = (
    _Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"),
    _Layout(("train.bin",), "test.bin", "fine_label_names.txt", labels=2),
)


def has_cifar(folder: Path) -> bool:
    """Whether a folder looks like one of the data sets, in either version."""
    return _layout(folder) is not None or any((folder / name).is_file() for name in _PICKLED)


def read_cifar(folder: Path) -> Samples:
    """Map the training batches in order, then the test batch. CIFAR-100's fine labels are used.

    Raises:
        DataError: Files are missing, damaged, or of the Python version.
    """
    layout = _layout(folder)
    if layout is None:
        raise DataError(
            f"{folder} has no binary CIFAR files",
            expected="data_batch_1.bin or train.bin",
            hint="The Python version is pickled, and nothing is unpickled: download the binary version.",
        )
    splits = []
    for name in (*layout.train, layout.test):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing", expected=", ".join((*layout.train, layout.test)))
        try:
            splits.append((*_batch(path, layout), name == layout.test))
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror or error}") from error
    return assembled(splits, class_names=_class_names(folder / layout.names))


def _layout(folder: Path) -> _Layout | None:
    return next((layout for layout in _LAYOUTS if (folder / layout.train[0]).is_file()), None)


def _batch(path: Path, layout: _Layout) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    row = layout.labels + _PIXELS
    size = path.stat().st_size
    if not size or size % row:
        raise DataError(f"{path}: size", expected=f"a multiple of {row} bytes", got=size)
    table = np.memmap(path, np.uint8, "r", shape=(size // row, row))
    labels = np.array(table[:, layout.labels - 1], np.int64)  # CIFAR-100 has the coarse label first
    return table[:, layout.labels :].reshape(-1, 3, 32, 32), labels


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    return tuple(line for line in path.read_text(encoding="ascii", errors="replace").split("\n") if line.strip())
