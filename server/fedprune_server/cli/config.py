"""`fedprune-server config check|show`: checks settings, and shows where each comes from."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fedprune.core.cli import add_json_option, print_json
from fedprune_server.cli.run import LoadedConfig, load_config, run_options
from fedprune_server.config.alert_settings import shown_url
from fedprune_server.config.layers import setting_origin, setting_value_text, without_secrets
from fedprune_server.config.server_config import PATH_SETTINGS
from fedprune_server.config.tables import config_tables


def add_config(config: argparse.ArgumentParser) -> None:
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("check", "check a fleet.toml together with the environment, and show what a server would use"),
        ("show", "show what `run` with the same options would use"),
    ):
        action = actions.add_parser(name, help=text, parents=[run_options()])
        count = None if name == "check" else "?"
        action.add_argument("file", type=Path, nargs=count, metavar="FILE", help="the fleet.toml, as with --config")
        add_json_option(action)
        action.add_argument("--all", action="store_true", help="show also settings that have their default value")
        action.set_defaults(function=_show)


def _show(arguments: argparse.Namespace) -> None:
    arguments.config = arguments.file or arguments.config
    configuration = load_config(arguments)
    rows = [row for row in setting_rows(configuration) if arguments.all or arguments.json or row["from"] != _DEFAULT]
    if arguments.json:
        print_json(rows)
        return

    table = ""
    for row in rows:
        if row["table"] != table:
            table = row["table"]
            print(f"[{table}]")
        line = f"{row['key']} = {setting_value_text(row['value'])}"
        print(f"{line:<48} # {row['from']}" + ("; no such file" if row["missing"] else ""))
    if not rows:
        print("# every setting has its default value; --all shows them")


_DEFAULT = "default"

# Settings that name files which a server reads when it starts, or functions as `package.module:function`. A missing
# file is only reported, because a check may run on another machine than the server, which doesn't have it.
_START_FILES = (("model", "path"), ("evaluation", "data"), ("calibration", "data"))


def setting_rows(configuration: LoadedConfig) -> Iterator[dict[str, Any]]:
    """Every setting with its value and its origin, without passwords."""
    tables = config_tables(configuration.config)
    job = configuration.config.job
    # With the keys that `Job.to_dict` leaves out where they have their default value.
    tables["job"] = {**{f.name: getattr(job, f.name) for f in fields(job)}, **tables["job"]}
    tables["job"]["privacy"] = asdict(job.privacy)
    for path, value in _flat_settings((), tables):
        source = setting_origin(configuration.layers, path) or _DEFAULT
        shown_value = without_secrets(value) if isinstance(value, str) else value
        if path[0] == "alerts" and path[-1] in ("webhook", "heartbeat"):
            shown_value = shown_url(value)
        if path in _START_FILES or path[-1] in ("state", *PATH_SETTINGS):
            shown_value = os.path.normpath(value)
        missing = path in _START_FILES and ":" not in value and not Path(value).exists()
        yield {"table": ".".join(path[:-1]), "key": path[-1], "value": shown_value, "from": source, "missing": missing}


def _flat_settings(path: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The settings of a table, and after them those of its tables."""
    inner_tables = {k: v for k, v in table.items() if isinstance(v, Mapping) and (v or not path)}
    for key, value in table.items():
        if key not in inner_tables and not (isinstance(value, Mapping) and not value):
            yield (*path, key), value
    for key, value in inner_tables.items():
        yield from _flat_settings((*path, key), value)
