"""Names of code among the settings that a database keeps: none is called unless the user repeats it.

Whoever can write a state folder, or hands a backup over, could otherwise choose what a server's process runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fedprune.core.errors import ConfigError, dotted_path, value_text
from fedprune.core.imports import is_function
from fedprune.jobs.job import Job
from fedprune_server.config.cluster_url import PROCESSES

# Tables whose key `data` may be a function instead of a file.
_DATA_TABLES = ("evaluation", "calibration")


def code_names(tables: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """Settings, in the tables of a `fleet.toml`, that name code, with what they name: functions, and a cluster whose
    answers are unpickled."""
    # A shipped strategy's name has no colon; `package.module:function` has.
    strategy = _text(tables, "job", "strategy")
    if ":" in strategy:
        yield ("job", "strategy"), strategy
    for table in _DATA_TABLES:
        if is_function(source := _text(tables, table, "data")):
            yield (table, "data"), source
    if (workers := _text(tables, "server", "workers_url")) not in ("", PROCESSES):
        yield ("server", "workers_url"), workers


def stored_code_error(path: tuple[str, str], name: str, where: str, hint: str) -> ConfigError:
    """The error about the name of code, at the path of a table and a key, that stands only in a database or folder
    (`where`)."""
    return ConfigError(
        f"{where}: {dotted_path(path)} names code",
        expected="the name at the command line or in a configuration file, too",
        got=value_text(name),
        hint=hint,
    )


def stored_job(settings: Mapping[str, Any], allowed: Collection[str], where: str) -> Job:
    """The job of a folder's settings, for code that composes its strategy. `allowed` names the functions that the user
    has repeated. Raises `ConfigError` if its strategy is another function; the error names the folder (`where`)."""
    for path, name in code_names({"job": settings["job"]}):
        if name not in allowed:
            raise stored_code_error(path, name, where, f"If this code is yours, add --allow {name}.")
    return Job.from_dict(settings["job"])


def _text(tables: Mapping[str, Any], table: str, key: str) -> str:
    values = tables.get(table)
    value = values.get(key) if isinstance(values, Mapping) else None
    return value if isinstance(value, str) else ""
