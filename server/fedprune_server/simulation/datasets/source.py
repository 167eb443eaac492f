"""The choice of a reader for a data set's files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.disk import is_there
from fedprune.core.errors import DataError
from fedprune_server.simulation.datasets.cifar import has_cifar, read_cifar
from fedprune_server.simulation.datasets.idx import has_idx, read_idx_folder
from fedprune_server.simulation.datasets.image_folder import read_image_folder
from fedprune_server.simulation.datasets.npz import read_npz
from fedprune_server.simulation.datasets.samples import Samples

VARIABLE = "FEDPRUNE_DATA"
"""Environment variable with a folder in which missing sources are searched."""

_INNER = ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python", "raw", "MNIST/raw")
"""Folders of archives and of torchvision, below the folder that a user names."""


def read_samples(source: str | Path, *, size: tuple[int, int] | None = None, colour: bool = True) -> Samples:
    """Read a data set.

    Args:
        source: A `.npz` file, or a folder: MNIST's idx files, CIFAR's binary files, or images in a folder per class. A
            path that doesn't exist is searched in `FEDPRUNE_DATA`, also with the extension `.npz`.
        size: Height and width to which images of a folder are scaled.
        colour: Whether images of a folder are read in colour.

    Raises:
        DataError: It doesn't exist, or can't be read; the message names the file.
    """
    path = found(source)
    with _named(path):
        return _read(path, size, colour)


def _read(path: Path, size: tuple[int, int] | None, colour: bool) -> Samples:
    if path.is_file():
        return read_npz(path)
    for folder in (path, *(path / inner for inner in _INNER)):
        if has_cifar(folder):
            return read_cifar(folder)
        if has_idx(folder):
            return read_idx_folder(folder)
    return read_image_folder(path, size=size, colour=colour)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to an error that doesn't have it."""
    try:
        yield
    except DataError as error:
        if str(path) in error.what:
            raise
        raise DataError(f"{path}: {error.what}", expected=error.expected, got=error.got, hint=error.hint) from error


def found(source: str | Path) -> Path:
    """The path of a source.

    Raises:
        DataError: It doesn't exist; the message names the searched places.
    """
    named = Path(source)
    places = [named]
    if not named.is_absolute() and (root := os.environ.get(VARIABLE)):
        places += [Path(root) / named, Path(root) / f"{named}.npz"]
    for place in places:
        if is_there(place):
            return place
    raise DataError(
        f"data {str(source)!r}",
        expected="a .npz file or a folder that exists",
        got=f"nothing at {', '.join(map(str, places))}",
        hint="" if os.environ.get(VARIABLE) else f"Or set {VARIABLE} to the folder that it lies in.",
    )
