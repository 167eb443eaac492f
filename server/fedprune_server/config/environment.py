"""Settings from environment variables: `FEDPRUNE_<TABLE>_<KEY>`, or with `_FILE` the name of a file that holds one.

Texts are taken as they are; every other value is written as in TOML: `3`, `0.5`, `true`, `["float16"]`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, KeyPath, did_you_mean, dotted_path, path_remedy, value_text
from fedprune.core.toml_file import parse_toml
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import Privacy
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.layers import SettingsLayer
from fedprune_server.config.server_config import TABLE_KEYS, ServerConfig
from fedprune_server.config.tables import TABLES, anchor_paths

# Stands in for `--config`, which wins: an image or a service file can name the `fleet.toml` without a command line.
CONFIG_VARIABLE = "FEDPRUNE_CONFIG"

_FILE_SUFFIX = "_FILE"
_NOT_TOML = 'not a value as in TOML: 3, 0.5, true, ["a"]'
_EXPECTED = "a setting, as FEDPRUNE_<TABLE>_<KEY>"
# A secret or a list of addresses has a few hundred bytes; a larger file is another one, named by mistake.
_MAX_FILE_BYTES = 65536
# `difflib`'s ratio from which a word may be a misspelt table. A lower one would refuse the variables of boards, which
# begin with FEDPRUNE_, too, and may be set on the same machine.
_MIN_SIMILARITY = 0.66

_PREFIXES = tuple(f"FEDPRUNE_{table.upper()}_" for table in TABLES)
# Tables with any key: the strategy declares its own options, and isn't imported to read the environment.
_OPEN_TABLES = {"FEDPRUNE_JOB_OPTIONS_": ("job", "options"), "FEDPRUNE_JOB_SCHEDULE_": ("job", "schedule")}
# Kubernetes sets variables with these endings for each Service of a namespace (`enableServiceLinks`). That of a Service
# `fedprune-servers` would otherwise be taken for a misspelt `FEDPRUNE_SERVER_PORT`.
_SERVICE_LINK_ENDING = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)


def setting_variables() -> dict[str, tuple[tuple[str, ...], bool]]:
    """Every variable by name, with the path of its setting, and whether the setting is a text."""
    is_text_by_path: dict[tuple[str, ...], bool] = {}
    for table, kind in (
        (("job",), Job),
        (("job", "privacy"), Privacy),
        (("job", "recipe"), Recipe),
        (("server",), ServerConfig),
        (("alerts",), AlertSettings),
    ):
        for f in fields(kind):
            if f.name not in ("job", "alerts", "privacy", "recipe"):
                path = TABLE_KEYS.get(f.name, (*table, f.name)) if kind is ServerConfig else (*table, f.name)
                is_text_by_path[path] = _is_text(str(f.type), f.default)
    return {"FEDPRUNE_" + "_".join(path).upper(): (path, text) for path, text in is_text_by_path.items()}


def environment_layer(environment: Mapping[str, str]) -> SettingsLayer:
    """The settings of the environment, with relative paths from the current folder. Raises `ConfigError` if a variable
    of one of the tables, or of what looks like one, is no setting, or names a file that can't be used.
    A value is only read: the check of settings refuses what is none."""
    settings = setting_variables()
    origins: dict[KeyPath, str] = {}
    layer = SettingsLayer("the environment", {}, origins)
    variables = []
    for name in sorted(environment):
        if name.startswith(_PREFIXES):
            variables.append((name, *_setting(name, settings)))
        elif setting := _intended_variable(name, settings):
            raise ConfigError(f"environment variable {name} (did you mean {setting!r}?)", expected=_EXPECTED)
    # A table comes before its keys, which it would replace: by name, OPTIONS_FILE comes behind OPTIONS_AGE.
    for name, path, is_text, from_file in sorted(variables, key=lambda row: len(row[1])):
        variable = f"environment variable {name}"
        if path in origins:
            raise ConfigError(variable, expected="this or the variable without _FILE", got="both")
        text = file_text(Path(environment[name]), variable) if from_file else environment[name]
        value = text if is_text else _toml_value(text)
        table = layer.tables
        for key in path[:-1]:
            table = table.setdefault(key, {})
        if not isinstance(table, dict):
            expected = f"a table, since {name} sets one of its keys"
            raise ConfigError(
                f"{origins[path[:-1]]}: {dotted_path(path[:-1])}", expected=expected, got=value_text(table)
            )
        table[path[-1]] = value
        # Errors name the variable, which the user can change. The check of settings knows what value is expected, and
        # not how it is written here.
        may_be_word = is_text or path[:-1] in _OPEN_TABLES.values()
        origins[path] = variable if value is not text or may_be_word else f"{variable} ({_NOT_TOML})"
    return SettingsLayer(layer.name, anchor_paths(layer.tables, Path.cwd()), origins)


def _setting(name: str, settings: Mapping[str, tuple[tuple[str, ...], bool]]) -> tuple[tuple[str, ...], bool, bool]:
    """The setting of a variable, whether it is a text, and whether the variable names a file with it."""
    for variable, from_file in ((name, False), (name.removesuffix(_FILE_SUFFIX), True)):
        if variable in settings:
            return (*settings[variable], from_file)
    for prefix, table in _OPEN_TABLES.items():
        if name.startswith(prefix) and len(name) > len(prefix):
            return (*table, name.removeprefix(prefix).lower()), False, False
    raise ConfigError(
        f"environment variable {name[:80]}{did_you_mean(name.removesuffix(_FILE_SUFFIX), settings)}",
        expected=_EXPECTED,
        hint="docs/reference/settings.md lists all keys. Where Kubernetes made it, set enableServiceLinks: false.",
    )  # fmt: skip


def _intended_variable(name: str, settings: Container[str]) -> str | None:
    """The setting that was meant by a name with a slip in the table and none in the key."""
    program, _, rest = name.partition("_")
    word, _, key = rest.removesuffix(_FILE_SUFFIX).partition("_")
    if program != "FEDPRUNE" or not word.isalpha() or _SERVICE_LINK_ENDING.search(name):
        return None
    similar_tables = get_close_matches(word.lower(), TABLES, 1, _MIN_SIMILARITY)
    setting = f"FEDPRUNE_{similar_tables[0].upper()}_{key}" if similar_tables else ""
    return setting if setting in settings else None


def _is_text(kind: str, default: object) -> bool:
    if kind.startswith(("dict", "tuple")):
        return False
    return isinstance(default, (str, Path)) or kind.startswith(("str", "Path"))


def _toml_value(text: str) -> Any:
    """A value written as in TOML; any other text stays one, and only an option of a strategy may be that."""
    if "\n" not in text:  # a text of several lines could add keys of its own to the table that is parsed here
        with suppress(ValueError):
            return parse_toml(f"value = {text}\n")["value"]
    return text


def file_text(path: Path, where: str) -> str:
    """The text in a file, such as a secret's, without the end of its line."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        text = raw.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"{where}: can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {path}", expected="a text in UTF-8", got="other bytes") from error
    if not text or len(raw) > _MAX_FILE_BYTES or "\0" in text:
        expected = f"a text of 1 to {_MAX_FILE_BYTES} bytes"
        raise ConfigError(f"{where}: {path}", expected=expected, got=f"{len(raw)} bytes")
    return text
