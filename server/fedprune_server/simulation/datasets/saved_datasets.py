"""Data sets that `save_to_disk` of the library `datasets` wrote: which Arrow files they have, and of which splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedprune.core.disk import read_file
from fedprune.core.errors import DataError, error_reason
from fedprune_server.simulation.datasets.image_files import is_test_split

ARROW_SUFFIX = ".arrow"

_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_MAX_JSON_BYTES = 2**24
_MAX_SPLITS = 100


def is_saved_dataset(folder: Path) -> bool:
    return (folder / _SPLITS_FILE).is_file() or (folder / _STATE_FILE).is_file()


def saved_splits(folder: Path) -> list[tuple[list[Path], bool]]:
    """The files of each split, and whether it is test data; raises `DataError` if one of the JSON files is damaged."""
    if not (folder / _SPLITS_FILE).is_file():
        return [(_files(folder), False)]
    names = _entry(folder / _SPLITS_FILE, "splits", _MAX_SPLITS)
    return [(_files(folder / _checked_name(name, folder)), is_test_split(name)) for name in names]


def _files(folder: Path) -> list[Path]:
    entries = _entry(folder / _STATE_FILE, "_data_files", 2**20)
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    return [folder / _checked_name(name, folder) for name in names]


def _entry(path: Path, key: str, max_items: int) -> list[Any]:
    try:
        entry = json.loads(read_file(path, _MAX_JSON_BYTES))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged", expected="JSON of datasets", got=error_reason(error)) from error
    if not isinstance(entry, list) or len(entry) > max_items:
        raise DataError(f"{path}: {key}", expected="a list", got="something else")
    return entry


def _checked_name(name: object, folder: Path) -> str:
    """A name of a file or folder within `folder`: no path that leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
        raise DataError(f"{folder}: the name of a file", expected="one without folders", got=repr(name)[:80])
    return name
