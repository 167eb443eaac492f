"""The grammar of all commands for `fedprune_start.completion`, from their parsers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedprune.planning.profile_store import shipped
from fedprune.strategies import PRESETS
from fedprune_flash.cli.jetson import BOARDS
from manual.command_pages import _commands, _parsers

_FILES = frozenset(
    {"FILE", "FILE.npz", "FILE.safetensors", "FILE.json", "FILE.html", "DIR", "SRC", "MODEL", "FOLDER", "PLACE"}
    | {"BUNDLE", "SOURCE", "OUT", "OUT.onnx", "PROFILE"}
)
"""Names of values that are files or folders."""

_DEVICES = frozenset({"fedprune-server crashes --device", "fedprune-server devices device"})
"""Arguments that take a member of the fleet, by the state folder's database."""

_LISTED_DEVICES = "fedprune-server rollout start --devices"
_UMBRELLA = ("-h", "--help", "--version")


def document() -> str:
    """The grammar as JSON, a line per argument."""
    root: dict[str, Any] = {"arguments": [_argument("", [name], 0) for name in _UMBRELLA], "commands": {}}
    for prog, parser in _parsers():
        node = root
        *above, name = prog.removeprefix("fedprune-").split(" ")
        for word in above:
            node = node["commands"][word]
        node["commands"][name] = _node(parser)
    return _written(root) + "\n"


def _node(parser: argparse.ArgumentParser) -> dict[str, Any]:
    arguments = [
        _of_action(parser.prog, action)
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction) and action.help != argparse.SUPPRESS
    ]
    return {"arguments": arguments, "commands": {name: _node(inner) for name, inner, _ in _commands(parser)}}


def _argument(dest: str, names: list[str], nargs: int | str | None) -> dict[str, Any]:
    return {"dest": dest or names[-1].lstrip("-"), "names": names, "nargs": nargs}


def _of_action(prog: str, action: argparse.Action) -> dict[str, Any]:
    found = _argument(action.dest, [*action.option_strings], action.nargs)
    place = f"{prog} {max(action.option_strings, key=len, default=action.dest)}"
    option = place.rpartition(" ")[2]
    values: list[str] = list(map(str, action.choices or ()))
    if option == "--strategy":
        values = sorted(PRESETS)
    elif option == "--profile" or place == "fedprune-export profiles show name" or _is_target(prog, option):
        values = [*shipped()]
        found |= {"files": True, "listed": place == "fedprune-export --target"}
    elif place == "fedprune-flash jetson board":
        values = [*BOARDS]
    found["values"] = values
    found["devices"] = place in {*_DEVICES, _LISTED_DEVICES}
    if place == _LISTED_DEVICES:
        found["listed"] = True
    if not action.choices and (action.type is Path or action.metavar in _FILES):
        found["files"] = True
    return {key: value for key, value in found.items() if value or (key == "nargs" and value == 0)}


def _is_target(prog: str, option: str) -> bool:
    return option == "--target" and prog.startswith("fedprune-export")


def _written(node: dict[str, Any], depth: int = 0) -> str:
    """JSON of a command, with a line per argument and command, so that changes of two of them merge."""
    inner = "\n" + " " * (depth + 1)
    arguments = ",".join(f"{inner} {json.dumps(argument)}" for argument in node["arguments"])
    commands = ",".join(
        f"{inner} {json.dumps(name)}: {_written(child, depth + 2)}" for name, child in node["commands"].items()
    )
    return f'{{{inner}"arguments": [{arguments}],{inner}"commands": {{{commands}}}}}'
