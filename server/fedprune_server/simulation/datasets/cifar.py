"""CIFAR-10 and CIFAR-100 as their authors publish them (cs.toronto.edu/~kriz/cifar.html), python or binary version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, FedpruneError, shape_text
from fedprune_server.simulation.datasets.plain_pickle import read_plain
from fedprune_server.simulation.datasets.samples import Samples, assembled

Array = npt.NDArray[Any]
Split = tuple[Array, Array, bool]

_PIXELS = 3 * 32 * 32
_MOST = 2**28
"""Bytes of a file beyond which it is none of CIFAR's."""

_LONGEST = 256
"""Letters of a class's name beyond which it is none."""


@dataclass(frozen=True)
class _Layout:
    """How one of the versions lies in its folder: training and test files, and who reads them."""

    train: tuple[str, ...]
    test: str
    names: str
    python: bool
    label: str
    labels: int = 1


_LAYOUTS = (
    _Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", False, ""),
    _Layout(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", True, "labels"),
    _Layout(("train.bin",), "test.bin", "fine_label_names.txt", False, "", labels=2),
    _Layout(("train",), "test", "meta", True, "fine_labels"),
)


def has_cifar(folder: Path) -> bool:
    """Whether a folder looks as if it held one of the versions."""
    return _layout(folder) is not None


def read_cifar(folder: Path) -> Samples:
    """Read all that is there of a version: training batches in order, then the test batch.

    CIFAR-100's fine labels are taken. Python files are read by `plain_pickle`: nothing is unpickled.

    Raises:
        DataError: Files are missing or damaged.
    """
    layout = _layout(folder)
    if layout is None:
        raise DataError(f"{folder} holds no CIFAR files", expected="data_batch_1 or data_batch_1.bin, or CIFAR-100's")
    read: Callable[[Path, _Layout], tuple[Array, Array]] = _python if layout.python else _binary
    splits: list[Split] = []
    for name in (*layout.train, layout.test):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing", expected=", ".join((*layout.train, layout.test)))
        try:
            splits.append((*read(path, layout), name == layout.test))
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror or error}") from error
        except FedpruneError as error:
            raise DataError(f"{path}: {error.what}", expected=error.expected, got=error.got, hint=error.hint) from error
    return assembled(splits, class_names=_class_names(folder / layout.names, layout))


def _layout(folder: Path) -> _Layout | None:
    return next((layout for layout in _LAYOUTS if (folder / layout.train[0]).is_file()), None)


def _content(path: Path) -> bytes:
    if path.stat().st_size > _MOST:
        raise DataError("size", expected=f"at most {_MOST} bytes", got=path.stat().st_size)
    return path.read_bytes()


def _binary(path: Path, layout: _Layout) -> tuple[Array, Array]:
    row = layout.labels + _PIXELS
    size = path.stat().st_size
    if not size or size % row:
        raise DataError("size", expected=f"a multiple of {row} bytes", got=size)
    table = np.memmap(path, np.uint8, "r", shape=(size // row, row))
    labels = np.array(table[:, layout.labels - 1], np.int64)  # CIFAR-100 has the coarse label first
    return table[:, layout.labels :].reshape(-1, 3, 32, 32), labels


def _python(path: Path, layout: _Layout) -> tuple[Array, Array]:
    found = _texts(read_plain(_content(path)))
    for key in ("data", layout.label):
        if key not in found:
            raise DataError(f"entry {key!r} is missing", got=", ".join(map(str, found)) or "nothing")
    images, labels = found["data"], found[layout.label]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        got = f"{images.dtype} {shape_text(*images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError("data", expected=f"uint8 [n, {_PIXELS}]", got=got)
    if not isinstance(labels, list) or any(type(v) is not int or not 0 <= v < 2**20 for v in labels):
        raise DataError(layout.label, expected="a list of classes")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _texts(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DataError("content", expected="a dict", got=type(found).__name__)
    return {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in found.items()}


def _class_names(path: Path, layout: _Layout) -> tuple[str, ...]:
    """The classes' names, where the file with them is there."""
    if not path.is_file():
        return ()
    if not layout.python:
        return tuple(line for line in path.read_text(encoding="ascii", errors="replace").split("\n") if line.strip())
    found = _texts(read_plain(_content(path)))
    names = found.get("label_names", found.get("fine_label_names"))
    if not isinstance(names, list) or not all(isinstance(n, (bytes, str)) and len(n) <= _LONGEST for n in names):
        raise DataError(f"{path}: label_names", expected=f"a list of texts of up to {_LONGEST} letters")
    return tuple(n.decode("latin1") if isinstance(n, bytes) else n for n in names)
