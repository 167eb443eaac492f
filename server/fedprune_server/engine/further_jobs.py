"""Configurations of a server's further jobs.

The first job is stored in the state folder itself, with the identity; each further one in a folder `jobs/NAME` of it
that is a whole state folder: database, blobs, model, lock. So every command for a job works on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError
from fedprune.core.validation import check_keys
from fedprune_server.config.job_settings import JOB_KEYS
from fedprune_server.config.layers import SettingsLayer, errors_with_origin, file_layer
from fedprune_server.config.server_config import SERVER_KEYS, ServerConfig
from fedprune_server.config.stored_code import code_names, stored_code_error
from fedprune_server.config.tables import TABLES, parse_config
from fedprune_server.engine.stored_job import stored_tables
from fedprune_server.storage.folder_layout import JOBS_FOLDER, job_folders


def further_configs(first_config: ServerConfig, files: Sequence[Path]) -> list[ServerConfig]:
    """Configurations of the jobs after the first: one for each file, and those that the state folder has already. A
    file is for a new job, or for one whose settings have changed. The first job's settings of the server hold for all
    jobs. Raises `ConfigError` if a file can't be used, two jobs have one name, or a folder's database names code, and
    `StorageError` if a folder can't be read."""
    file_configs = [_read_config(first_config, path) for path in files]
    names = [first_config.job.name, *(config.job.name for config in file_configs)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("jobs of one server", expected="names that differ", got=", ".join(duplicates) + " twice")
    stored_folders = [path for path in job_folders(first_config.state) if path.name not in names]
    stored_settings = {path: stored_tables(path, {}) for path in stored_folders}
    for path, tables in stored_settings.items():
        # A database may come from somebody else's backup: code that it names is run only if the operator names it, too.
        for setting, name in code_names(tables or {}):
            hint = f"If this code is yours, give the job's file: --job FILE, with the name {path.name}."
            raise stored_code_error(setting, name, str(path), hint)
    stored_configs = {path: _stored_config(path, tables) for path, tables in stored_settings.items() if tables}
    return file_configs + [_with_server_settings(first_config, c, path.name) for path, c in stored_configs.items()]


def _read_config(first_config: ServerConfig, path: Path) -> ServerConfig:
    layer = file_layer(path)
    with errors_with_origin([layer]):
        check_keys([t for t in TABLES if t != "alerts"], layer.tables, (), " of a further job")
        if isinstance(layer.tables.get("server"), dict):
            allowed_keys = [key for key in JOB_KEYS if key in SERVER_KEYS]
            check_keys(allowed_keys, layer.tables["server"], ("server",), " of a further job")
        config = parse_config(layer.tables, path.parent)
    return _with_server_settings(first_config, config, config.job.name)


def _stored_config(path: Path, tables: dict[str, Any]) -> ServerConfig:
    with errors_with_origin([SettingsLayer(f"settings of {path}", tables)]):
        return parse_config(tables, Path())


def _with_server_settings(first_config: ServerConfig, config: ServerConfig, name: str) -> ServerConfig:
    """A further job's configuration, with the server's settings of the first job's."""
    job_settings = {key: getattr(config, key) for key in JOB_KEYS}
    return replace(first_config, **job_settings, state=first_config.state / JOBS_FOLDER / name)
