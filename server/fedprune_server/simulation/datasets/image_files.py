"""Folders of images as a data set, also with labels in `metadata.csv` or `metadata.jsonl`, as `imagefolder` of the
library `datasets` has them; needs Pillow."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import read_file
from fedprune.core.errors import DataError, did_you_mean, error_reason, path_remedy, value_text
from fedprune.core.text import first_few
from fedprune_device.data.folder_listing import is_system_name
from fedprune_device.data.image_decoding import ENDINGS, decode_image
from fedprune_server.config.layers import name_source
from fedprune_server.simulation.datasets.columns import ParquetColumns
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.samples import Samples, assemble_samples

_TRAIN_NAMES, _TEST_NAMES = ("train", "training"), ("test", "val", "valid", "validation")
MAX_DATA_BYTES = 2**34

_METADATA_FILES = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"  # the column with an image's path, from the metadata's folder

_MAX_METADATA_BYTES = 2**28


@dataclass(frozen=True)
class _ImageRow:
    """An image: its label or class, whether its split is test data, and its owner, empty without owners."""

    path: Path
    label: str | int
    is_test: bool
    owner: str


def read_image_folder(folder: Path, decoding: Decoding | None = None, columns: ParquetColumns | None = None) -> Samples:
    """Read images, as boards do: as viewers display them (`viewer_image`).

    Three layouts are supported: `CLASS/image`; `train/CLASS/image` with `test/CLASS/image`; and `OWNER/CLASS/image`,
    where an owner is a person or a domain. Or the `columns` of `metadata.csv` or `metadata.jsonl`, in the folder or in
    one for each split, have labels and owners, by default the column `label`. Classes, owners and files are sorted by
    name, so the result is the same on every machine. Inputs are uint8 [n, height, width, 3], or [n, height, width] if
    grey.

    Raises:
        DataError: There are no images, one can't be read, is too large, or differs in size from the first.
        MissingExtraError: Pillow is not installed.
    """
    subfolders, decoding = _subfolders(folder), decoding or Decoding()
    if columns is not None and columns.x != ParquetColumns().x:
        raise DataError("x of [data]", expected="none for a folder of images", got=", ".join(columns.x))
    if metadata := _metadata_files(folder, subfolders):
        rows = [row for path in metadata for row in _read_metadata(folder, path, columns or ParquetColumns())]
        if not rows:
            raise DataError(f"{folder} holds no images", expected="a row of metadata for each", got="none")
        return _samples_of_rows(rows, *_class_numbers([row.label for row in rows]), decoding)
    if columns is not None:
        raise DataError("y or owner of [data]", expected="none: this folder has no metadata.csv", got="some")
    if not subfolders:
        raise DataError(f"{folder} holds no folders of images", expected="a folder per class")
    names = [f.name.lower() for f in subfolders]
    if all(n in _TRAIN_NAMES + _TEST_NAMES for n in names):
        if not any(n in _TRAIN_NAMES for n in names):
            raise DataError(f"{folder} has no folder of training images", expected="train", got=", ".join(names))
        groups = [(f, is_test_split(f.name), "") for f in subfolders]
    elif any(_subfolders(f) for f in subfolders):
        groups = [(f, False, f.name) for f in subfolders]
    else:
        groups = [(folder, False, "")]
    classes = sorted({c.name for group, _, _ in groups for c in _subfolders(group)})
    rows = [
        _ImageRow(path, label, testing, owner)
        for group, testing, owner in groups
        for label, name in enumerate(classes)
        for path in _image_paths(group / name)
    ]
    if not rows:
        raise DataError(f"{folder} holds no images", expected=f"files ending in {', '.join(ENDINGS)}")
    return _samples_of_rows(rows, np.array([row.label for row in rows], np.int64), classes, decoding)


def _metadata_files(folder: Path, subfolders: Sequence[Path]) -> list[Path]:
    """The folder's own metadata, or else those of its subfolders, one for each split."""
    for folders in ([folder], subfolders):
        if paths := [f / name for f in folders for name in _METADATA_FILES if (f / name).is_file()]:
            return paths
    return []


