"""`fedprune-server run`: makes its options from the settings, loads the configuration, and runs the server."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedprune.core.cli import setting_of
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import ExitCode, KeyPath
from fedprune.jobs.job import Job
from fedprune.output.log_lines import log_to_stdout
from fedprune_export.model_options import ImportChoices, option_of
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.environment import CONFIG_VARIABLE, environment_layer
from fedprune_server.config.layers import SettingsLayer, errors_with_origin, file_layer, merge_tables
from fedprune_server.config.server_config import TABLE_KEYS, ServerConfig
from fedprune_server.config.setting import SWITCH
from fedprune_server.config.stored_code import code_names, stored_code_error
from fedprune_server.config.tables import anchor_paths, parse_config

log = logging.getLogger("fedprune.server")

_JOB_OPTIONS = {
    "name": ("NAME", "the job's name"),
    "seed": ("N", "keys every random number"),
    "rounds": ("N", "rounds to run"),
    "devices": ("N", "a round starts when this many devices are connected"),
    "participation": ("SHARE", "share of the devices that a round asks"),
    "over_selection": ("SHARE", "ask this share of devices more than a round needs"),
    "in_flight": ("N", "devices that work at a time (default: all)"),
    "deadline_s": ("S", "seconds that a round waits for updates"),
    "strategy": ("NAME", "such as fedprune or subflot (docs/strategies), or package.module:function"),
    "density": ("D", "kept share of channels on all devices; 0: the planner decides"),
}

# The first group is all that a first fleet needs (README.md); nobody reads fifty options to find these.
_OPTION_GROUPS: dict[str, tuple[str, ...]] = {
    "the most common": ("model", "evaluation", "state", "strategy", "rounds", "devices", "broker", "host"),
    "the job": ("name", "density", "schedule", "seed", "weight"),
    "boards in a round": (
        "participation", "over_selection", "in_flight", "deadline", "connected",
    ),
    "the model and the server's samples": (
        *(choice.name for choice in fields(ImportChoices)), "calibration",
    ),
    "what is kept, and where": ("database", "blobs", "keep"),
    "the broker, and the fleet at it": ("ca", "port", "site", "profiles"),
    "how models and updates travel": ("uploads", "serve_blobs", "blob_url"),
    "processes": ("workers", "workers_url"),
    "to see what happens": (
        "console", "alert_webhook", "metrics", "traces", "track", "log_format",
    ),
}  # fmt: skip

_OPTION_NAMES: dict[tuple[str, ...], str] = {
    ("job", "deadline_s"): "deadline",
    ("job", "schedule", "kind"): "schedule",
    ("alerts", "webhook"): "alert-webhook",
    **{place: name for name, place in TABLE_KEYS.items()},
}
_LAST_START, _DEFAULTS = "the last start", "the defaults"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and the layers that it is made of, from the lowest to the highest."""

    config: ServerConfig
    layers: tuple[SettingsLayer, ...]


def add_run(run: argparse.ArgumentParser) -> None:
    add_run_options(run)
    run.usage = f"{run.prog} [--config FILE] [--state DIR] [OPTION ...]"
    run.set_defaults(function=_run)


def add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--config", type=Path, metavar="FILE", help="fleet.toml; the options below win over it")
    run.add_argument(
        "--insecure", action="store_true", help="without identity, TLS and signatures: for trials on this machine alone"
    )
    run.add_argument(
        "--job", type=Path, action="append", default=[], metavar="FILE",
        help="a further job on the same boards; may be given several times",
    )  # fmt: skip
    run.add_argument(
        "--standby",
        action="store_true",
        help="wait while another server has the job, and continue with it if that ends",
    )
    run.add_argument("--until-finished", action="store_true", help="end when the job is done")
    run.add_argument("--verbose", "-v", action="store_true", help="log more, such as each device's row per round")
    _add_setting_options(run)


def run_options() -> CommandParser:
    """A parser with the options of `run`, as a parent for commands that take the same."""
    parser = CommandParser(add_help=False)
    add_run_options(parser)
    return parser


