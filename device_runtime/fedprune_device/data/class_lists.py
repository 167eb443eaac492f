"""Reads the names of classes that labelling tools write next to YOLO's labels: `classes.txt`, `data.yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError

_TEXTS = ("classes.txt", "obj.names")  # a name in each line: Label Studio, LabelImg; darknet, CVAT
_YAMLS = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")  # Ultralytics, Roboflow
_MAX_BYTES = 2**16
_MAX_ENTRY_LENGTH = 1000  # characters of an entry; the pattern's time grows faster than a line's length

_NAMES = re.compile(r"^names[ \t]*:[ \t]*(.*)$", re.MULTILINE)
_ENTRY = re.compile(r"""[ \t]*(?:-[ \t]|(\d+)[ \t]*:)[ \t]*("[^"]*"|'[^']*'|[^#\n]*?)[ \t]*(?:[ \t]\#.*)?""")
_ITEM = re.compile(r"""[\s,]*(?:(\d+)[ \t]*:)?[ \t]*("[^"]*"|'[^']*'|[^,\[\]{}\n'"]+)""")


def find_class_list(folders: Iterable[Path]) -> tuple[str, ...]:
    """The names in the first of these files in one of the folders, in the order of their numbers; empty without one.

    Raises `ConfigError` if a file can't be understood, `StorageError` if it can't be read.
    """
    for path in (folder / name for folder in folders for name in (*_TEXTS, *_YAMLS)):
        if not path.is_file():
            continue
        with storage_errors(f"can't read {path}"), path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8-sig", errors="replace")
        if path.name in _TEXTS:
            return tuple(filter(None, map(str.strip, text.splitlines())))
        if (head := _NAMES.search(text)) is not None:
            names = _yaml_list(head[1], text[head.end() :])
            if names is None:
                raise ConfigError(
                    f"names in {path}",
                    expected="a list, or a mapping of the numbers from 0",
                    got="something else",
                    hint=f"Or write {_TEXTS[0]} beside it, with a name in each line.",
                )
            return names
    return ()


def _yaml_list(value: str, following: str) -> tuple[str, ...] | None:
    """Names in YAML: `[a, b]`, `{0: a, 1: b}`, or a line for each; None if the text is something else.

    `value` is the text behind `names:`, `following` the text after that line.
    """
    if value.startswith(("[", "{")):
        entries = _ITEM.findall(re.split(r"[\]}]", (value + following)[1:], maxsplit=1)[0])
    else:
        entries = []
        for line in following.splitlines():
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            entry = _ENTRY.fullmatch(line) if len(line) <= _MAX_ENTRY_LENGTH else None
            if entry is None:
                break
            entries.append((entry[1] or "", entry[2]))
    numbers = [int(number) for number, _ in entries if number]
    if not entries or (numbers and numbers != list(range(len(entries)))):
        return None
    return tuple(_strip_quotes(name) for _, name in entries)


def _strip_quotes(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name