def _read_metadata(root: Path, path: Path, columns: ParquetColumns) -> Iterator[_ImageRow]:
    """The images of one file of metadata. Raises `DataError`, which names the file and the row."""
    try:
        text = read_file(path, _MAX_METADATA_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read", expected="UTF-8", got=error_reason(error)) from error
    is_table = path.suffix == ".csv"
    rows = csv.DictReader(io.StringIO(text, newline="")) if is_table else _json_rows(path, text)
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        for name in (_FILE_NAME, columns.y, *([columns.owner] if columns.owner else [])):
            if name not in row:
                raise DataError(
                    f"{place}: column {name!r}",
                    expected=f"one of {first_few(list(map(str, row)), max_names=20)}",
                    got=f"none{did_you_mean(name, list(map(str, row)))}",
                    hint="Name the column of labels with y in [data], that of owners with owner.",
                )
        image = path.parent / _checked_path(row[_FILE_NAME], place)
        # The first folder from the data set's to the image's may be a split.
        is_test = any(map(is_test_split, image.parent.relative_to(root).parts[:1]))
        owner = str(_name(row[columns.owner], f"{place}: the owner")) if columns.owner else ""
        yield _ImageRow(image, _name(row[columns.y], f"{place}: the label"), is_test, owner)


def _json_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: row {number}", expected="JSON", got=error_reason(error)) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}", expected="a JSON object", got=value_text(row))
        yield row


def _checked_path(value: object, place: str) -> Path:
    """A path below the metadata's folder."""
    path = PurePosixPath(value) if isinstance(value, str) and value and "\0" not in value else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{place}: {_FILE_NAME}", expected="a path below the metadata's folder", got=value_text(value))
    return Path(path)


def _name(value: object, what: str) -> str | int:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(what, expected="a whole number or a text", got=value_text(value))


def _samples_of_rows(
    rows: Sequence[_ImageRow], y: npt.NDArray[np.int64], classes: Sequence[str], decoding: Decoding
) -> Samples:
    x = decode_images([(str(row.path), row.path) for row in rows], decoding)
    owners = [np.array([row.owner for row in rows])] if any(row.owner for row in rows) else None
    is_test = np.array([row.is_test for row in rows])
    return assemble_samples([(x, y, is_test)], owners=owners, class_names=classes)


def _class_numbers(labels: Sequence[str | int]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Classes of labels: their numbers if all are whole, else their places among the texts in order."""
    texts = [str(label) for label in labels]
    if all(text.isascii() and text.isdecimal() and len(text) < 8 for text in texts):
        return np.array(texts).astype(np.int64), ()
    names, numbers = np.unique(texts, return_inverse=True)
    return numbers.astype(np.int64), tuple(map(str, names))


def decode_images(images: Sequence[tuple[str, Path | bytes]], decoding: Decoding) -> npt.NDArray[np.uint8]:
    """Decode images, each a file or its bytes, after the name that errors give it; arguments and errors as
    `read_image_folder`."""
    mode, size = "RGB" if decoding.colour else "L", decoding.size
    pixels_of_all: npt.NDArray[np.uint8] | None = None
    for number, (name, file) in enumerate(images):
        with name_source(name):
            pixels = decode_image(file, mode, None if size is None else (size[1], size[0]), decoding.background)
        if pixels_of_all is None:
            if pixels.nbytes * len(images) > MAX_DATA_BYTES:
                raise DataError("images", expected=f"at most {MAX_DATA_BYTES} bytes", hint="Give a smaller size.")
            pixels_of_all = np.empty((len(images), *pixels.shape), np.uint8)
        if pixels.shape != pixels_of_all.shape[1:]:
            raise DataError(
                f"{name}: size",
                expected=f"{pixels_of_all.shape[1]} x {pixels_of_all.shape[2]}, as {Path(images[0][0]).name}",
                got=f"{pixels.shape[0]} x {pixels.shape[1]}",
                hint="Give a size to which images are scaled.",
            )
        pixels_of_all[number] = pixels
    if pixels_of_all is None:
        raise DataError("no images")
    return pixels_of_all


def is_test_split(name: str) -> bool:
    """Whether a split of this name is test data."""
    return name.lower() in _TEST_NAMES


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted((f for f in folder.iterdir() if f.is_dir() and not is_system_name(f.name)), key=lambda f: f.name)
    except OSError as error:
        raise DataError(f"can't read {folder}: {error.strerror or error}", hint=path_remedy(error)) from error


def _image_paths(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(
            (f for f in folder.iterdir() if f.suffix.lower() in ENDINGS and f.is_file() and f.name[0] != "."),
            key=lambda f: f.name,
        )
