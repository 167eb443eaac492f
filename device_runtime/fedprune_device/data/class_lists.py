"""Reads the names of classes that labelling tools write next to YOLO's labels: `classes.txt`, `data.yaml`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from fedprune.core.errors import ConfigError
from fedprune_device.data.yolo_settings import read_text, yaml_files, yaml_names

_TEXTS = ("classes.txt", "obj.names")  # a name in each line: Label Studio, LabelImg; darknet, CVAT
_NOTES = "notes.json"  # Label Studio's, which has the numbers, too


def find_class_list(folders: Iterable[Path]) -> tuple[str, ...]:
    """The names in the first of these files in one of the folders, in the order of their numbers; empty without one.

    Raises `ConfigError` if a file can't be understood, `StorageError` if it can't be read.
    """
    candidates = ([*(folder / name for name in _TEXTS), *yaml_files(folder), folder / _NOTES] for folder in folders)
    for path in chain.from_iterable(candidates):
        if not path.is_file():
            continue
        text = read_text(path)
        if path.name in _TEXTS:
            return tuple(filter(None, map(str.strip, text.splitlines())))
        names = _categories(text) if path.name == _NOTES else yaml_names(text)
        if names is None:
            raise ConfigError(
                f"names in {path}",
                expected="a list, or a mapping of the numbers from 0",
                got="something else",
                hint=f"Or write {_TEXTS[0]} beside it, with a name in each line.",
            )
        if names:
            return names
    return ()


def _categories(text: str) -> tuple[str, ...] | None:
    """The names in `notes.json`; empty if it is another tool's file, None if they aren't numbered from 0."""
    try:
        categories = json.loads(text)["categories"]
        names = {category["id"]: category["name"] for category in categories}
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()
    is_list = list(names) == list(range(len(categories))) and all(isinstance(name, str) for name in names.values())
    return tuple(names.values()) if is_list else None
