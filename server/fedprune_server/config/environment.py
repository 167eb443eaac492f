"""Settings from environment variables: `FEDPRUNE_<TABLE>_<KEY>`, or with `_FILE` the name of a file that holds one.

Texts are taken as they are; every other value is written as in TOML: `3`, `0.5`, `true`, `["float16"]`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, KeyPath, dotted, meant, remedy, shown
from fedprune.core.toml_file import parse_toml
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import Privacy
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.layers import Layer
from fedprune_server.config.server_config import PLACES, ServerConfig
from fedprune_server.config.tables import TABLES, anchored

CONFIG = "FEDPRUNE_CONFIG"
"""Names the `fleet.toml`, where `--config` doesn't."""

_FILE = "_FILE"
_EXPECTED = "a setting, as FEDPRUNE_<TABLE>_<KEY>"
_MAX_FILE = 65536
_ALIKE = 0.66
"""`difflib`'s ratio from which a word may be a misspelt table: boards have variables that begin alike."""

_PREFIXES = tuple(f"FEDPRUNE_{table.upper()}_" for table in TABLES)
_OPEN = {"FEDPRUNE_JOB_OPTIONS_": ("job", "options"), "FEDPRUNE_JOB_SCHEDULE_": ("job", "schedule")}
"""Tables whose keys are not known here: the strategy's own."""
_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")
"""Ends of the variables that Kubernetes makes for a Service, whatever that is called."""


def variables() -> dict[str, tuple[tuple[str, ...], bool]]:
    """Every variable by name: the setting that it is, and whether it is a text."""
    found: dict[tuple[str, ...], bool] = {}
    for table, kind in (
        (("job",), Job),
        (("job", "privacy"), Privacy),
        (("job", "recipe"), Recipe),
        (("server",), ServerConfig),
        (("alerts",), AlertSettings),
    ):
        for f in fields(kind):
            if f.name not in ("job", "alerts", "privacy", "recipe"):
                path = PLACES.get(f.name, (*table, f.name)) if kind is ServerConfig else (*table, f.name)
                found[path] = _is_text(str(f.type), f.default)
    return {"FEDPRUNE_" + "_".join(path).upper(): (path, text) for path, text in found.items()}


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """The settings of the environment, with relative paths from the current folder. Raises `ConfigError` if a variable
    of one of the tables, or of what looks like one, is no setting, has no value that TOML knows, or names a file that
    can't be used."""
    known = variables()
    origins: dict[KeyPath, str] = {}
    layer = Layer("the environment", {}, origins)
    for name in sorted(environment):
        where = f"environment variable {name}"
        if not name.startswith(_PREFIXES):
            if setting := _misspelt(name, known):
                raise ConfigError(f"{where} (did you mean {setting!r}?)", expected=_EXPECTED)
            continue
        path, text, from_file = _setting(name, known)
        if path in origins:
            raise ConfigError(where, expected="this or the variable without _FILE", got="both")
        value = file_text(Path(environment[name]), where) if from_file else environment[name]
        table = layer.tables
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = value if text else _value(value, path, where)
        origins[path] = where
    return Layer(layer.name, anchored(layer.tables, Path.cwd()), origins)


def _setting(name: str, known: Mapping[str, tuple[tuple[str, ...], bool]]) -> tuple[tuple[str, ...], bool, bool]:
    """The setting of a variable, whether it is a text, and whether the variable names a file with it."""
    for plain, from_file in ((name, False), (name.removesuffix(_FILE), True)):
        if plain in known:
            return (*known[plain], from_file)
    for prefix, table in _OPEN.items():
        if name.startswith(prefix) and len(name) > len(prefix):
            return (*table, name.removeprefix(prefix).lower()), False, False
    raise ConfigError(
        f"environment variable {name[:80]}{meant(name.removesuffix(_FILE), known)}",
        expected=_EXPECTED,
        hint="docs/reference/settings.md lists all keys. Where Kubernetes made it, set enableServiceLinks: false.",
    )  # fmt: skip


def _misspelt(name: str, known: Container[str]) -> str | None:
    """The setting that was meant by a name with a slip in the table and none in the key."""
    program, _, rest = name.partition("_")
    word, _, key = rest.removesuffix(_FILE).partition("_")
    if program != "FEDPRUNE" or not word.isalpha() or _LINK.search(name):
        return None
    near = get_close_matches(word.lower(), TABLES, 1, _ALIKE)
    setting = f"FEDPRUNE_{near[0].upper()}_{key}" if near else ""
    return setting if setting in known else None


def _is_text(kind: str, default: object) -> bool:
    if kind.startswith(("dict", "tuple")):
        return False
    return isinstance(default, (str, Path)) or kind.startswith(("str", "Path"))


def _value(text: str, path: tuple[str, ...], where: str) -> Any:
    """A value written as in TOML; an option of a strategy may also be a bare word."""
    try:
        return parse_toml(f"value = {text}\n")["value"] if "\n" not in text else _no_value()
    except ValueError:
        if path[:-1] in _OPEN.values():
            return text
        expected = 'a value as in TOML: 3, 0.5, true, ["a"]'
        raise ConfigError(f"{where}: {dotted(path)}", expected=expected, got=shown(text)) from None


def _no_value() -> Any:
    raise ValueError("more than a line")


def file_text(path: Path, where: str) -> str:
    """The text in a file, such as a secret's, without the end of its line."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
        text = raw.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"{where}: can't read {path}: {error.strerror}", hint=remedy(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {path}", expected="a text in UTF-8", got="other bytes") from error
    if not text or len(raw) > _MAX_FILE or "\0" in text:
        raise ConfigError(f"{where}: {path}", expected=f"a text of 1 to {_MAX_FILE} bytes", got=f"{len(raw)} bytes")
    return text
