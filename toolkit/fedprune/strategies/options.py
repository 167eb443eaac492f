"""A strategy's own settings, read from a job and checked."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from fedprune.core.errors import ConfigError, did_you_mean, value_text
from fedprune.core.settings import check_fields
from fedprune.core.validation import is_number
from fedprune.jobs.job import Job

T = TypeVar("T")

_TYPE_TEXTS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list",
    dict: "a table",
}


def read_options(job: Job, kind: type[T]) -> T:
    """A preset's settings from a job's `options`. Raises `ConfigError` if an option is unknown or of another type.
    `kind` is a frozen dataclass whose fields all have defaults. Types (bool, int, float, str, tuple or dict) are
    checked against the defaults', values by `fedprune.core.settings`."""
    if not is_dataclass(kind):
        raise TypeError("options are described by a dataclass")
    option_fields = {option_field.name: option_field for option_field in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in job.options.items():
        if name not in option_fields:
            raise ConfigError(
                f"unknown to strategy {job.strategy!r}{did_you_mean(name, option_fields)}",
                path=("job", "options", name),
                expected=", ".join(sorted(option_fields)) or "none",
            )
        option_field = option_fields[name]
        default = option_field.default if option_field.default_factory is MISSING else option_field.default_factory()
        values[name] = _converted_value(name, value, default)
    options = kind(**values)
    check_fields(options, ("job", "options"))
    return options


def _converted_value(name: str, value: object, default: object) -> object:
    kind: type = type(default)
    # None lets the strategy choose. Such an option is a number or, given as a list, several.
    if default is None:
        kind = tuple if isinstance(value, (list, tuple)) else float
    # TOML and JSON write 1 for 1.0, and lists for tuples.
    if kind is float and is_number(value):
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    # bool is a subclass of int: true must not pass as 1.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(
            ("job", "options", name), expected=_TYPE_TEXTS.get(kind, kind.__name__), got=value_text(value)
        )
    return value
