"""Settings in layers (file, environment, command line), each with the positions of its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, shown
from fedprune.core.toml_file import read_toml_text
from fedprune.core.toml_positions import key_places

_UNKNOWN = re.compile(r"(?:\[([\w.]+)\](?: of a further job)?:? )?(?:kind '[^']*': )?unknown (?:key|table) '([^']*)'")
_ROW = re.compile(r"\[\[(\w+)\]\] ?(\d+)?")
_KEY = re.compile(r"\[([\w.]+)\](?: |$)")
_NO_OPTION = re.compile(r".* has no option '([^']*)'")
_TABLE = re.compile(r"(\w+)$")
_PASSWORD = re.compile(r"(://[^/@\s:]*):\S*@")
_QUERY = re.compile(r"([?&]\w*password\w*=)[^&\s]*", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """Settings of one origin.

    Attributes:
        name: The origin, of a setting that has no place of its own.
        tables: The settings, as the tables of a `fleet.toml`.
        places: Positions of settings and tables, such as `fleet.toml:12:1`; tables of a list by their index, from 0.
    """

    name: str
    tables: dict[str, Any] = field(default_factory=dict)
    places: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)

    def has(self, path: tuple[str, ...]) -> bool:
        return path in self.places or _at(self.tables, path) is not None


def file_layer(path: Path) -> Layer:
    """A `fleet.toml`; raises `ConfigError` if it can't be read, or is no TOML."""
    tables, text = read_toml_text(path, ConfigError)
    places = {keys: f"{path}:{line}:{column}" for keys, (line, column) in key_places(text).items()}
    return Layer(str(path), tables, places)


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Tables in which the upper layer wins, key by key; what should be a table and isn't stays, as an error."""
    both = dict(lower)
    for key, value in upper.items():
        if isinstance(value, Mapping) and key in lower:
            value = merged(lower[key], value) if isinstance(lower[key], Mapping) else lower[key]
        both[key] = value
    return both


def origin(layers: Sequence[Layer], path: tuple[str, ...]) -> str | None:
    """Where a setting comes from, given the layers from the lowest to the highest; None for its default."""
    for layer in reversed(layers):
        if layer.has(path):
            return layer.places.get(path, layer.name)
    return None


@contextmanager
def located(layers: Sequence[Layer], where: str) -> Iterator[None]:
    """Let errors of a configuration, which begin with `where`, name the position of the setting in its layer."""
    try:
        yield
    except ConfigError as error:
        subject = error.what.removeprefix(f"{where}: ")
        place = _place(layers, subject) if subject != error.what else None
        if place is None:
            raise
        raise error.named(f"{place}: {subject}") from error


def masked(text: str) -> str:
    """A setting as it may be shown: without the passwords of addresses in it."""
    return _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def _place(layers: Sequence[Layer], subject: str) -> str | None:
    """The position of the setting that a message names, or that of its table.

    A table without a position has that of its first key, if only one layer has the table: a key is missing there.
    """
    path: tuple[str | int, ...] = ()
    for path in _paths(subject):
        for layer in reversed(layers):
            if path in layer.places:
                return layer.places[path]
    saying = [layer for layer in layers if len(path) > 1 and _at(layer.tables, path)]
    return next((v for k, v in saying[0].places.items() if k[:-1] == path), None) if len(saying) == 1 else None


def _paths(subject: str) -> Iterator[tuple[str | int, ...]]:
    """Settings of which a message may speak, the likeliest first."""
    if (row := _ROW.match(subject)) is not None:
        one = (row[1], int(row[2]) - 1) if row[2] else (row[1],)
        yield from ((*one, word) for word in re.findall(r"\w+", subject[row.end() :])[:20])
        yield one
    elif (option := _NO_OPTION.match(subject)) is not None:
        yield ("job", "options", option[1])
    if (unknown := _UNKNOWN.match(subject)) is not None:
        table = tuple(unknown[1].split(".")) if unknown[1] else ()
        yield (*table, unknown[2])
        yield table
    elif (key := _KEY.match(subject)) is not None:
        table = tuple(key[1].split("."))
        words = re.findall(r"\w+", subject[key.end() :])[:20]  # the key comes first, after a word or two
        yield from ((*table, "options", word) for word in words[1:2] if words[0] == "option")
        yield from ((*table, word) for word in words)
        yield table
    elif (name := _TABLE.match(subject)) is not None:
        yield (name[1],)


def _at(tables: Mapping[str, Any], path: tuple[str | int, ...]) -> Any:
    value: Any = tables
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def brief(value: object) -> str:
    """A setting's value as a line shows it, as in TOML where that is short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + masked(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(brief, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {brief(v)}" for k, v in value.items()) + " }" if value else "{}"
    return repr(value) if isinstance(value, (int, float)) else shown(value)
