"""`fedprune completion SHELL`: scripts that let a shell complete command lines, made by shtab from the parsers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprune.core.cli import run_command
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import MissingExtraError

SHELLS = ("bash", "zsh")


def main(modules: Mapping[str, str], argv: Sequence[str]) -> int:
    """Run `fedprune completion`; returns the exit code.

    Args:
        modules: The module of each installed command's parser, by its name.
    """
    return run_command("fedprune completion", lambda: _parser(modules), argv)


def _parser(modules: Mapping[str, str]) -> CommandParser:
    parser = CommandParser(
        prog="fedprune completion",
        description="Print a script by which a shell completes all commands of fedprune that are installed.",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.set_defaults(run=lambda arguments: print(completion_script(arguments.shell, modules)))
    return parser


def completion_script(shell: str, modules: Mapping[str, str]) -> str:
    """The script for a shell: `fedprune` with its commands, and each command as a program of its own. Raises
    `MissingExtraError` without shtab."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MissingExtraError("completion needs the package shtab", extra="completion") from error
    umbrella = CommandParser(prog="fedprune")
    umbrella.add_argument("--version", action="version", version="")
    commands: Any = umbrella.add_subparsers()
    programs = {name: load_program_parser(module, shtab.FILE) for name, module in modules.items()}
    for name, parser in programs.items():
        commands.add_parser(name, help=parser.description)
        commands.choices[name] = parser  # the whole parser in place of the new one, which argparse can't be given
    commands.add_parser("completion", help="print such a script").add_argument("shell", choices=SHELLS)
    return "\n".join(shtab.complete(parser, shell) for parser in (umbrella, *programs.values()))


def load_program_parser(module: str, files: object) -> CommandParser:
    """A program's parser with all of its commands, in which arguments that are paths are completed with `files`."""
    cli = importlib.import_module(module)
    parser: CommandParser = cli.build_parser()
    if hasattr(cli, "command_parsers"):  # a program that takes a file or a command, as fedprune-export
        parser = _merge_parsers(parser, cli.command_parsers())
    _mark_paths(parser, files)
    return parser


def _merge_parsers(file_parser: CommandParser, command_parsers: Mapping[str, CommandParser]) -> CommandParser:
    """Merge the parsers of a program whose first word is a command, or a file, which bash completes by itself."""
    parser = CommandParser(prog=file_parser.prog, description=file_parser.description, add_help=False)
    commands: Any = parser.add_subparsers()
    for name, command in command_parsers.items():
        commands.add_parser(name, help=command.description)
        commands.choices[name] = command
    for action in file_parser._actions:
        if action.option_strings:
            parser._add_action(action)
    return parser


def _mark_paths(parser: CommandParser, files: object) -> None:
    for action in parser._actions:
        if action.type is Path and not action.choices:
            action.complete = files  # type: ignore[attr-defined]
    for command in parser.commands().values():
        _mark_paths(command, files)
