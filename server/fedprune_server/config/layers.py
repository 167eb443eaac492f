"""Settings in layers (file, environment, command line), and where each setting comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, FedpruneError, KeyPath, Subject, value_text
from fedprune.core.toml_file import read_toml

# Settings are printed by `config show`, and logged: PostgreSQL takes a password before the host or as a parameter.
_PASSWORD = re.compile(r"(://[^/@\s:]*):\S*@")
_QUERY = re.compile(r"([?&]\w*password\w*=)[^&\s]*", re.IGNORECASE)


@dataclass(frozen=True)
class SettingsLayer:
    """Settings of one origin.

    Attributes:
        name: The origin, such as the file.
        tables: The settings, as the tables of a `fleet.toml`.
        origins: What sets each setting, where that is more exact: an environment variable, an option.
    """

    name: str
    tables: dict[str, Any] = field(default_factory=dict)
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def has(self, path: KeyPath) -> bool:
        return self.value(path) is not None

    def value(self, path: KeyPath) -> Any:
        """The value of a setting or table; None if it isn't there."""
        value: Any = self.tables
        for key in path:
            if isinstance(key, int):
                is_present = isinstance(value, list) and key < len(value)
            else:
                is_present = isinstance(value, Mapping) and key in value
            if not is_present:
                return None
            value = value[key]
        return value


def file_layer(path: Path) -> SettingsLayer:
    """A `fleet.toml`; raises `ConfigError` if it can't be read, or is no TOML."""
    return SettingsLayer(str(path), read_toml(path, ConfigError))


def merge_tables(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two layers' tables, key by key; the upper layer wins.

    A value that should be a table and isn't stays in the result, where the check of settings reports it.
    """
    tables = dict(lower)
    for key, value in upper.items():
        if isinstance(value, Mapping) and key in lower:
            value = merge_tables(lower[key], value) if isinstance(lower[key], Mapping) else lower[key]
        tables[key] = value
    return tables


def setting_origin(layers: Sequence[SettingsLayer], path: KeyPath) -> str | None:
    """The origin of a setting or table, given the layers from the lowest to the highest; None for its default."""
    upper = None
    for layer in layers:
        # As in `merge_tables`: what should be a table and isn't stays, as an error.
        wins = upper is None or isinstance(upper.value(path), Mapping) or not isinstance(layer.value(path), Mapping)
        if layer.has(path) and wins:
            upper = layer
    if upper is None:
        return None
    # A variable or option may hold a setting, a table around it, or one in the table that is asked for.
    lengths = ((min(len(keys), len(path)), keys, text) for keys, text in upper.origins.items())
    return next((text for n, keys, text in lengths if keys[:n] == path[:n]), upper.name)


@contextmanager
def errors_with_origin(layers: Sequence[SettingsLayer]) -> Iterator[None]:
    """Prefix errors about settings with the setting's origin, or with that of the innermost table that is set.

    A missing key has no origin of its own; its table has.
    """
    try:
        yield
    except FedpruneError as error:
        if not error.path:
            raise
        table_paths = (error.path[:n] for n in range(len(error.path), 0, -1))
        source = next(
            (setting_source for path in table_paths if (setting_source := setting_origin(layers, path))), layers[0].name
        )
        raise error.with_subject(f"{source}: {error.what}") from error


@contextmanager
def name_source(source: Subject) -> Iterator[None]:
    """Add this setting or file to errors of the body that name none yet."""
    try:
        yield
    except FedpruneError as error:
        if source in error.what if isinstance(source, str) else error.path:
            raise
        message, path = (f"{source}: {error.what}", ()) if isinstance(source, str) else (error.what, source)
        raise error.with_subject(message, path) from error


def without_secrets(text: str) -> str:
    """A setting's text without the passwords of addresses in it."""
    return _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def setting_value_text(value: object) -> str:
    """A setting's value on one line, as TOML writes it where that is short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + without_secrets(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(setting_value_text, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {setting_value_text(v)}" for k, v in value.items()) + " }" if value else "{}"
    return repr(value) if isinstance(value, (int, float)) else value_text(value)
