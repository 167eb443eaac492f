"""Options that several commands take: `--state`, `--database` and `--allow`, and names of sites and boards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprune.core.errors import ProtocolError

STATE_VARIABLE, DATABASE_VARIABLE = "FEDPRUNE_SERVER_STATE", "FEDPRUNE_SERVER_DATABASE"
_DEFAULT = "fedprune-state"
_STATE_TEXT = "the folder of `run --state`"


def add_state(parser: argparse.ArgumentParser, text: str = _STATE_TEXT) -> None:
    description = f"{text} (default: {STATE_VARIABLE}, or {_DEFAULT})"
    default = Path(_from_environment(STATE_VARIABLE) or _DEFAULT)
    parser.add_argument("--state", type=Path, default=default, metavar="DIR", help=description)


def add_database(parser: argparse.ArgumentParser) -> None:
    text = f"the server's database (default: {DATABASE_VARIABLE}, or the one that the state folder names)"
    parser.add_argument("--database", metavar="URL", help=text)


def add_allow(parser: argparse.ArgumentParser) -> None:
    text = (
        "a function of your own that the job's settings name: without this it isn't called; may be given several times"
    )
    parser.add_argument("--allow", action="append", default=[], metavar="package.module:function", help=text)


def add_board_list(parser: argparse.ArgumentParser, text: str) -> None:
    """The option that lists boards, alike wherever boards are listed: `--device a b`, `--devices a,b`."""
    parser.add_argument(
        "--device", "--devices", dest="devices", nargs="+", action=_AddNames, metavar="NAME",
        help=f"{text}; spaces or commas separate names, and --device is the same option",
    )  # fmt: skip


class _AddNames(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        words = [word.strip() for value in values for word in value.split(",")]
        names = [word for word in words if word] or [""]  # none at all is no list either
        try:
            setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), *map(name_type("device"), names)])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def name_type(what: str) -> Callable[[str], str]:
    """An argument type for names: `what` is `site` or `device`."""

    def parse_name(text: str) -> str:
        from fedprune.wire.topics import check_device, check_topic_name

        try:
            return check_device(text) if what == "device" else check_topic_name(text, what)
        except ProtocolError as error:
            raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from error

    return parse_name


def chosen_database(arguments: argparse.Namespace) -> str | None:
    """The chosen database; None for that of the state folder."""
    return arguments.database or _from_environment(DATABASE_VARIABLE)


def _from_environment(variable: str) -> str | None:
    values = {name: os.environ[name] for name in (variable, f"{variable}_FILE") if os.environ.get(name, "").strip()}
    if list(values) in ([], [variable]):
        return values.get(variable)
    # Only a variable with _FILE needs the settings' classes, which take a while to import.
    from fedprune_server.config.environment import environment_layer

    return str(environment_layer(values).tables["server"][variable.rpartition("_")[2].lower()])
