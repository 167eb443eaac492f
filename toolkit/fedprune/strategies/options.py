"""A strategy's own settings, read from a job and checked."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from fedprune.core.errors import ConfigError, meant, shown
from fedprune.core.settings import check_fields
from fedprune.core.validation import is_number
from fedprune.jobs.job import Job

T = TypeVar("T")

_TEXT = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list",
    dict: "a table",
}


def read_options(job: Job, kind: type[T]) -> T:
    """A preset's settings from a job's `options`.

    Raises `ConfigError` if an option is unknown or of another type.

    Args:
        kind: A frozen dataclass whose fields all have defaults; their types (bool, int, float, str, tuple or dict)
            are checked against the defaults', their values by `fedprune.core.settings`.
    """
    if not is_dataclass(kind):
        raise TypeError("options are described by a dataclass")
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in job.options.items():
        if name not in known:
            raise ConfigError(
                f"unknown to strategy {job.strategy!r}{meant(name, known)}",
                path=("job", "options", name),
                expected=", ".join(sorted(known)) or "none",
            )
        f = known[name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        values[name] = _checked(name, value, default)
    made = kind(**values)
    check_fields(made, ("job", "options"))
    return made


def _checked(name: str, value: object, default: object) -> object:
    kind: type = type(default)
    if default is None:  # as the strategy finds best
        kind = tuple if isinstance(value, (list, tuple)) else float
    if kind is float and is_number(value):
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(("job", "options", name), expected=_TEXT.get(kind, kind.__name__), got=shown(value))
    return value
