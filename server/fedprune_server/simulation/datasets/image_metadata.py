"""Labels of a folder of images in `metadata.csv` or `metadata.jsonl`, as `imagefolder` of the library `datasets` has
them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedprune.core.disk import read_file
from fedprune.core.errors import DataError, did_you_mean, error_reason, value_text
from fedprune.core.text import first_few
from fedprune_server.simulation.datasets.columns import ParquetColumns

FILES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the column with an image's path, from the metadata's folder

_MAX_BYTES = 2**28


@dataclass(frozen=True)
class ImageRow:
    """An image, with what the metadata say of it: its label, and its owner, empty without owners."""

    path: Path
    folders: tuple[str, ...]  # from the data set's folder to the image's, of which the first may be a split
    label: str | int
    owner: str


def metadata_files(folder: Path, subfolders: Sequence[Path]) -> list[Path]:
    """The folder's own metadata, or else those of its subfolders, one for each split."""
    for folders in ([folder], subfolders):
        if paths := [f / name for f in folders for name in FILES if (f / name).is_file()]:
            return paths
    return []


def read_metadata(root: Path, path: Path, columns: ParquetColumns) -> Iterator[ImageRow]:
    """The images of one file of metadata. Raises `DataError`, which names the file and the row."""
    try:
        text = read_file(path, _MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read", expected="UTF-8", got=error_reason(error)) from error
    is_table = path.suffix == ".csv"
    rows = csv.DictReader(io.StringIO(text, newline="")) if is_table else _json_rows(path, text)
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        for name in (FILE_NAME, columns.y, *([columns.owner] if columns.owner else [])):
            if name not in row:
                raise DataError(
                    f"{place}: column {name!r}",
                    expected=f"one of {first_few(list(map(str, row)), max_names=20)}",
                    got=f"none{did_you_mean(name, list(map(str, row)))}",
                    hint="Name the column of labels with y in [data], that of owners with owner.",
                )
        relative = _checked_path(row[FILE_NAME], place)
        image = path.parent / relative
        folders = image.parent.relative_to(root).parts
        owner = str(_name(row[columns.owner], f"{place}: the owner")) if columns.owner else ""
        yield ImageRow(image, folders, _name(row[columns.y], f"{place}: the label"), owner)


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
        raise DataError(f"{place}: {FILE_NAME}", expected="a path below the metadata's folder", got=value_text(value))
    return Path(path)


def _name(value: object, what: str) -> str | int:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(what, expected="a whole number or a text", got=value_text(value))
