"""Command lines completed for shells, by argcomplete.

What can be completed comes from a file that `python -m manual` makes from all parsers: a shell waits for the answer, so
nothing of fedprune is imported for it, nor what fedprune needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

GRAMMAR = Path(__file__).with_name("grammar.json")
"""A tree of commands; each has `arguments` and further `commands` by their names.

An argument has its `names` (none if it is positional), argparse's `nargs`, the `values` that are known, whether these
are `listed` with commas, and whether it takes `files` or a server's `devices`.
"""

_WORDS, _LINE, _AT = "_ARGCOMPLETE", "COMP_LINE", "COMP_POINT"
"""Of argcomplete's protocol: how many words of the line name the program, the line, and where the cursor is in it."""

_STATE, _STATE_DEFAULT = "FEDPRUNE_SERVER_STATE", "fedprune-state"
_DATABASE_TIMEOUT_S = 0.2
"""Longest wait after a press of Tab. A server that writes isn't waited for (WAL), only one that recovers or closes its
database."""

_Completer = Callable[..., Sequence[str]]


def complete(command: str | None = None) -> int:
    """Answer a shell and end the process; returns an exit code if argcomplete isn't installed.

    Args:
        command: The subcommand of `fedprune` that the program is; None for `fedprune` itself.
    """
    try:
        import argcomplete
        from argcomplete.lexers import split_line
    except ModuleNotFoundError:
        return 1
    node = json.loads(GRAMMAR.read_text(encoding="utf-8"))
    if command is not None:
        node = node["commands"][command]
    words = split_line(os.environ[_LINE], int(os.environ[_AT]))[3]
    named = int(os.environ[_WORDS])
    for word in words[named:]:
        if word not in node["commands"]:
            break
        node, named = node["commands"][word], named + 1
    os.environ[_WORDS] = str(named)
    parser = _parser(node)
    positional = any(not action.option_strings for action in parser._actions)
    argcomplete.autocomplete(parser, always_complete_options=False if positional else "long")
    return 1


def _parser(node: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A command's arguments; its commands are what its first positional argument may be."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    commands = list(node["commands"])
    for number, argument in enumerate(node["arguments"]):
        names = argument.get("names", ())
        place = {"dest": argument["dest"]} if names else {}
        more = {"action": "store_true"} if argument.get("nargs") == 0 else {"nargs": argument.get("nargs")}
        action = parser.add_argument(*(names or [f"positional{number}"]), **place, **more)
        if argument.get("nargs") != 0:
            action.completer = _completer(argument, () if names else commands)  # type: ignore[attr-defined]
            commands = commands if names else []
    if commands:
        parser.add_argument("command").completer = _completer({}, commands)  # type: ignore[attr-defined]
    return parser


def _completer(argument: Mapping[str, Any], commands: Sequence[str]) -> _Completer:
    """Yields what an argument may be; argcomplete drops what doesn't begin with `prefix`."""

    def found(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
        values = [*argument.get("values", ())]
        if argument.get("devices"):
            values += _devices(Path(getattr(parsed_args, "state", None) or os.environ.get(_STATE) or _STATE_DEFAULT))
        if argument.get("listed"):
            before = prefix[: prefix.rfind(",") + 1]
            values = [before + value for value in values if value not in before.split(",")]
        return [*commands, *values, *(_files(prefix) if argument.get("files") else ())]

    return found


def _files(prefix: str) -> Iterator[str]:
    from argcomplete.completers import FilesCompleter

    yield from FilesCompleter()(prefix)


def _devices(state: Path) -> list[str]:
    """Members in the database of a server's state folder; none of a database elsewhere."""
    try:
        address = f"{(state / 'server.db').resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=_DATABASE_TIMEOUT_S)) as database:
            return sorted({str(name) for (name,) in database.execute("SELECT device FROM members")})
    except (OSError, sqlite3.Error):
        return []
