"""Arrays in files: what numpy, scipy and frameworks write."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_folders.kinds import CLASSES, NUMBERS, REFUSED, Kind, Truth
from fedprune_device.data.labels import Targets

SHAPE = (3, 4, 4)
X = np.random.default_rng(5).random((6, *SHAPE), np.float32)
Y = np.array([0, 1, 0, 1, 1, 0])
WHOLE = Truth(list(zip(X, Y.tolist(), strict=True)))


def kinds() -> Iterator[Kind]:
    """All kinds of files of arrays."""
    yield _npz("npz: x and y", x=X, y=Y)
    yield _file("npz, compressed", "data.npz", partial(np.savez_compressed, x=X, y=Y), WHOLE)
    both = Truth([*(WHOLE.samples or ()), *zip(X[:2] + 1, Y[:2].tolist(), strict=True)])
    yield _npz("npz: x_train, y_train, x_test, y_test", both, x_train=X, y_train=Y, x_test=X[:2] + 1, y_test=Y[:2])
    yield _npz("npz: float64", x=X.astype(np.float64), y=Y)
    yield _npz("npz: float16", Truth(WHOLE.samples, 1e-3), x=X.astype(np.float16), y=Y)
    yield _npz("npz: Fortran order, big-endian", x=np.asfortranarray(X.astype(">f4")), y=Y)
    yield _npz("npz: labels of uint8", x=X, y=Y.astype(np.uint8))
    yield _npz("npz: labels of floats (0.0, 1.0)", REFUSED, x=X, y=Y.astype(np.float32))
    yield _npz("npz: labels one-hot", REFUSED, x=X, y=np.eye(2)[Y])
    names = ("cat", "dog")
    yield _npz("npz: labels as texts", WHOLE, CLASSES, ("class_names", names), x=X, y=np.array(names)[Y])
    yield _npz("npz: labels from 1", REFUSED, x=X, y=Y + 1)
    yield _npz("npz: labels [n, 1]", REFUSED, x=X, y=Y[:, None])
    yield _npz("npz: pictures of bytes, colours last", REFUSED, x=(X.transpose(0, 2, 3, 1) * 255).astype(np.uint8), y=Y)
    yield _npz("npz: pictures of bytes, colours first", REFUSED, x=(X * 255).astype(np.uint8), y=Y)
    yield _npz("npz: NaN in it", REFUSED, x=np.where(X.max() == X, np.nan, X), y=Y)
    yield _npz("npz: other lengths of x and y", REFUSED, x=X, y=Y[:4])
    quarters = np.float32(Y) / 4
    yield _npz("npz: numbers to predict", Truth(list(zip(X, quarters, strict=True))), NUMBERS, x=X, y=quarters)
    yield _npz("npz: objects, which would have to be unpickled", REFUSED, x=np.array([X, None], object), y=Y[:2])
    yield _file("npy: a single array", "x.npy", lambda path: np.save(path, X))
    yield _file("a pickle", "x.pkl", lambda path: path.write_bytes(pickle.dumps({"x": X, "y": Y})))
    yield _file("MATLAB's .mat", "x.mat", _write_mat)
    yield _file("HDF5", "x.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)))
    yield _file("torch's .pt", "x.pt", _write_pt)
    yield _file("a file cut short", "x.npz", _write_half)


def _npz(name: str, truth: Truth = WHOLE, targets: Targets = CLASSES, *options: Any, **arrays: Any) -> Kind:
    def write(folder: Path) -> tuple[Path, Truth]:
        np.savez(folder / "data.npz", **arrays)
        return folder / "data.npz", truth

    return Kind("arrays", name, write, SHAPE, targets, options)


def _file(name: str, file: str, write_file: Callable[[Path], Any], truth: Truth = REFUSED) -> Kind:
    def write(folder: Path) -> tuple[Path, Truth]:
        write_file(folder / file)
        return folder / file, truth

    return Kind("arrays", name, write, SHAPE)


def _write_mat(path: Path) -> None:
    from scipy.io import savemat

    savemat(path, {"x": X, "y": Y})


def _write_pt(path: Path) -> None:
    import torch

    torch.save({"x": torch.from_numpy(X)}, path)


def _write_half(path: Path) -> None:
    np.savez(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:500])
