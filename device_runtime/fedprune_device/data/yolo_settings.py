"""Reads what `data.yaml` of Ultralytics and its kin says of a data set, as far as boards need it, without a library.

Boards have no library for YAML. These files are short and of a few forms, and what has another form is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from fedprune.core.disk import open_file, storage_errors
from fedprune.core.errors import ConfigError
from fedprune_device.data.folder_listing import files_in

_YAML_FILES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")  # Ultralytics, Roboflow
_MAX_YAML_FILES = 20  # that are looked into
MAX_BYTES = 2**16
_MAX_ENTRY_LENGTH = 1000  # characters of an entry; the pattern's time grows faster than a line's length
PARTS = ("train", "val", "test")

# No two parts that follow each other match the same spaces: trying all ways to divide them takes minutes.
_ENTRY = re.compile(
    r"""(?:-[ \t]|(\d+)[ \t]*:)[ \t]*("[^"]*"|'[^']*'|(?:[^\s#](?:[^#\n]|(?<!\s)\#)*?)?)[ \t]*(?:[ \t]\#.*)?"""
)
_ITEM = re.compile(r"""(?:(\d+)[ \t]*:[ \t]*)?("[^"]*"|'[^']*'|[^\s,\[\]{}'"][^,\[\]{}\n'"]*)|(?P<end>[\]}])""")
_SCALAR = re.compile(r"""("[^"]*"|'[^']*'|[^#\n]*?)[ \t]*(?:(?:^|[ \t])\#.*)?""")


@dataclass(frozen=True)
class YoloSettings:
    """Paths of each part's images, as the file has them, and whether labels have keypoints behind their boxes."""

    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_keypoints: bool = False


def read_yolo_settings(folders: Iterable[Path]) -> YoloSettings:
    """The settings in the first of the folders' `yaml_files`, with its errors."""
    path = next((path for folder in folders for path in yaml_files(folder)), None)
    if path is None:
        return YoloSettings()
    text = read_text(path)
    texts = {part: _paths(text, part) for part in PARTS}
    has_keypoints = _head(text, "kpt_shape") is not None
    return YoloSettings({part: paths for part, paths in texts.items() if paths}, has_keypoints)


def yaml_files(folder: Path) -> list[Path]:
    """The files of a folder that describe a data set: those of the usual names, or else the one that has `names`.

    Raises `ConfigError` if several have, `StorageError` if one can't be read.
    """
    if usual := [folder / name for name in _YAML_FILES if (folder / name).is_file()]:
        return usual
    others = files_in(folder, (".yaml", ".yml"))[:_MAX_YAML_FILES] if folder.is_dir() else []
    described = [path for path in others if path.is_file() and _head(read_text(path), "names") is not None]
    if len(described) > 1:
        raise ConfigError(
            f"names of classes in {folder}",
            expected=f"one file with `names`, such as {_YAML_FILES[0]}",
            got=" and ".join(path.name for path in described),
            hint=f"Rename the one that counts to {_YAML_FILES[0]}.",
        )
    return described


def read_text(path: Path) -> str:
    """The beginning of a text file, of at most `MAX_BYTES`; raises `StorageError`."""
    with storage_errors(f"can't read {path}"), open_file(path) as file:
        return file.read(MAX_BYTES).decode("utf-8-sig", errors="replace")


def yaml_names(text: str) -> tuple[str, ...] | None:
    """The entries of `names`, empty without such a key; None if they are neither a list nor numbered from 0."""
    head = _head(text, "names")
    if head is None:
        return ()
    entries = _entries(head[1], text[head.end() :])
    numbers = [number for number, _ in entries if number]
    if not entries or (numbers and numbers != list(map(str, range(len(entries))))):
        return None
    return tuple(_strip_quotes(name) for _, name in entries)


def _paths(text: str, part: str) -> tuple[str, ...]:
    """The path of a part, or the list of its paths."""
    head = _head(text, part)
    if head is None:
        return ()
    scalar = _SCALAR.fullmatch(head[1]) if len(head[1]) <= _MAX_ENTRY_LENGTH else None
    value = _strip_quotes(scalar[1]) if scalar is not None and not head[1].startswith("[") else ""
    if value:
        return () if value in ("null", "~") else (value,)
    return tuple(_strip_quotes(entry) for _, entry in _entries(head[1], text[head.end() :]))


def _head(text: str, key: str) -> re.Match[str] | None:
    return re.search(rf"^{key}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)


def _entries(value: str, following: str) -> list[tuple[str, str]]:
    """Entries in YAML, each with its number or without: `[a, b]`, `{0: a, 1: b}`, or a line for each.

    `value` is the text behind the key, `following` the text after that line.
    """
    if value.startswith(("[", "{")):
        items = takewhile(lambda item: not item["end"], _ITEM.finditer(value + following, 1))
        return [(item[1] or "", item[2]) for item in items]
    entries = []
    for line in following.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        entry = _ENTRY.fullmatch(line) if len(line) <= _MAX_ENTRY_LENGTH else None
        if entry is None:
            break
        entries.append((entry[1] or "", entry[2]))
    return entries


def _strip_quotes(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name