def _add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting that has one; its destination is the setting, such as `server.keep`."""
    adders: dict[tuple[str, ...], Callable[..., None]] = {}
    for f in fields(Job):
        if f.name in _JOB_OPTIONS:
            metavar, text = _JOB_OPTIONS[f.name]
            adders["job", f.name] = partial(_add_option, type=setting_of(type(f.default)), metavar=metavar, help=text)
    text = "when the model is updated: sync, semi-async or async (default: the strategy's)"
    adders["job", "schedule", "kind"] = partial(_add_option, metavar="KIND", help=text)
    for kind, table in ((ServerConfig, "server"), (AlertSettings, "alerts")):
        for setting in fields(kind):
            if setting.metadata.get("metavar") or "option" in setting.metadata:
                adders[TABLE_KEYS.get(setting.name, (table, setting.name))] = partial(
                    _add_setting_option, setting=setting
                )
    places = {_option_name(place).replace("-", "_"): place for place in adders}
    for title, names in _OPTION_GROUPS.items():
        group = parser.add_argument_group(title)
        for place in (places[name] for name in names):
            adders.pop(place)(group, place=place)
    for place, add in adders.items():
        add(parser, place=place)


def _add_setting_option(parser: Any, setting: Field[Any], place: tuple[str, ...]) -> None:
    if "option" in setting.metadata:
        _add_option(parser, place, **option_of(setting))
        return
    metavar, default = setting.metadata["metavar"], setting.default
    text = setting.metadata["text"].replace("%", "%%").removesuffix(".")
    text = text[0].lower() + text[1:]
    if metavar == SWITCH:
        _add_option(parser, place, action="store_true", default=None, help=text)
        return
    text = text if default is None else f"{text} (default: {default})"
    kind = next((k for k in (int, float) if k.__name__ in str(setting.type)), str)
    _add_option(parser, place, type=setting_of(kind), metavar=metavar, help=text)


def load_config(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> LoadedConfig:
    """Load the configuration of `run` with these options: command line over environment over file.

    Without a file, of the command line or the environment, the settings of the state folder's last start count instead.
    Raises `ConfigError`, which says where it is set, if a setting is unknown or has a wrong value, and `StorageError`
    if the state folder is damaged.
    """
    command_line, environment_settings = _command_line_layer(arguments), environment_layer(environment)
    path = arguments.config or (Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None)
    if path is not None:
        base = file_layer(path)
        base = replace(base, tables=anchor_paths(base.tables, path.parent))
    else:
        base = _last_start_layer(merge_tables(environment_settings.tables, command_line.tables).get("server", {}))
    layers = (base, environment_settings, command_line)
    with errors_with_origin(layers):
        tables = merge_tables(base.tables, environment_settings.tables)
        job, chosen_schedule = tables.get("job", {}), command_line.tables.get("job", {}).get("schedule")
        schedule = job.get("schedule") if isinstance(job, Mapping) else None
        if chosen_schedule and isinstance(schedule, Mapping) and schedule.get("kind") != chosen_schedule["kind"]:
            tables["job"] = {k: v for k, v in job.items() if k != "schedule"}  # its other keys are of the other kind
        tables = merge_tables(tables, command_line.tables)
        if base.name == _LAST_START:
            _check_stored_code(base, (environment_settings, command_line), tables)
        config = parse_config(tables, Path())
    return LoadedConfig(config, layers)


def _check_stored_code(start: SettingsLayer, upper: Sequence[SettingsLayer], tables: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if code would be called that only the database of the last start names.

    Whoever can write the state folder could otherwise choose what this process runs.
    """
    stored = dict(code_names(start.tables))
    for path, name in code_names(tables):
        if stored.get(path) == name and not any(layer.has(path) for layer in upper):
            hint = f"If this code is yours, add --{_option_name(path)} {name}, or give the configuration as --config."
            raise stored_code_error(path, name, start.name, hint)


def _add_option(parser: Any, place: tuple[str, ...], **details: Any) -> None:
    parser.add_argument(f"--{_option_name(place)}", dest=".".join(place), **details)


def _option_name(place: tuple[str, ...]) -> str:
    return _OPTION_NAMES.get(place, place[-1]).replace("_", "-")


def _command_line_layer(arguments: argparse.Namespace) -> SettingsLayer:
    tables: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for dest, value in vars(arguments).items():
        place = tuple(dest.split("."))
        if value is None or len(place) < 2:
            continue
        table = tables
        for name in place[:-1]:
            table = table.setdefault(name, {})
        table[place[-1]] = value
        origins[place] = f"command line, --{_option_name(place)}"
    return SettingsLayer("command line", tables, origins)


def _last_start_layer(server: Mapping[str, Any]) -> SettingsLayer:
    """The settings with which the state folder's last start ran, if there was one."""
    from fedprune_server.engine.stored_job import stored_tables

    tables = stored_tables(Path(server.get("state", ServerConfig.state)), server)
    return SettingsLayer(_DEFAULTS) if tables is None else SettingsLayer(_LAST_START, tables)


def _run(arguments: argparse.Namespace) -> int:
    # All of the server: a second, which `--help`, a wrong option and `fedprune completion` must not wait for.
    from fedprune.runtime.session import run_by_child_process
    from fedprune_device.hardware.allocator import share_heaps
    from fedprune_server.app import StartOptions, build_app
    from fedprune_server.engine.state_folder import StateFolder
    from fedprune_server.monitoring.health import Pulse

    share_heaps()  # before any thread starts: glibc gives each thread a heap of its own, which keeps freed memory
    config = load_config(arguments).config
    options = StartOptions(arguments.job, arguments.insecure, arguments.until_finished)
    with ExitStack() as stack:
        stack.enter_context(log_to_stdout(verbose=arguments.verbose, form=config.log_format))
        stack.enter_context(run_by_child_process())  # a round's evaluation needs it for a second
        pulse, folder, stopping = Pulse(), None, threading.Event()
        if arguments.standby:
            with pulse.standing_by():
                waiting_folder = StateFolder(config.state, config.database, standby=True, stopping=stopping)
                folder = stack.enter_context(waiting_folder)
            # The other server may have been started with other settings meanwhile.
            config = load_config(arguments).config
        with build_app(config, options, stopping, folder, [pulse]) as app, _stop_on_signals(stopping) as signals:
            app.run()
        interrupted = bool(signals) and not app.server.is_finished
        if interrupted:
            log.info("stopped: the same command continues with what %s holds", config.state)
    # SIGTERM is how a service is stopped; Ctrl-C means that the operator didn't wait for the end.
    return int(ExitCode.INTERRUPTED if interrupted and signal.SIGINT in signals else ExitCode.OK)


@contextmanager
def _stop_on_signals(stopping: threading.Event) -> Iterator[list[int]]:
    """Set `stopping` at SIGTERM or Ctrl-C. The list that it yields collects the signals."""
    signals: list[int] = []

    def stop(number: int, _frame: object) -> None:
        # Nothing else: a handler interrupts the loop at any point, also in the middle of a write.
        signals.append(number)
        stopping.set()

    former_handlers = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
        if signals:
            log.info("stopped by %s", signal.Signals(signals[0]).name)
